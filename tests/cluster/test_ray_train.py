"""A run inside Ray Train: the numbers of `rayfold train`, a lost worker that costs no finished step, and
nothing left behind.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
from commands import Bench, Command, Ended, events, final_tensors, lines, reached, wait_until

pytest.importorskip("pandas", reason="needs pip install 'rayfold[train]'")

from ray.train import Checkpoint

from rayfold.cluster.train import (
    CheckpointLost,
    Durable,
    durable_checkpoint,
    loop_config,
    train_loop,
)
from rayfold.cluster.train_pointer import pointed_step, write_pointer
from rayfold.cluster.train_rank import next_epoch, plan_for
from rayfold.cluster.train_report import Figures
from rayfold.cluster.train_vault import Writers
from rayfold.runtime.config import ConfigError, check_config
from rayfold.runtime.journal import Journal

STEPS = 60  # some seconds, so that there is a middle
GONE_S = 20.0  # half a second for the vault, some more for a Ray that dies, on a machine that may be busy
EXAMPLES = Path(__file__).parents[2] / "examples"
FIT = """
import json, sys

import ray
from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
from ray.train.torch import TorchTrainer
from rayfold.cluster.train import durable_checkpoint, loop_config, train_loop

storage, max_failures, config, *overrides = sys.argv[1:]
ray.init(address="local", num_cpus=2, include_dashboard=False, object_store_memory=100_000_000)
trainer = TorchTrainer(
    train_loop,
    train_loop_config=loop_config(config, *overrides),
    scaling_config=ScalingConfig(num_workers=2),
    run_config=RunConfig(storage_path=storage, failure_config=FailureConfig(max_failures=int(max_failures))),
)
try:
    result = trainer.fit()
except TrainingFailedError as error:
    sys.exit(f"fit raised {type(error).__name__}: {error}")
durable = durable_checkpoint(result.checkpoint)
told = {"metrics": result.metrics, "summary": result.return_value, "step": durable.step}
print(json.dumps({**told, "folder": str(durable.folder)}))
"""


@pytest.fixture
def start(driver: Callable[..., Command], bench: Bench) -> Callable[..., Command]:
    """Starts a program whose Ray Train looks after its workers often."""
    bench.env["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = "0.5"
    return driver


@pytest.fixture
def fit(start: Callable[..., Command], tmp_path: Path) -> Callable[..., Command]:
    """Starts a program that calls `fit()` and tells the result."""
    path = tmp_path / "fit.py"
    path.write_text(FIT)

    def called(config: Path, *overrides: str, max_failures: int = 1) -> Command:
        return start(path, tmp_path / "storage", str(max_failures), config, *overrides)

    return called


def numbers(run_dir: Path) -> dict[int, tuple[float, ...]]:
    """What each step came to when it was trained last."""
    keys = ("loss", "grad_norm", "tokens", "lr")
    return {line["step"]: tuple(line[key] for key in keys) for line in lines(run_dir / "metrics.jsonl")}


def finished(command: Command) -> Ended:
    """Its end, which must be a good one."""
    ended = command.wait()
    assert ended.status == 0, ended.err[-4000:]
    return ended


def memory() -> list[str]:
    """What runs inside Ray Train hold in shared memory on this machine."""
    return [name for name in os.listdir("/dev/shm") if name.startswith("rayfold-train-")]


@pytest.mark.ray
@pytest.mark.timeout(600)  # two runs, one of which Ray Train starts twice
def test_the_example_loses_a_worker_and_no_finished_step_and_no_bit(
    bench: Bench, start: Callable[..., Command], text: Path, run_dir: Path, tmp_path: Path
) -> None:
    """On less data: all workers are started anew and go on from memory, and the numbers are those of
    `rayfold train`.
    """
    fewer = (f"data.source={text}", "data.seq_len=64", "batch.size=4", "run.eval_every=0")
    fixed = (*fewer, f"run.steps={STEPS}", "checkpoint.every=0")
    command = start(EXAMPLES / "ray_train.py", f"run.dir={run_dir}", *fixed)
    reached(run_dir, 5)
    os.kill(events(run_dir, "formed")[0]["pids"][1], signal.SIGKILL)
    told = finished(command).out
    assert memory() == [], "given back before fit returns"

    (restored,) = events(run_dir, "restored")
    assert restored["source"] == "memory"
    assert restored["lost_steps"] <= 1
    assert [event["epoch"] for event in events(run_dir, "formed")] == [1, 2]
    summary = json.loads((run_dir / "summary.json").read_text())
    assert (summary["restarts"], summary["lost_steps"]) == (1, restored["lost_steps"])
    loss = lines(run_dir / "metrics.jsonl")[-1]["loss"]
    assert f"loss {loss:.4f} at step {STEPS}\n" in told
    assert f"checkpoint of step {STEPS}: {run_dir}/checkpoints/step-{STEPS:08d}\n" in told
    held = [path for path in (tmp_path / "runs/ray_train").rglob("*") if path.is_file()]
    assert "rayfold.json" in {path.name for path in held}
    assert sum(path.stat().st_size for path in held) < 100_000, "Ray Train holds a pointer and not a copy"

    plain = tmp_path / "plain"
    ended = bench.run("train", EXAMPLES / "quickstart.toml", f"run.dir={plain}", *fixed)
    assert ended.status == 0, ended.err
    assert numbers(run_dir) == numbers(plain)
    assert final_tensors(run_dir) == final_tensors(plain)


@pytest.mark.ray
@pytest.mark.campaign
def test_a_run_goes_on_under_the_command_and_back_inside_ray_train(
    bench: Bench, fit: Callable[..., Command], small: Path, run_dir: Path
) -> None:
    """The run is its folder: who trains it, and on how many workers, may change."""
    told = finished(fit(small)).result
    assert told["summary"] == json.loads((run_dir / "summary.json").read_text())
    newest = lines(run_dir / "metrics.jsonl")[-1]
    assert {key: told["metrics"][key] for key in newest} == newest
    assert (told["step"], told["folder"]) == (8, str(run_dir / "checkpoints/step-00000008"))
    command = bench.run("train", small, "run.steps=10", "run.workers=1")
    assert command.status == 0, command.err
    told = finished(fit(small, "run.steps=12")).result
    assert [event["from_step"] for event in events(run_dir, "restored")] == [8, 10]
    assert [line["step"] for line in lines(run_dir / "metrics.jsonl")] == list(range(1, 13))
    assert (told["step"], told["metrics"]["step"]) == (12, 12)
    assert finished(fit(small, "run.steps=12")).result["step"] == 12, "nothing to do is well done"


@pytest.mark.ray
@pytest.mark.campaign
def test_a_run_that_ray_train_gives_up_leaves_no_memory(
    fit: Callable[..., Command], paced: Path, run_dir: Path
) -> None:
    """A bug of the user's on one rank: `fit` raises it with its place, and the driver ends at once after."""
    command = fit(paced, "model.trouble=raise", "model.rank=1", "model.step=3", max_failures=0)
    reached(run_dir, 2)
    assert len(memory()) == 1
    ended = command.wait()
    assert ended.status == 1
    assert "fit raised WorkerGroupError" in ended.err
    assert "the flux capacitor is empty" in ended.err
    wait_until(lambda: not memory(), GONE_S, "the end of the run's memory")


