"""Every kind of fault that a campaign can inject, one after the other in one run, on each axis of a layout.

The seed draws their order, the rank of each and its moment. No step may be lost but by a torn update, no
sample be trained twice, and no bit of the end be another than without any fault.
"""

import json
import random
import signal
from pathlib import Path

import pytest
from commands import Bench, events, lines, wait_until
from test_chaos import LATE, campaign, check_as_if_nothing_had_happened, train_undisturbed

# A Llama that takes its time, so that a new spare is up before the steps are over.
SLOW_LLAMA = '''
"""A Llama of which each block of a training step takes a while."""
import time

from rayfold.models.llama import Llama
from rayfold.models.llama_config import LlamaShape


def build(vocab_size, kernels, pause_s):
    shape = LlamaShape(dim=32, layers=2, heads=2, kv_heads=2, ffn_dim=64, vocab_size=vocab_size)
    model = Llama(shape, kernels)
    for block in model.blocks:
        block.register_forward_pre_hook(lambda block, _: time.sleep(pause_s * block.training))
    return model
'''

LAYOUTS = {
    "dp_shard": ("parallel.dp_shard=2",),
    "tp": ("parallel.tp=2",),
    "pp": ("parallel.pp=2",),
}
KINDS = (
    "kill", "kill_in_update", "kill_in_copy", "kill_all", "kill_spare", "kill_vault", "kill_node",
    "kill_controller", "stop", "stale", "stuck", "exception", "oom", "preempt", "bit_flip", "truncate",
    "lose_slot", "flip_checkpoint", "truncate_checkpoint", "disk_full",
)  # fmt: skip
SPARES = 4  # as several start beside each other, and a fault takes two at most
CHECKPOINTS_EVERY = 50
ENDS_S = 600.0  # forty seconds on two idle cores


@pytest.fixture
def slow(small: Path) -> Path:
    """The small run with that model; how slow, `model.pause_s` says."""
    (small.parent / "slow_llama.py").write_text(SLOW_LLAMA)
    head, _, tail = small.read_text().partition("[model]")
    path = small.with_name("slow.toml")
    path.write_text(f'{head}[model]\nfamily = "slow_llama:build"\n\n{tail[tail.index("[data]") :]}')
    return path


def sections(layout: str, seed: int) -> list[str]:
    """All of them in the order of the seed, each as soon as the one before is made up for, and at last a kill
    in the midst of another one's recovery.
    """
    kinds = list(KINDS)
    random.Random(f"{layout} {seed}").shuffle(kinds)
    kinds += ["kill", "kill_in_recovery"]
    # there must be a checkpoint before the disk is full
    return [f'kind = "{kind}"\nat_step = {CHECKPOINTS_EVERY + 10 + i}' for i, kind in enumerate(kinds)]


@pytest.mark.ray
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("layout", "seed"),
    [
        pytest.param(layout, seed, marks=[] if seed == i else pytest.mark.campaign)
        for i, layout in enumerate(LAYOUTS)
        for seed in range(20)
    ],
)
def test_fault_after_fault_is_borne_and_the_run_ends_as_if_nothing_had_happened(
    bench: Bench,
    slow: Path,
    run_dir: Path,
    tmp_path_factory: pytest.TempPathFactory,
    layout: str,
    seed: int,
) -> None:
    """Each keeps its promise, with ranks of a data, a tensor and a pipeline axis."""
    planned = sections(layout, seed)
    options = (*LAYOUTS[layout], f"checkpoint.every={CHECKPOINTS_EVERY}")
    endless = ("run.steps=1000000", "model.pause_s=0.02", f"snapshot.spares={SPARES}", "--seed", str(seed))
    faults = campaign(bench.folder, *planned, spares=2)
    command = bench.start("chaos", faults, slow, *options, *endless)
    injected = lambda: {line.get("planned") for line in lines(run_dir / "chaos.jsonl")} - {None}  # noqa: E731
    ended = lambda: command.process.poll() is not None  # noqa: E731
    wait_until(lambda: len(injected()) == len(planned) or ended(), ENDS_S, "the last of the faults")
    wait_until(lambda: whole_again(run_dir) or ended(), ENDS_S, "the end of the last recovery")
    command.process.send_signal(signal.SIGTERM)
    err = command.wait().err
    report = json.loads((run_dir / "chaos.json").read_text())
    missed = [fault for fault in report["faults"] if fault["kept"] is None]
    assert (report["status"], missed) == ("stopped", []), err
    broken = {
        f"{fault['index']}: {fault['kind']}": problems
        for fault in report["faults"]
        if (problems := [p for p in fault["problems"] if not p.startswith(LATE)])
    }
    assert not broken
    assert {event["action"] for event in events(run_dir, "remedy")} == {"replace"}
    steps = lines(run_dir / "metrics.jsonl")[-1]["step"]
    alone = (*LAYOUTS[layout], f"run.steps={steps}", "checkpoint.every=0", "model.pause_s=0.0")
    undisturbed = train_undisturbed(tmp_path_factory.mktemp("undisturbed"), slow, *alone)
    check_as_if_nothing_had_happened(run_dir, undisturbed)


def whole_again(run_dir: Path) -> bool:
    """Whether ranks have trained since they formed last."""
    formed, step = events(run_dir, "formed")[-1], lines(run_dir / "metrics.jsonl")[-1]
    return bool(
        step["time_unix"] > formed["time_unix"] and events(run_dir, "verdict")[-1]["step"] < step["step"]
    )
