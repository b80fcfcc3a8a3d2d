"""A cold start: a run goes on from the memory that an earlier one has left, which came to no end.

When a whole Ray cluster is lost nobody is left who could bring the run back or clean up after it. The next
command with the same folder finds in the ledger whose memory may still lie on the machines; the vaults of the
new run take it over as they start (`faulttol/inheritance.py`), and its ranks find the images as if they had
made them themselves. Epochs count on, so that no image of the run before is ever taken for a newer one.
Memory of another model, or that this run has no use for, is given back.
"""

import logging
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ..faulttol.inheritance import remove, rest_of
from ..runtime.config import ConfigError, RunConfig, check_config
from ..runtime.resume import changes
from .ledger import Ledger, LedgerDamaged
from .states import ENDS, State
from .vault import Vaults, node_name, states_of

logger = logging.getLogger(__name__)

LOOK_S = 30.0  # for a process to be started on each node that looks there
TAKE_S = 60.0  # for vaults to start, and to end what still writes the files
MEBIBYTE = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Former:
    """Runs in the same folder that came to no end."""

    runs: tuple[str, ...] = ()  # by which their memory is named, the last one first
    epoch: int = 0  # the last that one of them may have begun
    other: str = ""  # why their memory is of no use to this run; "" where it is

    @staticmethod
    def found_in(ledger: Ledger, config: RunConfig) -> "Former":
        """Those that the last writer of the ledger knew of, itself among them if it was another controller;
        `config` is what they have to fit. Raises LedgerDamaged for a ledger of the present run.
        """
        if (own := ledger.read()) is not None:
            memory = own["memory"]
            return Former(runs=tuple(memory["runs"][1:]), epoch=memory["before"], other=memory["other"])
        try:
            values = ledger.read_of_another()
        except LedgerDamaged as damage:
            logger.warning("memory of an earlier run cannot be found: %s", damage)
            return Former()
        # a folder that was copied tells of the run that it is a copy of, which may well be at work
        memory = (values or {}).get("memory")
        if values is None or memory is None or memory["folder"] != os.path.abspath(config.run_dir):
            return Former()
        # one that has ended gave its own back; there may be some that it had not come to
        runs = memory["runs"][int(State(values["state"]) in ENDS) :]
        if not runs:
            return Former()
        # one more: a controller may be lost before it can write down that it began another
        epoch = memory["epoch"] + 1
        other = memory["other"] or _other(memory["plan"], config)
        return Former(runs=tuple(runs), epoch=epoch, other=other)


def _other(plan: dict[str, dict[str, Any]], config: RunConfig) -> str:
    try:
        changed = changes(check_config(plan).to_dict(), config.to_dict())
    except ConfigError as error:  # of another version
        return str(error)
    return "; ".join(f"{key} was {old!r} there and is {new!r} here" for key, old, new in changed)


@dataclass(frozen=True, kw_only=True)
class Came:
    """What was taken over: for the record, and for the ranks."""

    messages: tuple[str, ...] = ()
    lines: tuple[Mapping[str, Any], ...] = ()  # of steps that are in no record yet
    left: bool = False  # whether some of it may still be there


def come_into_memory(vaults: Vaults, former: Former, *, recorded: int) -> Came:
    """Take over what `former` has left on the nodes of the cluster. The vaults of nodes with ranks are there
    and know of it; `recorded` is the last step in the record.
    """
    started = vaults.actors()
    for node in _ask_nodes(_rest_here, former.runs, without=started):
        vaults.start_on(node)
    calls = {node: actor.came_into.remote(recorded) for node, actor in vaults.actors().items()}
    ray.wait(list(calls.values()), num_returns=len(calls), timeout=TAKE_S)
    nbytes, messages, left = 0, [], False
    lines: dict[int, Mapping[str, Any]] = {}
    for node, call in calls.items():
        try:
            size, told, problem = ray.get(call, timeout=0)
        except RayError as error:
            size, told, problem = 0, [], f"its vault does not answer ({type(error).__name__})"
        nbytes += size
        lines |= {line["step"]: line for line in told}
        if problem:
            left = True
            messages.append(f"node {node}: memory that an earlier run has left is not used: {problem}")
    if nbytes:
        size_told = f"{nbytes / MEBIBYTE:.0f} MiB of memory"
        messages.append(f"{size_told} that an earlier run has left, which came to no end, are taken over")
    ordered = tuple(lines[step] for step in sorted(lines))
    return Came(messages=tuple(messages), lines=ordered, left=left)


def give_back(former: Former, why: str) -> Came:
    """Remove what `former` has left on the nodes of the cluster."""
    found = _ask_nodes(_remove_here, former.runs, without=())
    told = f"memory that an earlier run has left is of no use here and was given back: {why}"
    return Came(messages=(told,) if found else ())


def _rest_here(runs: Sequence[str]) -> bool:
    """Whether something of these runs is in the memory of this machine."""
    return any(rest_of(state) for state in states_of(runs))


def _remove_here(runs: Sequence[str]) -> bool:
    """Remove what is there; whether there was something."""
    return sum(remove(state) for state in states_of(runs)) > 0


def _ask_nodes(question: Any, runs: Sequence[str], *, without: Collection[str]) -> list[str]:
    """The nodes that say yes, of those that are alive and not among `without` (names of vaults)."""
    alive = [node["NodeID"] for node in ray.nodes() if node["Alive"]]
    asked = {}
    for node in (node for node in alive if node_name(node) not in without):
        there: Any = NodeAffinitySchedulingStrategy(node, soft=False)  # Ray's stubs leave it out
        asker = ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=there)(question)
        asked[node] = asker.remote(list(runs))
    ray.wait(list(asked.values()), num_returns=len(asked), timeout=LOOK_S) if asked else None
    return [node for node, answer in asked.items() if _yes(answer)]


def _yes(answer: Any) -> bool:
    try:
        return bool(ray.get(answer, timeout=0))
    except RayError:
        return False  # a node that is lost, or too slow: what is there stays
