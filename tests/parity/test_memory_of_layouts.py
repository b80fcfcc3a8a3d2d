"""What a plan says of memory is what ranks take: peak resident memory of real steps against the estimate.

A process also has what does not depend on the model: code that is first touched, buffers of gloo, kernels
that oneDNN compiles for shapes it meets. So two sizes are measured and their difference is compared.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from alike import rows_of
from harness import run_ranks
from peak import most_of_its_own, watch_peak
from training import small_config, write_corpus

from rayfold.models.registry import build_model
from rayfold.parallel.mesh import make_mesh
from rayfold.parallel.parallelize import parallelize
from rayfold.runtime.data.loader import Batch
from rayfold.runtime.memory import estimate_memory
from rayfold.runtime.optim.adamw import ShardedAdamW
from rayfold.runtime.plan import RunPlan, make_run_plan
from rayfold.runtime.step import train_step

MODEL = ("model.dim=256", "model.layers=4", "model.heads=8", "model.kv_heads=4", "model.ffn_dim=1024")
ROWS = 4


def plan_of(folder: Path, *overrides: str) -> RunPlan:
    source = write_corpus(folder / "corpus", documents=4)
    given = (*MODEL, f"batch.size={ROWS}", "batch.micro_size=1", "run.workers=2", *overrides)
    return make_run_plan(small_config(folder / "run", source, *given), cpus=2, gpus=0)


def batch_of(seq_len: int, number: int) -> Batch:
    """Documents of 64 tokens, so that attention takes little."""
    tokens = torch.from_numpy(np.random.default_rng(number).integers(0, 256, (ROWS, seq_len)))
    places = torch.arange(seq_len).expand(ROWS, seq_len)
    ids = (places // 64).int().contiguous()
    return Batch(
        tokens=tokens, labels=tokens, positions=places % 64, document_ids=ids, sample_ids=tuple(range(ROWS))
    )


def peaks(plan: RunPlan) -> list[int]:
    """Bytes that each rank takes at its fullest, from before the model is built to the end of two steps."""

    def on_rank() -> int:
        mesh = make_mesh(plan.layout, torch.device("cpu"))
        fields: Any = plan.config.model
        before = watch_peak()
        model = parallelize(lambda: build_model("llama", fields, vocab_size=256), mesh, seed=0)
        optimizer = ShardedAdamW(model, plan.config.optim)
        part = ROWS // plan.layout.dp_size
        first = mesh.data.rank * part
        for number in range(2):
            batch = batch_of(plan.config.data.seq_len, number)
            micro = [rows_of(batch, slice(row, row + 1)) for row in range(first, first + part)]
            train_step(model, optimizer, micro, lr=1e-3, clip_norm=1.0)
        return most_of_its_own() - before

    return run_ranks(2, on_rank, timeout_s=120.0)


@pytest.mark.parametrize(
    "layout",
    [
        "parallel.tp=2 model.vocab_size=8192",
        pytest.param("parallel.cp=2", marks=pytest.mark.campaign),
        pytest.param("parallel.pp=2", marks=pytest.mark.campaign),
        "parallel.pp=2 parallel.pipeline_schedule=gpipe",
    ],
)
def test_twice_the_sequence_takes_what_the_plan_says(layout: str, tmp_path: Path) -> None:
    """Within 10%: vocabulary parallel loss, stages of a pipeline and parts of a context."""
    plans = [plan_of(tmp_path, f"data.seq_len={n}", *layout.split()) for n in (1024, 2048)]
    short, long = (max(peaks(plan)) for plan in plans)
    expected = [estimate_memory(plan) for plan in plans]
    more = expected[1].total - expected[0].total
    assert long - short == pytest.approx(more, rel=0.1)
