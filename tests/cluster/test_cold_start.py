"""The whole Ray cluster is lost: on the next one a run goes on from the memory of the machine."""

import contextlib
import json
import math
import os
import random
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from commands import Bench, Command, Ended, events, final_tensors, lines, reached, wait_until
from heads import Head
from test_nodes import Cluster

from rayfold.cluster import session
from rayfold.cluster.coldstart import Former
from rayfold.cluster.ledger import Ledger
from rayfold.faulttol.header import HEADER_BYTES
from rayfold.faulttol.image import inspect
from rayfold.runtime.config import RunConfig, check_config

STEPS = 100
SLOW = ("model.pause_s=0.05",)  # so that a run is still at work when its processes have ended
LLAMA = ("model.dim=128", "model.kv_heads=2", "data.seq_len=512")  # slow enough as well
ALL_GONE_S = 60.0  # a raylet takes its workers along within two seconds, on a busy machine within ten
RECONNECT_S = 3  # how long raylets and workers try to reach a GCS that is gone; Ray's default is a minute
SHARED_MEMORY = Path("/dev/shm")


class Heads:
    """A cluster that is up, as often as one is needed; the one before is killed."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._number, self._head = folder, 0, None

    def up(self) -> Head:
        """The one that is alive, or a new one."""
        if self._head is None:
            self._number += 1
            (folder := self._folder / f"head{self._number}").mkdir()
            self._head = Head(folder, RAY_gcs_rpc_server_reconnect_timeout_s=str(RECONNECT_S))
        return self._head

    def lose(self, *titles: str) -> None:
        """Kill it as when its power fails, or only what is named; waits until nothing of it acts."""
        head, self._head = self.up(), None
        head.kill(*(titles or ("gcs_server", "raylet/raylet")))
        wait_until(lambda: not head.workers(), ALL_GONE_S, "the end of the run's processes")
        head.close()

    def close(self) -> None:
        if self._head is not None:
            self._head.close()


@pytest.fixture(scope="module")
def heads(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Heads]:
    """One for all tests here, as each test leaves a whole one to the next."""
    made = Heads(tmp_path_factory.mktemp("heads"))
    yield made
    made.close()


def start(bench: Bench, heads: Heads, config: Path, run_dir: Path, *options: str) -> Command:
    """The command of these tests; it has no checkpoint before its end."""
    bench.env |= {"RAY_AUTH_MODE": "disabled", "RAY_gcs_rpc_server_reconnect_timeout_s": str(RECONNECT_S)}
    fixed = (f"run.address={heads.up().address}", f"run.dir={run_dir}", f"run.steps={STEPS}")
    return bench.start("train", config, *fixed, "checkpoint.every=0", "run.start_timeout_s=200", *options)


def ends_well(command: Command) -> Ended:
    ended = command.wait()
    assert ended.status == 0, ended.err
    return ended


def lose(heads: Heads, command: Command, *titles: str) -> None:
    """Lose the cluster and the command that looked on."""
    command.kill()
    heads.lose(*titles)
    command.wait(10)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """What a run of such options comes to when nothing happens; of one cluster's bench and configuration."""
    made: dict[tuple[str, ...], Path] = {}

    def run_of(bench: Bench, heads: Heads, config: Path, *options: str) -> Path:
        if options not in made:
            folder = tmp_path_factory.mktemp("undisturbed")
            ends_well(start(bench, heads, config, folder, "snapshot.enabled=false", *options))
            made[options] = folder
        return made[options]

    return run_of


def images(run_dir: Path) -> list[Path]:
    """The files that the run, and those before it, have left in memory."""
    runs = json.loads((run_dir / ".controller.json").read_text())["values"]["memory"]["runs"]
    return sorted(path for run in runs for path in (SHARED_MEMORY / f"{run}-state").glob("*/rank-*"))


def flip(path: Path, at: int) -> None:
    """Change one bit."""
    with open(path, "r+b") as file:
        file.seek(at)
        byte = file.read(1)
        file.seek(at)
        file.write(bytes([byte[0] ^ 1]))


