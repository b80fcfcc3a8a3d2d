"""Runs of `recovery.py` that are killed while they train: Rayfold's by its own campaigns, Ray Train's by us.

Both write a line when a step is done; how long a recovery took follows from those lines and the time of the
kill, by the wall clock of one machine. What Rayfold says of its own recoveries stands beside it.
"""

import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from figures import median
from plain_ray_train import STARTED, STEPS

from rayfold.cluster.reaper import MARK, end_session

HERE = Path(__file__).parent
CONFIG = HERE / "throughput.toml"
START_S = 180.0  # until the first step; a start takes 6 s, Ray Train's a minute on two busy cores
RECOVER_S = 300.0  # Ray Train took 70 s at worst
END_S = 90.0  # for a clean stop with its checkpoint
LOOK_EVERY_S = 0.1
PLAIN_STEPS_BEFORE = 8  # of Ray Train before the kill: its first checkpoint is behind it

Lines = list[dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Kill:
    """One kill and what came of it."""

    outside_s: float  # from the kill to the end of the next step
    lost_steps: int
    phases: dict[str, float] = field(default_factory=dict)  # as the run itself measured them
    action: str = ""
    source: str = ""


@dataclass(frozen=True, kw_only=True)
class Told:
    """What a run wrote down."""

    metrics: Lines
    events: Lines = field(default_factory=list)
    kills: Lines = field(default_factory=list)

    @property
    def step_s(self) -> float:
        """Median time of a step, the first few left out."""
        return median([line["step_time_s"] for line in self.metrics[3:]])

    def steps_within(self, seconds: float) -> int:
        """Steps that were done and stayed done in `seconds` from the first one on."""
        first = self.metrics[0]
        last = max(m["step"] for m in self.metrics if m["time_unix"] <= first["time_unix"] + seconds)
        return int(last - first["step"])

    def recoveries(self) -> list[Kill]:
        """One for each kill that was made up for before the next."""
        found = []
        times = [kill["time_unix"] for kill in self.kills] + [float("inf")]
        for since, end in itertools.pairwise(times):
            after = [event for event in self.events if since <= event["time_unix"] < end]
            restored = next((event for event in after if event["kind"] == "restored"), None)
            remedy = next((event for event in after if event["kind"] == "remedy"), {})
            formed = next((event for event in after if event["kind"] == "formed"), None)
            if restored is None or formed is None:
                continue
            # a step that was nearly done may have ended after the kill: it is not the answer
            step = next((m for m in self.metrics if m["time_unix"] >= formed["time_unix"]), None)
            if step is not None:
                found.append(
                    Kill(
                        outside_s=step["time_unix"] - since,
                        lost_steps=restored.get("lost_steps", 0),
                        phases={name: value for name, value in restored.items() if name.endswith("_s")},
                        action=remedy.get("action", ""),
                        source=restored["source"],
                    )
                )
        return found


def rayfold_run(
    settings: Sequence[str], *, every_s: float = 0.0, kills: int = 0, seconds: float = 0.0, seed: int = 0
) -> Told:
    """Train for `seconds` after the first step, with `kills` of drawn ranks `every_s` seconds."""
    folder = Path(tempfile.mkdtemp(prefix="rb-"))
    run = folder / "run"
    arguments = [str(CONFIG), f'run.dir="{run}"', "run.steps=1000000", "snapshot.every=1", *settings]
    command = ["train", *arguments, "--quiet"]
    if kills:
        campaign = folder / "kills.toml"
        campaign.write_text(f'[[fault]]\nkind = "kill"\nevery_s = {every_s}\ncount = {kills}\n')
        command = ["chaos", str(campaign), *arguments, "--quiet", "--seed", str(seed)]
    errors = folder / "errors.txt"
    command = [str(Path(sys.executable).with_name("rayfold")), *command]
    process = _start(command, {**os.environ, "TMPDIR": str(folder)}, errors)
    try:
        _wait(lambda: lines(run / "metrics.jsonl"), process, START_S, errors)
        began = lines(run / "metrics.jsonl")[0]["time_unix"]
        _wait(lambda: time.time() > began + seconds, process, seconds + RECOVER_S, errors)
        process.send_signal(signal.SIGINT)  # a clean stop
        process.wait(END_S)
        return Told(
            metrics=lines(run / "metrics.jsonl"),
            events=lines(run / "events.jsonl"),
            kills=[line for line in lines(run / "chaos.jsonl") if line.get("signal") == "SIGKILL"],
        )
    finally:
        if process.poll() is None:
            process.kill()  # what it started ends with it
            process.wait()
        shutil.rmtree(folder, ignore_errors=True)


def plain_run_killed(settings: Sequence[str], *, ranks: int, seed: int) -> tuple[Told, Kill]:
    """Train under Ray Train until one drawn worker has been killed and the next step is done."""
    rng = random.Random(seed)
    folder = Path(tempfile.mkdtemp(prefix="rb-"))
    paths = os.pathsep.join(filter(None, (str(HERE), os.environ.get("PYTHONPATH"))))
    env = {**os.environ, "TMPDIR": str(folder), "PYTHONPATH": paths, MARK: str(folder)}
    # the workers write into this folder by themselves; a cluster of one machine needs no token
    env |= {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
    errors = folder / "errors.txt"
    command = [sys.executable, str(HERE / "plain_ray_train.py"), str(CONFIG), "--folder", str(folder)]
    process = _start([*command, "--ranks", str(ranks), *settings], env, errors)
    steps, started = folder / STEPS, folder / STARTED
    try:
        wanted = PLAIN_STEPS_BEFORE + rng.randrange(5)
        _wait(lambda: len(lines(steps)) >= wanted, process, START_S, errors)
        pids = {line["rank"]: line["pid"] for line in lines(started)}
        at, last = time.time(), lines(steps)[-1]["step"]
        os.kill(pids[rng.randrange(ranks)], signal.SIGKILL)

        def after() -> Lines:
            begun = [line["time_unix"] for line in lines(started) if line["time_unix"] > at]
            return [line for line in lines(steps) if begun and line["time_unix"] > begun[0]]

        _wait(after, process, RECOVER_S, errors)
        step = after()[0]
        again = next(line["time_unix"] for line in lines(started) if line["time_unix"] > at)
        phases = {"until_workers_run_s": again - at, "until_step_s": step["time_unix"] - again}
        lost = max(last, *(m["step"] for m in lines(steps) if m["time_unix"] < again)) - step["step"] + 1
        before = [line for line in lines(steps) if line["time_unix"] < at]
        told = Told(metrics=before, kills=[{"time_unix": at}])
        return told, Kill(outside_s=step["time_unix"] - at, lost_steps=lost, phases=phases, source="disk")
    finally:
        process.kill()
        process.wait()
        end_session(str(folder), os.getpid())  # removes the folder too


def lines(path: Path) -> Lines:
    """The whole lines of a file that may still be written to; none where there is no file yet."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def _start(command: list[str], env: dict[str, str], output: Path) -> "subprocess.Popen[bytes]":
    with open(output, "w") as file:
        return subprocess.Popen(command, stdout=file, stderr=file, env=env, start_new_session=True)


def _wait(for_: Callable[[], Any], process: "subprocess.Popen[bytes]", limit_s: float, errors: Path) -> None:
    deadline = time.monotonic() + limit_s
    while not for_():
        if process.poll() is not None or time.monotonic() > deadline:
            how = f"took more than {limit_s:.0f} s" if process.poll() is None else "ended too early"
            raise RuntimeError(f"the run {how}:\n{errors.read_text()[-4000:]}")
        time.sleep(LOOK_EVERY_S)
