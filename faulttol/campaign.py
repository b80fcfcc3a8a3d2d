"""A chaos campaign: a TOML file of faults to be injected, and the seeded list that it stands for.

    name = "kills"
    spares = 1           # a fault waits until so many spares are ready; 0, the default: it does not

    [[fault]]
    kind = "kill_in_update"
    rank = "random"      # the default
    at_step = [5, 20]    # a step drawn from 5 to 20; or one number
    count = 3

    [[fault]]
    kind = "stop"
    rank = 1
    every_s = 15         # 15, 30, 45 s after the first step
    count = 3

The same file, seed and layout give the same list, so that a failure can be had again. What each fault
promises and how a run kept it is in `outcome.py`; injecting is for those who own processes.
"""

import difflib
import math
import random
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

from ..parallel.layout import Layout

Injection: TypeAlias = Literal[
    "kill",  # SIGKILL of a worker, wherever it is
    "kill_in_update",  # while its arena is odd
    "kill_in_copy",  # while a slot is FILLING
    "kill_in_recovery",  # of a survivor, while the others recover
    "kill_all",  # every worker at once
    "kill_spare",
    "kill_vault",  # of the rank's node
    "kill_node",  # the rank, and the vault of its node at the same instant
    "kill_controller",
    "kill_driver",  # the command
    "stop",  # SIGSTOP
    "stale",  # SIGSTOP, and SIGCONT in the midst of the recovery: it comes back when its place is given away
    "bit_flip",  # in a slot of the rank
    "truncate",  # of a slot of the rank
    "lose_slot",  # the file of one removed
    "flip_checkpoint",  # one bit in the newest checkpoint on disk
    "truncate_checkpoint",
    "disk_full",  # no rank can write a checkpoint, until one has come to nothing
    "exception",  # in the thread that trains
    "oom",  # a MemoryError there
    "stuck",  # alive and without progress
    "preempt",  # SIGTERM: notice to leave
]
INJECTIONS: tuple[Injection, ...] = get_args(Injection)
OF_CHECKPOINTS: frozenset[Injection] = frozenset({"flip_checkpoint", "truncate_checkpoint", "disk_full"})
OF_COPIES: frozenset[Injection] = frozenset({"bit_flip", "truncate", "lose_slot"})
WITHOUT_RANK: frozenset[Injection] = frozenset(
    {"kill_all", "kill_spare", "kill_controller", "kill_driver", *OF_CHECKPOINTS}
)
FAULT_KEYS = ("kind", "rank", "at_step", "every_s", "count")


class CampaignError(ValueError):
    """The campaign cannot be; the message lists every problem, one a line, each with what would work."""


@dataclass(frozen=True, kw_only=True)
class FaultSpec:
    """Section `[[fault]]`: `count` injections of one kind."""

    kind: Injection
    rank: int | None = None  # None: drawn for each
    at_step: tuple[int, int] | None = None  # drawn from these, both included; this or every_s
    every_s: float | None = None
    count: int = 1


@dataclass(frozen=True, kw_only=True)
class Campaign:
    """The faults of one file."""

    name: str
    faults: tuple[FaultSpec, ...]
    spares: int = 0  # as many are to be ready before a fault is injected
    source: str = "campaign"  # for messages


@dataclass(frozen=True, kw_only=True)
class PlannedFault:
    """One injection, due at a step or at a time."""

    index: int  # `planned` in the `fault` event that tells of it
    kind: Injection
    rank: int  # -1 where the kind takes none
    at_step: int | None = None
    at_s: float | None = None  # seconds since the first step was finished
    draw: int = (
        0  # 32 random bits for what the injector picks: which bit, which spare, how long into the update
    )