def told(run_dir: Path) -> dict[int, list[Any]]:
    """What the record says of each step, without times."""
    keys = ("loss", "grad_norm", "tokens")
    return {line["step"]: [line[key] for key in keys] for line in lines(run_dir / "metrics.jsonl")}


def check_whole(run_dir: Path, undisturbed: Path, *, restarts: int = 1) -> None:
    """Every step told, those trained again marked, every sample once, the same parameters to the bit."""
    found = lines(run_dir / "metrics.jsonl")
    assert [line["step"] for line in found if "attempt" not in line] == list(range(1, STEPS + 1))
    summary = json.loads((run_dir / "summary.json").read_text())
    assert (summary["status"], summary["restarts"]) == ("finished", restarts)
    assert summary["lost_steps"] == len(found) - STEPS
    # the cursor of samples is part of the progress: none was left out, none came twice
    assert final_tensors(run_dir) == final_tensors(undisturbed)
    assert told(run_dir) == told(undisturbed)


def check_from_memory(run_dir: Path, *, most_lost: int = 1, source: str = "memory") -> dict[str, Any]:
    """Its last start was one from memory."""
    restored = events(run_dir, "restored")[-1]
    assert restored["source"] == source
    assert 0 <= restored["lost_steps"] <= most_lost
    return restored


@pytest.mark.ray
@pytest.mark.timeout(600)  # two clusters and three runs, on a machine that may be busy
def test_a_run_whose_cluster_is_killed_goes_on_from_memory_on_the_next(
    bench: Bench, heads: Heads, paced: Path, run_dir: Path, undisturbed: Callable[..., Path]
) -> None:
    """`kill -9` of the head: nothing but the files in memory is left, and at most one step is lost."""
    reference = undisturbed(bench, heads, paced)
    command = start(bench, heads, paced, run_dir, *SLOW)
    reached(run_dir, 12)
    lose(heads, command)
    assert len(images(run_dir)) == 8, "an arena and three slots of each of two ranks"
    ends_well(start(bench, heads, paced, run_dir, *SLOW))
    assert check_from_memory(run_dir)["from_step"] >= 12
    check_whole(run_dir, reference)
    assert heads.up().workers() == []


@pytest.mark.ray
@pytest.mark.campaign
@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", range(20))
def test_wherever_the_run_was_when_its_cluster_was_lost(
    bench: Bench, heads: Heads, small: Path, run_dir: Path, undisturbed: Callable[..., Path], seed: int
) -> None:
    """With the GCS alone, whose loss the raylets notice later, or all of it; on layouts with all axes."""
    choose = random.Random(seed)
    layouts = (("parallel.dp_shard=2",), ("parallel.tp=2",), ("parallel.pp=2",), ("parallel.dp_replicate=2",))
    options = (*LLAMA, *layouts[seed % len(layouts)])
    reference = undisturbed(bench, heads, small, *options)
    command = start(bench, heads, small, run_dir, *options)
    reached(run_dir, choose.randrange(3, 20))
    time.sleep(choose.uniform(0, 0.3))
    lose(heads, command, *(("gcs_server",) if choose.random() < 0.5 else ()))
    ended = bool(events(run_dir, "run_finished"))
    ends_well(start(bench, heads, small, run_dir, *options))
    assert not ended, "a test of nothing: the run was too quick"
    check_from_memory(run_dir)
    check_whole(run_dir, reference)


