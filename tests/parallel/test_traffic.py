"""What a step sends, counted, is what the formula says, to the byte."""

from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
from alike import SHAPE, Case, global_batch, rows_of
from counted import Counted, by_group
from harness import run_ranks

from rayfold.models.llama import Llama
from rayfold.parallel.layout import Layout
from rayfold.parallel.mesh import make_mesh
from rayfold.parallel.parallelize import Workings, parallelize
from rayfold.parallel.traffic import Passes, bytes_by_axis, stages_of
from rayfold.runtime.optim.adamw import ShardedAdamW
from rayfold.runtime.step import train_step

# even sizes: on uneven ones ranks send a little less than the first does
CASE = Case(shape=replace(SHAPE, ffn_dim=64, vocab_size=104), steps=2)


def layout(**sizes: Any) -> Layout:
    return Layout(**{"dp_replicate": 1, "dp_shard": 1, **sizes})


LAYOUTS = [
    layout(dp_shard=2),
    layout(dp_replicate=2),
    layout(dp_replicate=2, dp_shard=2),
    layout(tp=2),
    layout(cp=2),
    layout(cp=2, context="ulysses"),
    layout(pp=2),
    layout(pp=2, schedule="zbv"),
    layout(tp=2, cp=2),
    layout(tp=2, pp=2, schedule="interleaved_1f1b"),
    layout(dp_shard=2, pp=2),
]


@pytest.mark.parametrize(
    ("layout", "compute"),
    [
        *((each, "fp32") for each in LAYOUTS),
        (LAYOUTS[3], "bf16"),
        (LAYOUTS[4], "bf16"),
        (LAYOUTS[10], "bf16"),
    ],
    ids=str,
)
def test_a_step_sends_what_the_formula_says(layout: Layout, compute: Literal["fp32", "bf16"]) -> None:
    """Byte for byte on every rank and group: a reduction too many, or too early, shows here at once."""
    case = replace(CASE, compute=compute)

    def on_rank() -> tuple[dict[str, float], dict[str, float]]:
        mesh = make_mesh(layout, torch.device("cpu"))
        workings = Workings(compute=compute)
        model = parallelize(lambda: Llama(case.shape), mesh, seed=case.seed, workings=workings)
        optimizer = ShardedAdamW(model, case.optim)
        part = case.rows // layout.dp_size
        first = mesh.data.rank * part
        for number in range(case.steps):  # the first step also makes connections
            batch = global_batch(case, number)
            micro = [rows_of(batch, slice(row, row + 1)) for row in range(first, first + part)]
            with Counted() as counted:
                train_step(model, optimizer, micro, lr=case.lr, clip_norm=case.clip_norm)
        passes = Passes(
            microbatches=part,
            rows=1,
            seq_len=case.seq_len,
            width=case.shape.dim,
            heads=case.shape.heads,
            kv_heads=case.shape.kv_heads,
            head_dim=case.shape.head_dim,
            bytes_per_number=2 if compute == "bf16" else 4,
        )
        sent = {group: size for group, size in counted.sent.items() if size}
        return sent, by_group(mesh, bytes_by_axis(layout, passes, stages_of(model)))

    for rank, (sent, expected) in enumerate(run_ranks(layout.world_size, on_rank)):
        assert sent == pytest.approx(expected, abs=1), f"rank {rank}"