@pytest.mark.ray
@pytest.mark.campaign
def test_a_killed_driver_leaves_no_memory(
    bench: Bench, fit: Callable[..., Command], paced: Path, run_dir: Path
) -> None:
    """Its Ray dies with it, and with that the actor that keeps the memory: the reaper has the last word."""
    command = fit(paced, "model.pause_s=0.1", "run.steps=1000")
    reached(run_dir, 3)
    assert len(memory()) == 1
    command.kill()
    command.wait()
    wait_until(lambda: not memory(), GONE_S, "the end of the run's memory")
    ours = ("RayTrainWorker", "TrainVault", "reaper.py")
    left = lambda: [pid for title in ours for pid in bench.pids(title)]  # noqa: E731
    wait_until(lambda: not left(), GONE_S, "the end of the run's processes")
    for pid in bench.processes():  # an agent of Ray's may outlive its raylet
        os.kill(pid, signal.SIGKILL)


@pytest.mark.ray
@pytest.mark.campaign
def test_a_worker_killed_in_the_middle_of_a_later_start_is_made_up_for_too(
    fit: Callable[..., Command], paced: Path, run_dir: Path
) -> None:
    """Epoch after epoch: what the second group restored and trained on is there for the third. Beside the
    first, another is stopped, which answers nobody who would end it.
    """
    command = fit(paced, "model.pause_s=0.05", "run.steps=60", "checkpoint.every=0", max_failures=3)
    for epoch, step in ((1, 5), (2, 25)):
        reached(run_dir, step)
        formed = events(run_dir, "formed")[-1]
        assert formed["epoch"] == epoch
        if epoch == 1:
            os.kill(formed["pids"][0], signal.SIGSTOP)
        os.kill(formed["pids"][1], signal.SIGKILL)
    assert finished(command).result["summary"]["restarts"] == 2
    restored = events(run_dir, "restored")
    assert [event["source"] for event in restored] == ["memory", "memory"]
    assert all(event["lost_steps"] <= 1 for event in restored)
    assert sorted(numbers(run_dir)) == list(range(1, 61))