@pytest.mark.ray
@pytest.mark.campaign
@pytest.mark.timeout(600)
def test_a_flipped_bit_is_noticed_and_the_step_before_is_taken(
    bench: Bench, heads: Heads, paced: Path, run_dir: Path, undisturbed: Callable[..., Path]
) -> None:
    """In what is verified: the newest slot of a rank; and the headers of arenas, which are refused then."""
    reference = undisturbed(bench, heads, paced)
    command = start(bench, heads, paced, run_dir, *SLOW)
    reached(run_dir, 12)
    lose(heads, command)
    slots = [path for path in images(run_dir) if "rank-00000.slot" in path.name]
    found = {info.step: path for path in slots if (info := inspect(path)) and info.usable}
    flip(found[max(found)], HEADER_BYTES + 100)
    for path in images(run_dir):
        if path.suffix == ".arena":
            flip(path, 40)
    ends_well(start(bench, heads, paced, run_dir, *SLOW))
    assert check_from_memory(run_dir, most_lost=2)["from_step"] < max(found)
    check_whole(run_dir, reference)


@pytest.mark.ray
@pytest.mark.campaign
@pytest.mark.timeout(600)
def test_without_the_images_of_a_rank_the_run_goes_on_from_disk(
    bench: Bench, heads: Heads, paced: Path, run_dir: Path, undisturbed: Callable[..., Path]
) -> None:
    """Half a state is none."""
    reference = undisturbed(bench, heads, paced)
    command = start(bench, heads, paced, run_dir, *SLOW, "checkpoint.every=10")
    reached(run_dir, 12)
    wait_until(lambda: events(run_dir, "checkpoint"), 60, "a checkpoint")
    lose(heads, command)
    for path in images(run_dir):
        if "rank-00001" in path.name:
            path.unlink()
    ends_well(start(bench, heads, paced, run_dir, *SLOW, "checkpoint.every=10"))
    (restored,) = events(run_dir, "restored")
    assert restored["source"] == "disk"
    assert restored["from_step"] % 10 == 0
    check_whole(run_dir, reference)


@pytest.mark.ray
@pytest.mark.campaign
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("before", "after"),
    [
        (("run.workers=2", "parallel.dp_shard=2"), ("run.workers=1", "parallel.dp_shard=1")),
        (("run.workers=1", "parallel.dp_shard=1"), ("run.workers=2", "parallel.tp=2")),
        (("run.workers=2", "parallel.pp=2"), ("run.workers=4", "parallel.dp_shard=4")),
    ],
)
def test_it_goes_on_under_another_layout(
    bench: Bench,
    heads: Heads,
    small: Path,
    run_dir: Path,
    undisturbed: Callable[..., Path],
    before: tuple[str, ...],
    after: tuple[str, ...],
) -> None:
    """The machine may have fewer processors than before, or more; images are boxes of whole tensors."""
    reference = told(undisturbed(bench, heads, small, *LLAMA, *before))
    command = start(bench, heads, small, run_dir, *LLAMA, *before)
    reached(run_dir, 8)
    lose(heads, command)
    ends_well(start(bench, heads, small, run_dir, *LLAMA, *after))
    at = check_from_memory(run_dir)["from_step"]
    found = told(run_dir)
    assert sorted(found) == list(range(1, STEPS + 1))
    for step, (loss, _, tokens) in found.items():
        assert tokens == reference[step][2], "every sample once"
        # the same state and sums of another order, which this learning rate makes more of at every step
        assert step > at + 5 or math.isclose(loss, reference[step][0], rel_tol=1e-5)


@pytest.mark.ray
@pytest.mark.campaign
@pytest.mark.timeout(600)
def test_a_run_that_is_lost_again_as_it_goes_on_does_so_from_memory_again(
    bench: Bench, heads: Heads, paced: Path, run_dir: Path, undisturbed: Callable[..., Path]
) -> None:
    """The third run finds what the second had of the first, whether it had trained since or not."""
    reference = undisturbed(bench, heads, paced)
    command = start(bench, heads, paced, run_dir, *SLOW)
    reached(run_dir, 12)
    lose(heads, command)
    command = start(bench, heads, paced, run_dir, *SLOW)
    wait_until(lambda: events(run_dir, "restored"), 100, "the second run's start")
    lose(heads, command)
    command = start(bench, heads, paced, run_dir, *SLOW)
    wait_until(lambda: len(events(run_dir, "run_started")) == 3, 100, "the third run")
    lose(heads, command)  # before its ranks are there
    ends_well(start(bench, heads, paced, run_dir, *SLOW))
    check_from_memory(run_dir)
    check_whole(run_dir, reference, restarts=3)


