"""`rayfold chaos`: what cannot be injected is refused at once, and what is injected is reported as it was."""

import json
from pathlib import Path

import pytest
from commands import Bench, events, final_tensors, lines

STEPS = 40
PHASES = ("detect", "decide", "fence", "regroup", "restore", "catch_up")
LATE = ("detected in", "resumed in")  # promises of a machine that does nothing else
EXAMPLE = Path(__file__).parents[2] / "examples" / "chaos.toml"


def campaign(folder: Path, *faults: str, spares: int = 0) -> Path:
    """A campaign file with these sections, each of which waits for so many spares."""
    path = folder / "campaign.toml"
    path.write_text(
        f'name = "tried"\nspares = {spares}\n' + "".join(f"\n[[fault]]\n{fault}\n" for fault in faults)
    )
    return path


KILL = 'kind = "kill"\nat_step = 3'


@pytest.mark.parametrize(
    ("faults", "options", "said"),
    [
        (('kind = "kil"\nat_step = 3',), (), 'fault[0].kind: is "kil"; nearest: "kill"'),
        ((KILL, 'kind = "kill_driver"\nat_step = 3'), (), "fault[1].kind: kill_driver cannot be injected"),
        (('kind = "kill_driver"\nat_step = 3',), (), "kill the command of a run in a joined cluster instead"),
        (('kind = "stuck"\nat_step = 3',), ("run.workers=1",), "set run.workers=2 or more"),
        (
            ('kind = "disk_full"\nat_step = 3',),
            ("checkpoint.every=3",),
            "set checkpoint.every to less than 3",
        ),
        (('kind = "flip_checkpoint"\nevery_s = 3',), ("checkpoint.every=0",), "checkpoint.every = 0"),
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


def test_a_campaign_that_waits_for_more_spares_than_there_are_is_refused(bench: Bench, small: Path) -> None:
    """Its faults would never come."""
    waits = campaign(bench.folder, KILL, spares=2)
    ended = bench.run("chaos", waits, small, "snapshot.spares=1", "--dry-run", timeout_s=30)
    assert ended.status == 2
    assert "set snapshot.spares=2 or more" in ended.err


def test_all_problems_of_a_campaign_are_told_at_once(bench: Bench, small: Path) -> None:
    """One look, one correction."""
    faults = ('kind = "kill_driver"\nat_step = 3', 'kind = "kill"\nat_step = 80')
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
    for word in (
        "[[fault]]",
        "at_step",
        "every_s",
        "kill_in_update",
        "preempt",
        "stuck",
        "examples/chaos.toml",
    ):
        assert word in shown
    assert "training is not disturbed" in " ".join(shown.split())


@pytest.mark.ray
@pytest.mark.campaign
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


def train_undisturbed(folder: Path, config: Path, *options: str) -> Path:
    """The folder of a run without faults."""
    bench = Bench(folder)
    ended = bench.run("train", config, f"run.dir={folder / 'run'}", "snapshot.spares=0", *options)
    bench.close()
    assert ended.status == 0, ended.err
    return folder / "run"


def check_as_if_nothing_had_happened(run_dir: Path, undisturbed: Path) -> None:
    """Each step once, but for those trained again, and the same numbers to the bit."""
    told = lines(run_dir / "metrics.jsonl")
    once = [line["step"] for line in told if "attempt" not in line]
    assert once == [line["step"] for line in lines(undisturbed / "metrics.jsonl")]
    keys = ("loss", "grad_norm", "tokens", "lr")
    found, expected = (
        {line["step"]: [line[key] for key in keys] for line in lines(folder / "metrics.jsonl")}
        for folder in (run_dir, undisturbed)
    )
    assert found == expected
    assert final_tensors(run_dir) == final_tensors(undisturbed)


@pytest.mark.ray
@pytest.mark.campaign
def test_notice_an_exception_and_a_lost_copy_leave_the_numbers_as_they_were(
    bench: Bench, small: Path, run_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """One fault from outside a process, one from within, and one that nobody is to notice."""
    kinds = ("exception", "lose_slot", "preempt")
    sections = [f'kind = "{kind}"\nat_step = {6 + 8 * i}\nrank = 1' for i, kind in enumerate(kinds)]
    options = (f"run.steps={STEPS}", "checkpoint.every=0")
    faults = campaign(bench.folder, *sections)
    ended = bench.run("chaos", faults, small, *options, "snapshot.spares=1", "--seed", "3")
    report = json.loads((run_dir / "chaos.json").read_text())
    assert (report["status"], report["injected"]) == ("finished", 3), ended.err
    problems = [problem for fault in report["faults"] for problem in fault["problems"]]
    assert all(problem.startswith(LATE) for problem in problems)
    raised, lost, left = report["faults"]
    assert "rank 1 failed at step" in raised["outcome"]["verdict"]
    assert "Sabotage: raised on purpose" in raised["outcome"]["verdict"]
    assert lost["outcome"] == {}, "nobody noticed"
    assert "rank 1 got notice to leave at step" in left["outcome"]["verdict"]
    assert left["outcome"]["lost_steps"] == 0
    first, again, moved = (formed["pids"] for formed in events(run_dir, "formed"))
    assert first == again, "nothing was wrong with the processes"
    assert moved == [first[0], events(run_dir, "formed")[0]["spare_pids"][0]]
    (preempted,) = events(run_dir, "preempted")
    assert (preempted["ranks"], preempted["node"]) == ([1], "")
    undisturbed = train_undisturbed(tmp_path_factory.mktemp("undisturbed"), small, *options)
    check_as_if_nothing_had_happened(run_dir, undisturbed)


@pytest.mark.ray
@pytest.mark.campaign
@pytest.mark.parametrize("kind", ["flip_checkpoint", "truncate_checkpoint"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_loaded(
    bench: Bench, small: Path, run_dir: Path, kind: str
) -> None:
    """A flipped bit or a lost tail is never trained on."""
    faults = campaign(bench.folder, f'kind = "{kind}"\nat_step = 290')  # long after step 240 is durable
    options = ("run.steps=304", "checkpoint.every=80", "snapshot.spares=0")
    assert bench.run("chaos", faults, small, *options).status == 0
    (injected,) = lines(run_dir / "chaos.jsonl")
    damaged = Path(injected["file"])
    assert damaged.parent.name == "step-00000240"
    last = run_dir / "checkpoints" / "step-00000304"
    last.rename(last.with_name("step-00000304.deleting"))
    ended = bench.run("train", small, "run.steps=320", "checkpoint.every=80", "snapshot.spares=0")
    assert ended.status == 0, ended.err
    faults = events(run_dir, "fault")
    assert {fault["class"] for fault in faults} == {"damaged_checkpoint"}
    assert str(damaged) in faults[0]["message"]
    assert ("CRC-32" if kind == "flip_checkpoint" else "cut short") in faults[0]["message"]
    assert events(run_dir, "restored")[-1]["from_step"] == 160
