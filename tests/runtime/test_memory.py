"""The memory estimate against the real thing: bytes that autograd holds, and tensors that the state has."""

import dataclasses
import re
from pathlib import Path

import pytest
import torch
from harness import run_ranks
from training import small_config, write_corpus

from rayfold.faulttol.config import SnapshotConfig
from rayfold.kernels.flashmask.kinds import packed
from rayfold.models.registry import build_model
from rayfold.parallel.mesh import make_mesh
from rayfold.parallel.parallelize import parallelize
from rayfold.parallel.recompute import apply_recompute
from rayfold.parallel.shard import blocks_of
from rayfold.runtime.data.loader import Batch
from rayfold.runtime.memory import estimate_memory, saved_bytes
from rayfold.runtime.optim.adamw import ShardedAdamW
from rayfold.runtime.part import local_of
from rayfold.runtime.plan import RunPlan, make_run_plan

ROWS, SEQ_LEN = 3, 40


def make_plan(source: Path, *overrides: str) -> RunPlan:
    given = (f"data.seq_len={SEQ_LEN}", f"batch.micro_size={ROWS}", "batch.size=12", *overrides)
    return make_run_plan(small_config(source / "run", source, *given), cpus=4, gpus=0)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.mark.parametrize("compute", ["fp32", "bf16"])
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_activations_are_what_a_real_forward_keeps(source: Path, recompute: str, compute: str) -> None:
    """The pretended step must see what the real one holds, or `--dry-run` promises too much."""
    plan = make_plan(
        source, "run.workers=1", f"parallel.recompute={recompute}", f"precision.compute={compute}"
    )
    model = build_model("llama", plan.config.model, vocab_size=257)  # type: ignore[arg-type]
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    if compute == "bf16":
        model.to(torch.bfloat16)
    apply_recompute(blocks_of(model), recompute)  # type: ignore[arg-type]
    tokens = torch.randint(0, 257, (ROWS, SEQ_LEN))
    batch = Batch(
        tokens=tokens,
        labels=tokens.clone(),
        positions=torch.arange(SEQ_LEN).expand(ROWS, SEQ_LEN),
        document_ids=torch.zeros(ROWS, SEQ_LEN, dtype=torch.int32),
        sample_ids=(0, 1, 2),
    )
    kept = sum(saved_bytes(model, batch, recompute=recompute))
    # pretended documents have no borders, so there is no list of tiles, some integers that all blocks share
    kept -= packed(batch.document_ids).plan.nbytes if recompute == "none" else 0
    assert estimate_memory(plan).activations == kept


def test_recompute_orders_the_estimates(source: Path) -> None:
    """Each mode keeps less than the one before; bf16 keeps less than fp32."""
    sizes = [
        estimate_memory(make_plan(source, "run.workers=1", f"parallel.recompute={mode}")).activations
        for mode in ("none", "selective", "full")
    ]
    assert sizes[0] > sizes[1] > sizes[2]
    bf16 = estimate_memory(make_plan(source, "run.workers=1", "precision.compute=bf16")).activations
    assert bf16 < sizes[0]


@pytest.mark.parametrize(("replicate", "shard"), [(1, 1), (1, 2), (2, 1), (1, 4), (2, 2)])
def test_the_state_of_a_rank_is_what_is_said(source: Path, replicate: int, shard: int) -> None:
    """Parameters and moments of a rank, to within a row of each tensor that does not divide evenly."""
    axes = (f"parallel.dp_replicate={replicate}", f"parallel.dp_shard={shard}", "model.ffn_dim=48")
    plan = make_plan(source, f"run.workers={replicate * shard}", *axes)

    def on_rank() -> tuple[int, int, int]:
        mesh = make_mesh(plan.layout, torch.device("cpu"))
        model = parallelize(
            lambda: build_model("llama", plan.config.model, vocab_size=256),  # type: ignore[arg-type]
            mesh,
            seed=0,
        )
        optimizer = ShardedAdamW(model, plan.config.optim)
        parameters = sum(local_of(held.parameter).numel() * 4 for held in model.held)
        moments = sum(part.tensor.numel() * 4 for part in optimizer.parts())
        row = max(held.parameter.numel() // held.shape[0] * 4 for held in model.held)
        return parameters, moments, row * len(model.held)

    estimate = estimate_memory(plan)
    for parameters, moments, slack in run_ranks(replicate * shard, on_rank):
        # the model of the estimate has the tokenizer's 257 rows, one more than divides
        assert 0 <= estimate.parameters - parameters <= slack
        assert moments == 2 * parameters
        assert estimate.gradients == estimate.parameters
        assert estimate.optimizer == 2 * estimate.parameters
    parts = dataclasses.asdict(estimate)
    assert estimate.total == sum(parts.values())
    assert estimate.as_dict() == {**parts, "total": estimate.total}


def test_snapshots_are_part_of_the_estimate(source: Path) -> None:
    """Copies in shared memory are memory; a node that has too little is told what would do."""
    plan = make_plan(source, "run.workers=2", "snapshot.slots=3")
    estimate = estimate_memory(plan)
    assert estimate.snapshots == 3 * estimate.state == 3 * (estimate.parameters + estimate.optimizer)
    assert estimate_memory(make_plan(source, "run.workers=2", "snapshot.enabled=false")).snapshots == 0


def test_a_node_without_room_is_told_what_would_do() -> None:
    """The remedy must be one: with it there is room."""
    config = SnapshotConfig(slots=2, memory_share=0.25)
    node = {"state_bytes": 100 << 20, "ranks": 4, "arena": True}
    assert config.why_no_room(**node, memory_bytes=8 << 30, shm_bytes=2 << 30) is None
    reason = config.why_no_room(**node, memory_bytes=2 << 30, shm_bytes=2 << 30)
    assert reason is not None
    share = re.search(r"memory_share above ([0-9.]+)", reason)
    assert share is not None
    raised = SnapshotConfig(slots=2, memory_share=float(share[1]) + 0.01)
    assert raised.why_no_room(**node, memory_bytes=2 << 30, shm_bytes=2 << 30) is None
    small_shm = config.why_no_room(**node, memory_bytes=8 << 30, shm_bytes=64 << 20)
    assert small_shm is not None
    assert "--shm-size" in small_shm
