"""What a failed run tells the user: one sentence with rank, step, cause and place, and not in Ray's words.

Runs here do not recover (`snapshot.enabled = false`) where they could; test_recovery.py has those that do.
"""

import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest
from commands import Bench, Ended, events, reached, wait_until

NO_RECOVERY = "snapshot.enabled=false"
CAMPAIGN = pytest.mark.campaign  # a second case of the same kind


def check_verdict(ended: Ended, run_dir: Path, *, cls: str, ranks: list[int]) -> dict[str, Any]:
    """A failed run says the same in its last line, its events and its summary; returns the event."""
    assert ended.status == 1, ended.err
    verdict = events(run_dir, "verdict")[-1]
    assert verdict["sentence"] == ended.verdict
    assert (verdict["class"], verdict["ranks"]) == (cls, ranks), verdict
    for jargon in ("ActorDied", "RayTaskError", "Owner", "actor_id"):
        assert jargon not in ended.err
    assert "Traceback" not in ended.err
    return verdict


@pytest.mark.ray
def test_an_exception_is_told_with_rank_step_message_and_place(
    bench: Bench, paced: Path, run_dir: Path
) -> None:
    """The peers fail too, a moment later, because rank 1 left; theirs is not the verdict."""
    ended = bench.run(
        "train", paced, "model.trouble=raise", "model.rank=1", "model.step=3", NO_RECOVERY, "--json"
    )
    verdict = check_verdict(ended, run_dir, cls="exception", ranks=[1])
    assert "rank 1 failed at step 3: ArithmeticError: the flux capacitor is empty" in ended.verdict
    assert re.search(rf"{paced.with_name('paced.py')}:\d+ in make_trouble", ended.verdict)
    assert "ArithmeticError" in verdict["evidence"]["traceback"]
    assert any("in forward" in frame for frame in verdict["evidence"]["frames"])
    assert ended.result["status"] == "failed"
    assert ended.result["verdict"] == ended.verdict
    assert ended.result["steps"] == 2, "the record holds every finished step"


@pytest.mark.ray
@pytest.mark.parametrize("number", [signal.SIGKILL, pytest.param(signal.SIGSEGV, marks=CAMPAIGN)])
def test_a_dead_worker_is_named_with_its_signal(
    bench: Bench, paced: Path, run_dir: Path, number: signal.Signals
) -> None:
    """An out-of-memory killer leaves no traceback; the sentence must still say which rank and how it died."""
    command = bench.start("train", paced, "model.pause_s=0.1", "run.steps=1000", NO_RECOVERY)
    reached(run_dir, 3)
    (formed,) = events(run_dir, "formed")
    os.kill(formed["pids"][1], number)
    verdict = check_verdict(command.wait(90), run_dir, cls="died", ranks=[1])
    assert "rank 1 died at step" in verdict["sentence"]
    assert f"was killed by {number.name}" in verdict["sentence"]


@pytest.mark.ray
@pytest.mark.parametrize("how", ["asleep", pytest.param("stopped", marks=CAMPAIGN)])
def test_a_silent_rank_is_named_and_the_run_ends(bench: Bench, paced: Path, run_dir: Path, how: str) -> None:
    """A rank that hangs fails nowhere; its peers' timeout names it, and it is ended although it is deaf."""
    trouble = ("model.trouble=sleep", "model.rank=1", "model.step=4") if how == "asleep" else ()
    options = ("model.pause_s=0.1", "run.steps=1000", "run.collective_timeout_s=5", "checkpoint.every=0")
    command = bench.start("train", paced, *options, *trouble, NO_RECOVERY)
    reached(run_dir, 3)
    if how == "stopped":
        os.kill(events(run_dir, "formed")[0]["pids"][1], signal.SIGSTOP)
    verdict = check_verdict(command.wait(90), run_dir, cls="silent", ranks=[1])
    assert "rank 1 did not come to step" in verdict["sentence"]
    assert ("is alive but stuck" if how == "asleep" else "does not answer") in verdict["sentence"]


@pytest.mark.ray
def test_a_model_that_cannot_be_built_is_told_before_the_first_step(
    bench: Bench, paced: Path, run_dir: Path
) -> None:
    """A mistake in the user's own factory, found where it is called."""
    ended = bench.run("train", paced, "model.trouble=build")
    check_verdict(ended, run_dir, cls="exception", ranks=events(run_dir, "verdict")[-1]["ranks"])
    assert "failed before the first step: ValueError: no such crystal" in ended.verdict
    assert "paced.py:" in ended.verdict


@pytest.mark.ray
@CAMPAIGN
def test_a_source_without_readable_text_ends_with_the_reason(
    bench: Bench, small: Path, text: Path, run_dir: Path
) -> None:
    """What the workers find wrong in the data is the user's to mend: the sentence says what and where."""
    for path in text.iterdir():
        path.unlink()
    (text / "broken.parquet").write_bytes(b"PAR1 this is no Parquet file PAR1")
    ended = bench.run("train", small)
    ranks = events(run_dir, "verdict")[-1]["ranks"]  # every rank says so; those heard in time are named
    check_verdict(ended, run_dir, cls="exception", ranks=ranks)
    assert set(ranks) <= {0, 1}
    assert "before the first step: DataError" in ended.verdict
    assert "raise DataError" not in ended.verdict, "where Rayfold found it out is no help"
    assert "broken.parquet" in ended.verdict
    assert wait_until(lambda: not bench.sessions(), 5, "the end of the session")