def read_campaign(path: Path) -> Campaign:
    """Read and check a campaign. Raises CampaignError."""
    try:
        values = tomllib.loads(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise CampaignError(f"{path}: cannot be read: {error}") from error
    except tomllib.TOMLDecodeError as error:
        raise CampaignError(f"{path}: is not TOML: {error}") from error
    return parse_campaign(values, source=str(path))


def parse_campaign(values: Mapping[str, Any], *, source: str) -> Campaign:
    """As `read_campaign`, from plain values; `source` stands before every problem."""
    problems = _unknown(values, ("name", "spares", "fault"), "")
    name, spares = values.get("name", Path(source).stem), values.get("spares", 0)
    if not isinstance(name, str) or not name:
        problems.append(f'name: is {name!r}; give a text such as "kills"')
    if not _whole(spares, 0):
        problems.append(f"spares: is {_shown(spares)}; give how many a fault waits for, 0: none")
    sections = values.get("fault", [])
    if not isinstance(sections, list) or not sections or not all(isinstance(s, Mapping) for s in sections):
        problems.append("fault: a campaign has faults; write each as a section [[fault]]")
        sections = []
    specs = [_fault_spec(section, f"fault[{i}].", problems) for i, section in enumerate(sections)]
    if problems:
        raise CampaignError("\n".join(f"{source}: {problem}" for problem in problems))
    faults = tuple(spec for spec in specs if spec)
    return Campaign(name=name, faults=faults, spares=spares, source=source)


def schedule(campaign: Campaign, seed: int, layout: Layout) -> list[PlannedFault]:
    """The faults in the order in which they are due: those by step, then those by time.

    Raises CampaignError where a rank is named that `layout` does not have.
    """
    world_size = layout.world_size
    if problems := [
        f"{campaign.source}: fault[{i}].rank: is {spec.rank}, and the layout has ranks 0 to "
        f'{world_size - 1}; give one of these or "random"'
        for i, spec in enumerate(campaign.faults)
        if spec.rank is not None and spec.rank >= world_size
    ]:
        raise CampaignError("\n".join(problems))
    due = [
        one
        for i, spec in enumerate(campaign.faults)
        # a generator for each section: a section that is added leaves the draws of the others as they were
        for one in _injections(spec, random.Random(f"{seed}/{i}/{spec.kind}"), world_size)
    ]
    due.sort(key=lambda one: (one.at_s is not None, one.at_step or 0, one.at_s or 0.0))
    return [PlannedFault(**{**one.__dict__, "index": index}) for index, one in enumerate(due)]


def _injections(spec: FaultSpec, rng: random.Random, world_size: int) -> list[PlannedFault]:
    made = []
    for number in range(spec.count):
        drawn = rng.randrange(world_size)  # drawn always, so that naming a rank leaves the other draws alone
        rank = -1 if spec.kind in WITHOUT_RANK else drawn if spec.rank is None else spec.rank
        step = rng.randint(*spec.at_step) if spec.at_step else None
        at_s = spec.every_s * (number + 1) if spec.every_s else None
        made.append(
            PlannedFault(
                index=0, kind=spec.kind, rank=rank, at_step=step, at_s=at_s, draw=rng.getrandbits(32)
            )
        )
    return made


def _fault_spec(section: Mapping[str, Any], at: str, problems: list[str]) -> FaultSpec | None:
    """Check one section; problems are added to the list, and then there is no spec."""
    before = len(problems)
    problems += _unknown(section, FAULT_KEYS, at)
    kind: Any = section.get("kind")
    rank, count = section.get("rank", "random"), section.get("count", 1)
    if kind not in INJECTIONS:
        said = f'is "{kind}"' if "kind" in section else "is missing"
        problems.append(f"{at}kind: {said}; {_nearest(str(kind), INJECTIONS)}")
    if rank != "random" and not _whole(rank, 0):
        problems.append(f'{at}rank: is {_shown(rank)}; give a rank from 0 on, or "random"')
    if kind in WITHOUT_RANK and "rank" in section:
        problems.append(f"{at}rank: {kind} takes none; leave it out")
    if not _whole(count, 1):
        problems.append(f"{at}count: is {_shown(count)}; give a number from 1 on")
    step, every_s = section.get("at_step"), section.get("every_s")
    steps: list[Any] = step if isinstance(step, list) else [step, step]
    if (step is None) == (every_s is None):
        which = "neither at_step nor every_s is" if step is None else "both at_step and every_s are"
        problems.append(f"{at}at_step: {which} given; say when with one of them")
    if step is not None and not (
        len(steps) == 2 and all(_whole(s, 1) for s in steps) and steps[0] <= steps[1]
    ):
        problems.append(f"{at}at_step: is {_shown(step)}; give a step from 1 on, or [first, last]")
    number = isinstance(every_s, int | float) and not isinstance(every_s, bool)
    if every_s is not None and not (number and 0 < every_s < math.inf):
        problems.append(f"{at}every_s: is {_shown(every_s)}; give seconds above 0")
    if len(problems) > before:
        return None
    return FaultSpec(
        kind=kind,
        rank=None if rank == "random" else rank,
        at_step=None if step is None else (steps[0], steps[1]),
        every_s=None if every_s is None else float(every_s),
        count=count,
    )


def _unknown(values: Mapping[str, Any], known: Sequence[str], at: str) -> list[str]:
    return [f"{at}{key}: there is no such key; {_nearest(key, known)}" for key in values if key not in known]


def _nearest(word: str, choices: Sequence[str]) -> str:
    nearest = difflib.get_close_matches(word, choices, n=1, cutoff=0.0)[0]
    return f'nearest: "{nearest}" of {", ".join(choices)}'


def _whole(value: object, at_least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= at_least


def _shown(value: object) -> str:
    return (
        f'"{value}"'
        if isinstance(value, str)
        else str(value).lower()
        if isinstance(value, bool)
        else str(value)
    )
