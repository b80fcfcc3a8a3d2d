"""What the user mistypes is answered in a second, all of it at once, and nothing is started or made."""

from pathlib import Path

import pytest
from commands import Bench, free_port


def test_every_problem_is_told_at_once_and_nothing_is_made(bench: Bench, small: Path, run_dir: Path) -> None:
    """Exit 2, each problem with where it stands and the nearest thing that works."""
    wrong = ("optim.lr=fast", "batch.sise=3", "modle.dim=4", "run.device=gpu", "run.workers=0")
    ended = bench.run("train", small, *wrong, timeout_s=30)
    assert ended.status == 2
    assert ended.out == ""
    for said in ("optim.lr", "nearest: batch.size", "nearest: [model]", 'nearest: "cpu"', "run.workers"):
        assert said in ended.err
    assert "Traceback" not in ended.err
    assert not run_dir.exists()


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("data.source=/nowhere/at/all",), "/nowhere/at/all"),
        (("batch.size=5", "run.workers=2"), "batch.size"),
        (("parallel.pp=64",), "model.layers"),
        (("run.eval_every=2", "data.val_fraction=0.0"), "run.eval_every"),
        (("model.preset=huge",), "llama3-8b"),
        (("steps=4",), "section.key=value"),
        (("--fast",), "--fast"),
    ],
)
def test_an_impossible_run_is_refused_before_it_starts(
    bench: Bench, small: Path, run_dir: Path, args: tuple[str, ...], said: str
) -> None:
    """What only shows when the keys are seen together is found as early as a wrong word."""
    ended = bench.run("train", small, *args, timeout_s=30)
    assert ended.status == 2, ended.err
    assert said in ended.err
    assert not run_dir.exists()


def test_a_missing_file_is_answered_with_its_neighbour(bench: Bench, small: Path) -> None:
    """A mistyped path is the commonest mistake of all."""
    ended = bench.run("train", small.with_name("smal.toml"), timeout_s=30)
    assert ended.status == 2
    assert "nearest" in ended.err
    assert str(small) in ended.err


def test_an_unknown_verb_and_a_folder_that_is_no_run_are_wrong_commands(bench: Bench) -> None:
    """Exit 2 for every verb, not only for train."""
    assert bench.run("trian", timeout_s=30).status == 2
    for verb in (("report", bench.folder), ("export", bench.folder, bench.folder / "out")):
        ended = bench.run(*verb, timeout_s=60)
        assert ended.status == 2, ended.err
        assert "Traceback" not in ended.err


@pytest.mark.ray
@pytest.mark.timeout(600)  # one whole run, and a second one up to reading its data
def test_a_run_refuses_another_model_and_another_source(
    bench: Bench, small: Path, text: Path, run_dir: Path
) -> None:
    """The model is compared before anything starts; the source by the workers, who can see it."""
    assert bench.run("train", small).status == 0
    ended = bench.run("train", small, "run.steps=16", "model.dim=64", "run.seed=3", timeout_s=30)
    assert ended.status == 2
    assert "model.dim" in ended.err
    assert "run.seed" in ended.err
    assert "dim = 32" in (run_dir / "config.toml").read_text(), "the run's own configuration stays"
    (text / "00.txt").write_text("Another text than the run was started with.\n")
    ended = bench.run("train", small, "run.steps=16")
    assert ended.status == 1
    assert "data.source changed" in ended.verdict
    assert "00.txt" in ended.verdict


@pytest.mark.ray
def test_a_cluster_that_nobody_answers_for_is_told_in_bounded_time(bench: Bench, small: Path) -> None:
    """Ray itself tries for more than a minute; one sentence says what to do, and at once."""
    ended = bench.run("train", small, f"run.address=127.0.0.1:{free_port()}", timeout_s=30)
    assert ended.status == 1
    assert "run.address" in ended.verdict
    assert "ray start --head" in ended.verdict
    assert "Traceback" not in ended.err
