"""`rayfold chaos`: a run, the faults of a campaign injected into it, and what came of each promise.

The run is that of `rayfold train`, in this process; a thread injects from outside (`inject.py`), and what no
one outside can do workers do to themselves (`saboteur.py`). What cannot be injected is refused when the
campaign is read: a report about faults that never happened would be read as one about faults that were borne.
"""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.table import Table

from ..faulttol.campaign import OF_CHECKPOINTS, Campaign, CampaignError, Injection, PlannedFault
from ..faulttol.outcome import PROMISES, campaign_report
from ..runtime.journal import EVENTS, METRICS, read_lines, write_atomically
from ..runtime.plan import RunPlan
from ..runtime.resume import newest_step
from .home import Home
from .inject import NOT_DUE, STEPS_TO_KNOW, Injector
from .saboteur import FROM_WITHIN
from .watch import watching_works

INJECTIONS_MADE = "chaos.jsonl"  # in the run's folder: what was injected when, in the manner of events.jsonl
REPORT = "chaos.json"

# What each kind does, for the help; those that are not here cannot be injected.
INJECTED: dict[Injection, str] = {
    "kill": "SIGKILL of a rank, at a drawn instant of the step",
    "kill_in_update": "SIGKILL while the rank's state is between two steps",
    "kill_in_copy": "SIGKILL while a copy of the rank's state is written",
    "kill_in_recovery": "SIGKILL of a rank while the others recover from another fault of the campaign",
    "kill_all": "SIGKILL of all ranks at once",
    "kill_spare": "SIGKILL of a process that waits to take a rank's place",
    "kill_vault": "SIGKILL of the process that watches the node's ranks",
    "kill_controller": "SIGKILL of the process that directs the run and writes its record",
    "kill_node": "SIGKILL of a rank and, at the same instant, of the process that watches the node's ranks",
    "preempt": "SIGTERM to a rank, as orchestrators give notice before they kill",
    "stop": "SIGSTOP of a rank: it fails nowhere and answers nobody",
    "stale": "SIGSTOP of a rank, and SIGCONT while its place is given to another",
    "bit_flip": "one bit in the newest copy of the rank's state",
    "truncate": "the newest copy of the rank's state cut off while the rank has it mapped",
    "lose_slot": "the file of the newest copy of the rank's state removed",
    "exception": "an exception raised once in the thread that trains, wherever it is",
    "oom": "a MemoryError raised once in the thread that trains",
    "stuck": "the rank in an endless loop, or in native code that holds the interpreter; not before step "
    f"{STEPS_TO_KNOW}, as a run must know its steps first",
    "flip_checkpoint": "one bit in the newest checkpoint on disk",
    "truncate_checkpoint": "a file of the newest checkpoint on disk cut off",
    "disk_full": "no file as large as a checkpoint's can be written, until one has come to nothing",
}
REFUSED: dict[Injection, str] = {
    "kill_driver": "an embedded session ends with its command, and so would the campaign; kill the command "
    "of a run in a joined cluster instead",
}


@dataclass(frozen=True, kw_only=True)
class Chaos:
    """A campaign and where it is told."""

    campaign: Campaign
    planned: Sequence[PlannedFault]
    seed: int
    report: Path


def check_campaign(campaign: Campaign, plan: RunPlan) -> None:
    """Refuse what cannot be injected into this run. Raises CampaignError with every problem."""
    config, problems = plan.config, []
    if config.run.address != "local":
        problems.append(
            f'run.address = "{config.run.address}": faults are injected into processes of this machine; '
            'set run.address="local"'
        )
    if not watching_works():
        problems.append("this system has no /proc, by which ranks are found; use Linux")
    if config.snapshot.enabled is False:
        problems.append("snapshot.enabled = false: such a run ends with its first fault; leave it at auto")
    if (step := newest_step(config.run_dir)) >= config.run.steps:
        problems.append(
            f"{config.run_dir} is finished at step {step}, so there is nothing to injure; choose another "
            "run.name, or raise run.steps"
        )
    most = 1 if config.snapshot.spares < 0 else config.snapshot.spares
    if campaign.spares > most:
        problems.append(
            f"spares = {campaign.spares}: a fault would wait for more spares than the run keeps; set "
            f"snapshot.spares={campaign.spares} or more"
        )
    disturbing = [s for s in campaign.faults if PROMISES[s.kind].recovers and s.kind != "kill_in_recovery"]
    for number, spec in enumerate(campaign.faults):
        at = f"fault[{number}]"
        if spec.kind in REFUSED:
            can = ", ".join(INJECTED)
            problems.append(
                f"{at}.kind: {spec.kind} cannot be injected: {REFUSED[spec.kind]}. These can: {can}"
            )
        if spec.at_step is not None and spec.at_step[1] >= config.run.steps:
            problems.append(
                f"{at}.at_step: goes up to {spec.at_step[1]}, and a run of run.steps = {config.run.steps} is "
                f"over then; use at most {config.run.steps - 1}, or run.steps={spec.at_step[1] + 1} or more"
            )
        every, due = (
            config.checkpoint.every,
            spec.at_step[0] if spec.at_step is not None else config.run.steps,
        )
        if spec.kind in OF_CHECKPOINTS and not 0 < every < due:
            problems.append(
                f"{at}.kind: {spec.kind} needs a checkpoint that is there before, and checkpoint.every = "
                f"{every}; set checkpoint.every to less than {due}"
            )
        if spec.kind == "kill_spare" and config.snapshot.spares == 0:
            problems.append(f"{at}.kind: kill_spare, and snapshot.spares = 0; set snapshot.spares=1")
        if spec.kind == "stuck" and plan.layout.world_size == 1:
            problems.append(
                f"{at}.kind: stuck, and run.workers = 1: a stuck rank is found by those that wait for it; "
                "set run.workers=2 or more"
            )
        if spec.kind == "kill_in_recovery" and not disturbing:
            problems.append(
                f"{at}.kind: kill_in_recovery comes while ranks recover from another fault, and there is "
                'none; add a [[fault]] of kind "kill" that is due before'
            )
    if problems:
        raise CampaignError("\n".join(f"{campaign.source}: {problem}" for problem in problems))


