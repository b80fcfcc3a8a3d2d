"""What goes into a recovery and what is told of it, as values: no Ray, no processes."""

from pathlib import Path
from typing import Any

import pytest

from rayfold.cluster.record import Record
from rayfold.cluster.recovery import Phases, fault_of, hopeless, legal_of, with_layout
from rayfold.faulttol.verdict import Failure, decide
from rayfold.runtime.config import read_config
from rayfold.runtime.journal import EVENTS, METRICS, read_lines
from rayfold.runtime.plan import RunPlan, make_run_plan

NODES = ["here", "here", "there", "there"]


def plan_of(*overrides: str) -> RunPlan:
    """A small run on four ranks."""
    settings = ("run.workers=4", "model.dim=32", "model.heads=4", "model.kv_heads=4", "model.layers=4")
    return make_run_plan(read_config(None, (*settings, "batch.size=8", *overrides)), cpus=4, gpus=0)


def failure(rank: int, kind: str, message: str = "gone", **more: Any) -> Failure:
    """A rank's end at step 7."""
    return Failure(rank, 7, kind, message, time_unix=float(rank), **more)


@pytest.mark.parametrize(
    ("failures", "kind", "ranks"),
    [
        ([failure(1, "died"), failure(0, "RuntimeError", "Connection closed by peer")], "died", (1,)),
        ([failure(1, "died", "SIGKILL"), failure(3, "died", "SIGSEGV")], "died", (1, 3)),
        ([failure(2, "stopped")], "stopped", (2,)),
        ([failure(2, "stuck", frames=["a.py:1 (f)"]), failure(3, "stuck")], "stuck", (2, 3)),
        ([failure(2, "ValueError", "no")], "exception", (2,)),
        ([failure(2, "MemoryError", "no")], "oom", (2,)),
        ([failure(0, "ValueError", "no"), failure(3, "died")], "died", (3,)),
    ],
)
def test_those_whose_process_is_gone_are_the_fault(
    failures: list[Failure], kind: str, ranks: tuple[int, ...]
) -> None:
    """A rank that only lost its peer, or raised and lives, is no rank to replace."""
    fault = fault_of(decide(failures), failures, nodes=NODES, lost_nodes=(), uptime_s=1.0)
    assert (fault.kind, fault.ranks) == (kind, ranks)
    assert bool(fault.signature) == (kind in ("exception", "stuck", "oom"))


def test_a_rank_on_a_lost_node_is_the_node_s_fault() -> None:
    """Its memory is gone with it, and no spare there can be used."""
    failures = [failure(2, "died"), failure(3, "died")]
    fault = fault_of(decide(failures), failures, nodes=NODES, lost_nodes={"there"}, uptime_s=1.0)
    assert (fault.kind, fault.node, fault.ranks) == ("node", "there", (2, 3))


def test_an_error_that_all_ranks_raise_alike_is_not_tried_again() -> None:
    """Unreadable data or a model that cannot be built are so in the next attempt as well."""
    alike = [failure(rank, "ValueError", "no such crystal") for rank in range(4)]
    verdict = decide(alike)
    fault = fault_of(verdict, alike, nodes=NODES, lost_nodes=(), uptime_s=1.0)
    assert hopeless(verdict, fault, world_size=4) is not None
    one = decide(alike[:1])
    assert (
        hopeless(one, fault_of(one, alike[:1], nodes=NODES, lost_nodes=(), uptime_s=1.0), world_size=4)
        is None
    )


@pytest.mark.parametrize("ranks", [3, 2, 1])
def test_a_smaller_layout_makes_a_plan_of_the_same_batch(ranks: int) -> None:
    """Workers make their plan from the configuration: it must lead them to the layout that was chosen."""
    plan = plan_of("parallel.tp=2", "parallel.dp_shard=2")
    for layout in legal_of(plan)(ranks):
        smaller = with_layout(plan, layout)
        assert make_run_plan(smaller.config, cpus=1, gpus=0).layout == layout
        assert smaller.config.batch == plan.config.batch
    assert legal_of(plan)(2)


def test_a_user_s_model_is_split_in_no_new_way() -> None:
    """Whether it can be is known only when it is built, which is too late for a decision."""
    plan = make_run_plan(
        read_config(None, ('model.family="mine:build"', "run.workers=4", "batch.size=8")), cpus=4, gpus=0
    )
    assert all(layout.tp == layout.pp == layout.cp == 1 for n in (1, 2) for layout in legal_of(plan)(n))


def test_phases_add_up_to_the_time_since_the_fault() -> None:
    """Each second of a recovery belongs to one phase, also when one comes twice or the fault was earlier."""
    phases = Phases(100.0)
    for name, at in (("detect", 100.5), ("decide", 100.6), ("detect", 100.9), ("regroup", 101.0)):
        phases.end(name, at)
    phases.began_at(99.9)
    assert phases.seconds["detect"] == pytest.approx(0.9)
    assert sum(phases.as_fields().values()) == pytest.approx(1.1)
    phases.began_at(100.2)  # no news
    assert sum(phases.seconds.values()) == pytest.approx(1.1)


def line(step: int, at: float) -> tuple[str, dict[str, object]]:
    """A step as rank 0 tells it."""
    figures = ("loss", "tokens_per_s", "step_time_s", "grad_norm", "lr", "memory_bytes", "tokens")
    return "metric", {"step": step, "time_unix": at, **dict.fromkeys(figures, 1.0)}


def test_only_the_ranks_of_the_present_epoch_are_heard_and_the_restored_event_waits_for_the_lost_step(
    tmp_path: Path,
) -> None:
    """A rank that was given up must not write, and how long a fault cost is known when its step is done."""
    far = 2e9  # a time after this test
    record = Record(tmp_path, "test", owner="a")
    assert not record.take_in([line(1, 1.0)], epoch=1, rank=0, number=0), "nothing is formed yet"
    record.begin_epoch(1, {"epoch": 1, "spare_pids": []}, came_unix=None)
    assert record.take_in([line(1, 1.0), line(2, 2.0)], epoch=1, rank=0, number=0)
    record.begin_recovery(since=2.5)
    assert record.take_in([line(3, far)], epoch=1, rank=0, number=2), "the last words of the epoch"
    assert record.recovering
    record.end_epoch()
    assert not record.take_in([line(4, far)], epoch=1, rank=0, number=3)
    record.begin_epoch(2, {"epoch": 2, "spare_pids": []}, came_unix=None)
    told = ("event", {"kind": "restored", "step": 2, "from_step": 2})
    record.take_in([told, line(3, far)], epoch=2, rank=0, number=0)
    assert not record.recovering
    record.finish("finished")
    record.close()
    assert [(v["step"], v.get("attempt")) for v in read_lines(tmp_path / METRICS)] == [
        (1, None),
        (2, None),
        (3, None),
        (3, 2),
    ]
    events = list(read_lines(tmp_path / EVENTS))
    assert [event["kind"] for event in events] == ["formed", "formed", "restored", "run_finished"]
    assert {"detect_s", "regroup_s", "restore_s", "catch_up_s"} <= set(events[2])
    assert "fenced_unix" in events[1]
