"""Whether a command means the run that is under way in its folder, and whether it may write there."""

from pathlib import Path

import pytest

from rayfold.cluster import claim as claim_module
from rayfold.cluster.attach import RunDiffers, check_same
from rayfold.cluster.claim import RunBusy, claim, claim_record
from rayfold.cluster.controller import controller_name

OURS = {"run": {"steps": 100, "address": "127.0.0.1:6379"}, "optim": {"lr": 0.1}}


def test_the_same_run_is_the_same_by_whatever_address_its_cluster_is_joined(tmp_path: Path) -> None:
    """A head has a name, a number and "auto"."""
    theirs = {"run": {"steps": 100, "address": "auto"}, "optim": {"lr": 0.1}}
    check_same(theirs, OURS, run_dir=tmp_path)


def test_what_differs_is_named_with_both_values_also_where_one_does_not_set_it(tmp_path: Path) -> None:
    """Whoever reads it must know which of two commands to give."""
    theirs = {"run": {"steps": 200, "address": "auto", "name": "x"}, "optim": {"lr": 0.1}}
    with pytest.raises(RunDiffers, match=r"run\.name is 'x' there and None here; run\.steps is 200 there"):
        check_same(theirs, OURS, run_dir=tmp_path)


def test_a_record_is_held_by_one_and_free_when_it_lets_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The claim of a command is another one: its run may outlive it."""
    monkeypatch.setattr(claim_module, "RECORD_WAIT_S", 0.2)
    held = claim_record(tmp_path)
    with claim(tmp_path), pytest.raises(RunBusy, match=r"another run\.name"):
        claim_record(tmp_path)
    held.close()
    claim_record(tmp_path).close()


def test_a_folder_has_one_controller_however_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same command from another working directory finds the run again."""
    monkeypatch.chdir(tmp_path)
    assert controller_name(Path("runs/a")) == controller_name(tmp_path / "runs" / "b" / ".." / "a")
    assert controller_name(Path("runs/a")) != controller_name(Path("runs/b"))
