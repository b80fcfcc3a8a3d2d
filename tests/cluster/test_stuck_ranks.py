"""A rank that is alive and comes no further: found, named with its place, and replaced; on real Ray."""

from collections.abc import Callable
from pathlib import Path

import pytest
from commands import Bench, Ended, events, final_tensors, lines

STEPS, AT = 16, 9
SOON_S = 30.0  # 3 s on two idle cores; the timeout of collectives is ten minutes
CAMPAIGN = pytest.mark.campaign


def train(bench: Bench, config: Path, run_dir: Path, *options: str) -> Ended:
    """Run a paced model that lives on memory alone before its end."""
    fixed = (f"run.dir={run_dir}", f"run.steps={STEPS}", "model.pause_s=0.02", "checkpoint.every=0")
    return bench.run("train", config, *fixed, *options)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], Path]:
    """The run without trouble, made once."""
    made: list[Path] = []

    def run_of(config: Path) -> Path:
        if not made:
            folder = tmp_path_factory.mktemp("undisturbed")
            bench = Bench(folder)
            ended = train(bench, config, folder / "run", "snapshot.spares=0")
            bench.close()
            assert ended.status == 0, ended.err
            assert not events(folder / "run", "verdict")
            made.append(folder / "run")
        return made[0]

    return run_of


@CAMPAIGN
@pytest.mark.ray
@pytest.mark.parametrize(
    ("trouble", "said"),
    [("sleep_once", " has been in paced.py:"), ("lock_once", " has answered nothing for ")],
)
def test_a_stuck_rank_is_named_with_its_place_and_replaced(
    bench: Bench,
    paced: Path,
    run_dir: Path,
    undisturbed: Callable[[Path], Path],
    trouble: str,
    said: str,
) -> None:
    """Asleep in the user's code, or in native code that keeps the interpreter from all other threads."""
    options = (f"model.trouble={trouble}", "model.rank=1", f"model.step={AT}", "snapshot.spares=1")
    ended = train(bench, paced, run_dir, *options)
    assert ended.status == 0, ended.err
    (verdict,), (remedy,) = events(run_dir, "verdict"), events(run_dir, "remedy")
    assert (verdict["class"], verdict["ranks"]) == ("stuck", [1])
    assert verdict["sentence"].startswith(f"rank 1{said}")
    assert f" s in step {AT} while the other waits for it: " in verdict["sentence"]
    assert verdict["sentence"].endswith("alive but stuck")
    if trouble == "sleep_once":
        assert "(make_trouble)" in verdict["sentence"]
        assert "(forward)" in verdict["evidence"]["traceback"]
    assert (remedy["action"], remedy["ranks"]) == ("replace", [1])
    (first, again) = events(run_dir, "formed")
    assert again["pids"][0] == first["pids"][0]
    assert again["pids"][1] == first["spare_pids"][0]
    (restored,) = events(run_dir, "restored")
    assert (restored["source"], restored["lost_steps"]) == ("memory", 0)
    assert restored["detect_s"] < SOON_S
    assert [line["step"] for line in lines(run_dir / "metrics.jsonl")] == list(range(1, STEPS + 1))
    assert final_tensors(run_dir) == final_tensors(undisturbed(paced))


@CAMPAIGN
@pytest.mark.ray
def test_stuck_again_at_the_same_step_ends_the_run_with_the_place(
    bench: Bench, paced: Path, run_dir: Path
) -> None:
    """A deterministic livelock would take one spare after the other. Each process counts its steps from its
    first, so the new one is to be stuck in its first: the same of the run.
    """
    (bench.folder / "paced.py").write_text(
        paced.with_name("paced.py")
        .read_text()
        .replace(
            "number == self.step and get_rank() == self.rank",
            "get_rank() == self.rank and stuck_at(number, self.step)",
        )
        + "\n\ndef stuck_at(number, step):\n"
        "    if number == step:\n"
        '        open("stuck", "w").close()\n'
        '    return os.path.exists("stuck") and number in (1, step)\n'
    )
    options = ("model.trouble=sleep", "model.rank=1", f"model.step={AT}", "snapshot.spares=2")
    ended = train(bench, paced, run_dir, *options)
    assert ended.status == 1, ended.err
    first, second = events(run_dir, "verdict")
    assert [verdict["class"] for verdict in (first, second)] == ["stuck", "stuck"]
    assert [remedy["action"] for remedy in events(run_dir, "remedy")] == ["replace", "stop"]
    assert "it comes back whenever this step is trained" in ended.verdict
    assert "paced.py:" in ended.verdict
    assert "(make_trouble)" in ended.verdict


@CAMPAIGN
@pytest.mark.ray
def test_steps_of_all_lengths_evaluations_and_checkpoints_are_no_alarm(
    bench: Bench, paced: Path, run_dir: Path
) -> None:
    """One rank takes far longer than the other in every eighth step, and evaluation longer than all."""
    source = paced.with_name("paced.py")
    source.write_text(
        source.read_text().replace(
            "time.sleep(self.pause_s)",
            "time.sleep(4.0 if not self.training else 0.7 * (number % 8 == 7 and get_rank() == 1))",
        )
    )
    options = ("run.steps=40", "run.eval_every=20", "run.eval_samples=4", "checkpoint.every=5")
    ended = train(bench, paced, run_dir, *options)
    assert ended.status == 0, ended.err
    assert not events(run_dir, "verdict")
    assert not events(run_dir, "fault")