def test_what_does_not_fit_is_said_on_the_driver(small: Path) -> None:
    """A wrong key, and a number of workers that is not Ray Train's: found before or as the first thing."""
    config = loop_config(small)["config"]
    assert loop_config(config)["config"] == config, "a dict of sections is as good as a file"
    with pytest.raises(ConfigError, match="optim"):
        loop_config(small, "optim.lrr=1")
    with pytest.raises(ConfigError, match="loop_config"):
        train_loop({"config": str(small)})
    checked = check_config(config)
    with pytest.raises(ConfigError, match=r"run.workers = 2.*3 workers.*num_workers=2"):
        plan_for(checked, num_workers=3, device="cpu")
    with pytest.raises(ConfigError, match=r'"cpu".*"cuda".*use_gpu=False'):
        plan_for(checked, num_workers=2, device="cuda")
    auto = replace(checked, run=replace(checked.run, workers="auto"))
    assert plan_for(auto, num_workers=4, device="cpu").layout.world_size == 4


def test_without_ray_train_the_extra_is_named() -> None:
    """Ray itself is there, and says only what it misses."""
    code = "import sys; sys.modules['pandas'] = None; import rayfold.cluster.train"
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert "pip install 'rayfold[train]'" in ended.stderr.splitlines()[-1]


def test_a_pointer_leads_to_its_checkpoint_and_to_no_other(tmp_path: Path) -> None:
    """Ray Train's checkpoint outlives the run's: which one it meant must not be guessed."""
    stands = tmp_path / "run/checkpoints/step-00000004"
    stands.mkdir(parents=True)
    (stands / "index.json").write_text("{}")
    durable = Durable(tmp_path / "run", stands, 4)
    reported = tmp_path / "reported"
    reported.mkdir()
    write_pointer(reported, durable)
    checkpoint = Checkpoint.from_directory(reported)
    assert durable_checkpoint(checkpoint) == durable
    assert pointed_step(checkpoint) == 4
    (stands / "index.json").write_text("{ }")
    with pytest.raises(CheckpointLost, match="another checkpoint"):
        durable_checkpoint(checkpoint)
    shutil.rmtree(stands)
    with pytest.raises(CheckpointLost, match=r"checkpoint\.keep"):
        durable_checkpoint(checkpoint)
    with pytest.raises(CheckpointLost, match="did not report it"):
        durable_checkpoint(Checkpoint.from_directory(tmp_path))


def test_a_start_of_the_workers_is_counted_within_its_fit(tmp_path: Path) -> None:
    """An epoch that is counted twice would take an old process for one of the new group."""
    assert next_epoch(tmp_path, "a") == 1
    journal = Journal(tmp_path)
    for number in (2, 3):
        if number == 2:
            journal.event("run_started", 0, fit="a")
        journal.event("formed", 0, epoch=number - 1)
        assert next_epoch(tmp_path, "a") == number
        assert next_epoch(tmp_path, "b") == 1
    journal.event("run_finished", 5, status="finished")
    journal.close()
    assert next_epoch(tmp_path, "a") == 1


def test_nobody_of_an_epoch_before_is_left_when_a_new_one_has_joined() -> None:
    """A stopped process ends by no request, and would go on writing when it is continued."""
    writers = Writers()
    with ExitStack() as started:
        old, new = ([subprocess.Popen(["sleep", "60"]) for _ in range(2)] for _ in range(2))
        for process in (*old, *new):
            started.callback(process.wait)
            started.callback(process.kill)
        old[0].send_signal(signal.SIGSTOP)
        for epoch, processes in ((1, old), (2, new)):
            for process in processes:
                writers.join(epoch, process.pid)
        assert [process.wait(10) for process in old] == [-signal.SIGKILL] * 2
        assert [process.poll() for process in new] == [None, None]


def test_figures_of_a_step_are_told_with_the_newest_validation(tmp_path: Path) -> None:
    """A checkpoint is told when it is durable, some steps later, and still with its own loss."""
    journal = Journal(tmp_path)
    figures = Figures(journal, {})
    assert figures.of(None) == {}
    figures.metric({"step": 1, "loss": 3.0, "val_loss": 3.5})
    figures.metric({"step": 2, "loss": 2.0})
    assert figures.of(None) == {"step": 2, "loss": 2.0, "val_loss": 3.5}
    assert figures.of(1)["loss"] == 3.0
    assert figures.of(7)["step"] == 2
    journal.close()
    assert Figures(None, {"step": 4, "loss": 1.0}).of(None)["step"] == 4