@pytest.mark.ray
@pytest.mark.campaign
@pytest.mark.timeout(600)
@pytest.mark.parametrize("change", ["model.pause_s=0.01", "snapshot.enabled=false"])
def test_memory_that_is_of_no_use_is_given_back_at_once(
    bench: Bench, heads: Heads, paced: Path, run_dir: Path, change: str
) -> None:
    """Of another model, or for a run that keeps nothing in memory; there is nothing on disk."""
    command = start(bench, heads, paced, run_dir, *SLOW)
    reached(run_dir, 12)
    lose(heads, command)
    left = images(run_dir)
    command = start(bench, heads, paced, run_dir, *SLOW, change)
    wait_until(lambda: len(events(run_dir, "formed")) == 2, 100, "the ranks")
    assert not any(path.exists() for path in left)
    (message,) = [event["message"] for event in events(run_dir, "snapshot") if "message" in event]
    assert change.partition("=")[0] in message
    ends_well(command)
    assert {event["source"] for event in events(run_dir, "restored")} <= {"start"}


@pytest.mark.ray
@pytest.mark.campaign
@pytest.mark.timeout(600)
def test_an_embedded_session_goes_on_too(
    bench: Bench, heads: Heads, paced: Path, run_dir: Path, undisturbed: Callable[..., Path]
) -> None:
    """While the cluster is away its run may go on without it."""
    reference = undisturbed(bench, heads, paced)
    command = start(bench, heads, paced, run_dir, *SLOW)
    reached(run_dir, 12)
    lose(heads, command)
    options = (f"run.dir={run_dir}", f"run.steps={STEPS}", "checkpoint.every=0", *SLOW)
    del bench.env["RAY_AUTH_MODE"]
    ends_well(bench.start("train", paced, *options))
    check_from_memory(run_dir)
    check_whole(run_dir, reference)


@pytest.mark.ray
@pytest.mark.campaign
@pytest.mark.timeout(600)
def test_a_run_that_was_ended_at_once_may_be_started_again_at_once(
    bench: Bench, heads: Heads, paced: Path, run_dir: Path, undisturbed: Callable[..., Path]
) -> None:
    """Its vaults and ranks are still there then, and about to remove the memory and themselves."""
    reference = undisturbed(bench, heads, paced)
    command = start(bench, heads, paced, run_dir, *SLOW)
    reached(run_dir, 12)
    command.process.send_signal(signal.SIGTERM)
    wait_until(lambda: "stopping after this step" in command.shown(), 10, "the answer to SIGTERM")
    command.process.send_signal(signal.SIGTERM)
    command.wait(30)
    ends_well(start(bench, heads, paced, run_dir, *SLOW))
    check_whole(run_dir, reference)
    wait_until(lambda: not heads.up().workers(), 30, "the end of the run's processes")