def run_chaos(
    chaos: Chaos, run_dir: Path, home: Home, run: Callable[[Home], dict[str, Any]]
) -> dict[str, Any]:
    """Let `run` go to its end under the campaign's faults; the report, which is written too.

    `run` returns the summary of the run in `run_dir`. Where the campaign has faults that no one outside can
    bring about, the home that it is given has its workers do them.
    """
    home = replace(home, sabotaged=any(fault.kind in FROM_WITHIN for fault in chaos.planned))
    run_dir.mkdir(parents=True, exist_ok=True)
    since = time.time()
    with (
        open(run_dir / INJECTIONS_MADE, "a") as told,
        Injector(run_dir, chaos.planned, told, spares=chaos.campaign.spares, since_unix=since) as injector,
    ):
        run(home)
    report = {
        "campaign": chaos.campaign.name,
        "seed": chaos.seed,
        "run_dir": str(run_dir),
        **campaign_report(
            chaos.planned,
            [*_since(run_dir / EVENTS, since), *_since(run_dir / INJECTIONS_MADE, since)],
            metrics=_since(run_dir / METRICS, since),
        ),
    }
    for fault in report["faults"]:
        if fault["kept"] is None:
            why = injector.why.get(fault["index"], NOT_DUE)
            fault["problems"] = [f"not injected: {why}"]
    chaos.report.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(chaos.report, json.dumps(report, indent=2) + "\n")
    return report


def failure_of_campaign(report: dict[str, Any]) -> str | None:
    """Why a campaign did not show what it was to show, in one sentence; None when all is well."""
    if report["broken"]:
        broken = [fault["index"] for fault in report["faults"] if fault["kept"] is False]
        return f"{report['broken']} of {report['injected']} promises were broken: faults {broken}"
    if report["status"] != "finished":
        return f"every injected fault kept its promise, but the run ended as {report['status']}"
    if not report["injected"]:
        return "no fault was injected, so nothing was shown; see why in the report"
    return None


def planned_lines(planned: Sequence[PlannedFault]) -> list[str]:
    """What is going to be injected when, one line a fault."""
    return [
        f"{fault.index:>3}  {fault.kind:<16}  {'-' if fault.rank < 0 else f'rank {fault.rank}':<8}  "
        + (f"at step {fault.at_step}" if fault.at_step is not None else f"after {fault.at_s:g} s")
        for fault in planned
    ]


EXAMPLE = """A campaign is a TOML file:

    name = "kills"
    spares = 1          # a fault waits until so many spares are ready; 0, the default: it does not

    [[fault]]
    kind = "kill"
    rank = "random"     # the default: drawn for each; or a number
    at_step = [5, 20]   # drawn from these; or one number
    count = 3

    [[fault]]
    kind = "stop"
    every_s = 15        # 15 and 30 seconds after the first step
    count = 2
"""


def kinds_table() -> Table:
    """Every kind of fault: what is done and what is promised, for the help."""
    table = Table(title="Kinds of faults, and what a run with a spare promises")
    table.add_column("kind", no_wrap=True)
    table.add_column("what is done", overflow="fold")
    table.add_column("promise", overflow="fold")
    for kind, does in INJECTED.items():
        table.add_row(kind, does, _promise(kind))
    for kind, why in REFUSED.items():
        table.add_row(kind, f"refused: {why}", "-")
    return table


def _promise(kind: Injection) -> str:
    promise = PROMISES[kind]
    if not promise.recovers:
        alarm = f', a fault of class "{promise.alarm}" is told' if promise.alarm else ""
        return f"training is not disturbed{alarm}"
    said = [f"{promise.lost_steps} step lost at most" if promise.lost_steps else "no step lost"]
    said += [f"noticed in {promise.detect_s:g} s"] if promise.detect_s is not None else []
    said += [f"goes on in {promise.resume_s:g} s"] if promise.resume_s is not None else []
    return ", ".join(said)


def _since(path: Path, since_unix: float) -> list[dict[str, Any]]:
    return [line for line in read_lines(path) if line["time_unix"] >= since_unix]
