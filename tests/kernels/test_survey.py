"""The survey that `rayfold kernels` prints: every operator, on the path that training would take."""

import json
import subprocess
import sys

import pytest
import torch

from rayfold.kernels.dispatch import OPERATORS, choose
from rayfold.kernels.survey import cases, measure


def test_every_operator_is_surveyed_in_the_dtypes_of_training() -> None:
    """An operator that is left out would be one whose choice nobody can look up."""
    found = {(case.operator, case.dtype) for case in cases(torch.device("cpu"))}
    assert {operator for operator, _ in found} == set(OPERATORS)
    assert all((name, torch.bfloat16) in found for name in OPERATORS if name != "adamw")


def test_a_timing_is_of_the_path_that_auto_takes() -> None:
    """The figure beside a path must be that path's own; a reference is compared with itself only."""
    for case in cases(torch.device("cpu")):
        if case.operator in ("norm", "gate", "rope"):
            timing = measure(case, repeats=1)
            assert timing.path == choose(case.operator, case.sample).path
            assert timing.seconds > 0
            assert (timing.ratio == 1.0) == (timing.path == "reference")


@pytest.mark.parametrize(
    ("arguments", "said"), [(["--device", "tpu"], "cpu"), (["--threads", "0"], "threads")]
)
def test_a_wrong_question_is_answered_with_what_can_be_asked(arguments: list[str], said: str) -> None:
    """Exit status 2 and the choices, before anything is timed."""
    command = [sys.executable, "-m", "rayfold.cluster.cli", "kernels", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert said in done.stderr


@pytest.mark.timeout(600)  # 17 cases, some seconds on a machine of its own
def test_json_is_one_object_with_every_case() -> None:
    """What other tools read: nothing else on standard output."""
    command = [sys.executable, "-m", "rayfold.cluster.cli", "kernels", "--json", "--quiet", "--device", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, check=True)
    found = json.loads(done.stdout)
    assert found["device"] == "cpu"
    assert {one["operator"] for one in found["operators"]} == set(OPERATORS)
    assert all(one["why"] and one["seconds"] > 0 for one in found["operators"])