class Patient(Cluster):
    """Nodes that wait for a head that is gone: what is on them lives on, and belongs to nobody."""

    def kill_head(self) -> None:
        """`kill -9` of all that is on the first node."""
        for pid in (*self._bench.pids("gcs_server"), *self.processes(0)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def _start(self, number: int, *options: str) -> None:
        self.env["RAY_gcs_rpc_server_reconnect_timeout_s"] = "600"
        super()._start(number, *options)


@pytest.mark.ray
@pytest.mark.campaign
@pytest.mark.timeout(900)
def test_ranks_that_outlive_their_head_are_ended_before_their_memory_is_read(
    bench: Bench, small: Path, run_dir: Path, tmp_path: Path
) -> None:
    """The machine of the head is lost with the controller and a rank; another node does not know yet."""
    options = (*LLAMA, "parallel.dp_shard=2", "checkpoint.every=0", f"run.steps={STEPS}")
    options += ("run.start_timeout_s=200", "run.collective_timeout_s=300")
    bench.env["RAY_AUTH_MODE"] = "disabled"
    (tmp_path / "first").mkdir()
    (tmp_path / "second").mkdir()
    first = Patient(tmp_path / "first", 2)
    try:
        command = bench.start("train", small, f"run.address={first.address}", *options)
        reached(run_dir, 12)
        (formed,) = events(run_dir, "formed")
        (orphan,) = [pid for pid in formed["pids"] if first.node_of(pid) == 1]
        (vault,) = first.vaults(1)
        first.kill_head()
        command.kill()
        assert {orphan, vault} <= set(first.workers()), "a test of nothing"
        second = Patient(tmp_path / "second", 2)
        try:
            ends_well(bench.start("train", small, f"run.address={second.address}", *options))
        finally:
            second.close()
        assert orphan not in first.workers()
        check_from_memory(run_dir, source="peer")  # one of the two vaults on this machine has taken it all
        steps = [line["step"] for line in lines(run_dir / "metrics.jsonl") if "attempt" not in line]
        assert steps == list(range(1, STEPS + 1))
        wait_until(lambda: vault not in first.workers(), 150, "the end of the first vault")
    finally:
        first.close()


def test_a_head_is_lost_when_nobody_has_listened_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that keeps its state elsewhere is back within seconds; who looked seldom begins to wait then."""
    monkeypatch.setattr(session, "HEAD_LOOK_S", 0.05)
    monkeypatch.setattr(session, "HEAD_LOST_S", 1.0)
    listening = socket.create_server(("127.0.0.1", 0))
    address = "{}:{}".format(*listening.getsockname())
    head = session.JoinedHead(address)

    def looks(seconds: float) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            time.sleep(0.06)
            head.check()

    looks(0.3)
    listening.close()
    looks(0.2)
    with socket.create_server(("127.0.0.1", int(address.rpartition(":")[2]))):
        looks(0.3)
    looks(0.2)
    time.sleep(1.2)
    looks(0.2)
    with pytest.raises(session.SessionLost, match=address):
        looks(5.0)


def config_of(**model: Any) -> RunConfig:
    values = {"model": {"family": "llama", **model}, "data": {"source": "somewhere"}}
    return check_config(values)


def test_what_the_ledger_says_of_earlier_runs(tmp_path: Path) -> None:
    """Names of their memory, and epochs above theirs; nothing of one that came to its end, nor of one that a
    folder is a copy of.
    """
    path, config = tmp_path / "ledger.json", config_of()
    mine = Ledger(path, owner="me")
    assert Former.found_in(mine, config) == Former()
    memory = {"runs": ["second", "first"], "plan": config.to_dict(), "other": "", "epoch": 7, "before": 4}
    memory |= {"folder": os.path.abspath(config.run_dir)}
    Ledger(path, owner="it").write({"state": "running", "memory": memory})
    assert Former.found_in(mine, config) == Former(runs=("second", "first"), epoch=8)
    Ledger(path, owner="it").write({"state": "finished", "memory": memory})
    assert Former.found_in(mine, config) == Former(runs=("first",), epoch=8)
    Ledger(path, owner="it").write({"state": "finished", "memory": memory | {"runs": ["second"]}})
    assert Former.found_in(mine, config) == Former()
    Ledger(path, owner="it").write({"state": "running", "memory": memory | {"folder": "/elsewhere"}})
    assert Former.found_in(mine, config) == Former()
    mine.write({"state": "running", "memory": memory})
    assert Former.found_in(mine, config) == Former(runs=("first",), epoch=4)
    Ledger(path, owner="it").write({"state": "running", "memory": memory})
    other = Former.found_in(mine, config_of(dim=64)).other
    assert "model.dim was" in other
    assert "is 64 here" in other
    path.write_text(path.read_text().replace('"epoch": 7', '"epoch": 9'))
    assert Former.found_in(mine, config) == Former(), "it cannot be trusted"
