"""`rayfold chaos`: what cannot be injected is refused at once, and what is injected is reported as it was."""

import json
from pathlib import Path

import pytest
from commands import Bench, lines

STEPS = 40
PHASES = ("detect", "decide", "fence", "regroup", "restore", "catch_up")
LATE = ("detected in", "resumed in")  # promises of a machine that does nothing else
EXAMPLE = Path(__file__).parents[2] / "examples" / "chaos.toml"


def campaign(folder: Path, *faults: str) -> Path:
    """A campaign file with these sections."""
    path = folder / "campaign.toml"
    path.write_text('name = "tried"\n' + "".join(f"\n[[fault]]\n{fault}\n" for fault in faults))
    return path


KILL = 'kind = "kill"\nat_step = 3'


@pytest.mark.parametrize(
    ("faults", "options", "said"),
    [
        (('kind = "kil"\nat_step = 3',), (), 'fault[0].kind: is "kil"; nearest: "kill"'),
        ((KILL, 'kind = "preempt"\nat_step = 3'), (), "fault[1].kind: preempt cannot be injected"),
        (('kind = "exception"\nat_step = 3',), (), "a model of your own"),
        (('kind = "kill_node"\nat_step = 3',), (), "kill_node cannot be injected"),
        (('kind = "kill"\nat_step = [3, 8]',), (), "use at most 7, or run.steps=9"),
        (
            ('kind = "kill"\nat_step = 3\nrank = 2',),
            (),
            "fault[0].rank: is 2, and the layout has",
        ),
        (('kind = "kill_in_recovery"\nat_step = 3',), (), 'add a [[fault]] of kind "kill"'),
        (('kind = "kill_spare"\nat_step = 3',), ("snapshot.spares=0",), "set snapshot.spares=1"),
        ((KILL,), ("run.address=127.0.0.1:1",), 'set run.address="local"'),
        ((KILL,), ("snapshot.enabled=false",), "snapshot.enabled"),
        ((KILL,), ("batch.sise=3",), "nearest: batch.size"),
        ((), (), "a campaign has faults"),
    ],
)
def test_what_cannot_be_injected_is_refused_before_anything_starts(
    bench: Bench, small: Path, run_dir: Path, faults: tuple[str, ...], options: tuple[str, ...], said: str
) -> None:
    """A report about faults that never happened would read like one about faults that were borne."""
    ended = bench.run("chaos", campaign(bench.folder, *faults), small, *options, timeout_s=30)
    assert ended.status == 2, ended.err
    assert said in ended.err
    assert "Traceback" not in ended.err
    assert not run_dir.exists()


def test_all_problems_of_a_campaign_are_told_at_once(bench: Bench, small: Path) -> None:
    """One look, one correction."""
    faults = ('kind = "preempt"\nat_step = 3', 'kind = "kill"\nat_step = 80')
    ended = bench.run("chaos", campaign(bench.folder, *faults), small, timeout_s=30)
    assert [line.split(": ")[1] for line in ended.err.splitlines()] == ["fault[0].kind", "fault[1].at_step"]


def test_the_same_seed_plans_the_same_faults_and_another_seed_others(
    bench: Bench, small: Path, run_dir: Path
) -> None:
    """A failure that a campaign finds can be had again; the example is a campaign."""
    plan = ("chaos", EXAMPLE, small, "run.steps=100", "--dry-run", "--json", "--seed")
    first, again, other = (bench.run(*plan, seed, timeout_s=30).result for seed in ("1", "1", "2"))
    assert first == again != other
    assert [fault["kind"] for fault in first["faults"]] == ["kill", "bit_flip", "stop", *["kill_vault"] * 2]
    assert not run_dir.exists()


def test_help_teaches_every_kind_and_what_it_promises(bench: Bench) -> None:
    """Nobody has to read the source to write a campaign."""
    shown = bench.run("chaos", "--help", timeout_s=30).out
    for word in ("[[fault]]", "at_step", "every_s", "kill_in_update", "bit_flip", "examples/chaos.toml"):
        assert word in shown
    assert "training is not disturbed" in " ".join(shown.split())


@pytest.mark.ray
def test_a_kill_with_a_spare_is_injected_borne_and_reported(bench: Bench, small: Path, run_dir: Path) -> None:
    """The whole of it once: a seeded kill, each promise against its outcome, the exit status."""
    faults = campaign(bench.folder, 'kind = "kill"\nat_step = [5, 20]', 'kind = "stop"\nevery_s = 3600')
    report_at = bench.folder / "reports" / "kills.json"
    options = (f"run.steps={STEPS}", "checkpoint.every=0", "snapshot.spares=1", "--seed", "7")
    ended = bench.run("chaos", faults, small, *options, "--report", report_at)
    report = json.loads(report_at.read_text())
    killed, never = report["faults"]
    assert (report["status"], report["injected"], report["planned"]) == ("finished", 1, 2)
    (told,) = lines(run_dir / "chaos.jsonl")
    assert (told["planned"], told["class"], told["signal"]) == (0, "kill", "SIGKILL")
    assert 5 <= killed["due"]["step"] <= told["step"]
    assert f"rank {told['rank']}" in killed["outcome"]["verdict"]
    assert killed["outcome"]["source"] == "memory"
    assert killed["outcome"]["lost_steps"] <= killed["promise"]["lost_steps"]
    assert set(killed["outcome"]["phases"]) == set(PHASES)
    assert all(problem.startswith(LATE) for problem in killed["problems"])
    assert (never["kept"], never["problems"]) == (None, ["not injected: the run ended before it was due"])
    assert ended.status == (0 if killed["kept"] else 1), ended.err
    assert "1 were never injected" in ended.out
    assert lines(run_dir / "metrics.jsonl")[-1]["step"] == STEPS
