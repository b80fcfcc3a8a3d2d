"""Every command that the README prints works as it is printed."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from commands import Bench

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"^```sh\n(.*?)^```", re.DOTALL | re.MULTILINE)


def commands() -> list[str]:
    """Every command line of every `sh` block, in reading order, with continuation lines joined."""
    text = "".join(BLOCK.findall((ROOT / "README.md").read_text()))
    whole = text.replace("\\\n", " ").splitlines()
    return [line.removeprefix("$ ").strip() for line in whole if line.strip() and not line.startswith("#")]


def test_the_readme_has_commands_and_names_only_those_that_exist() -> None:
    """A README without a command to copy is none; an unknown program could not be run below."""
    found = commands()
    assert any(line.startswith("make train") for line in found)
    assert any(line.startswith("rayfold ") for line in found)
    assert {line.split()[0] for line in found} <= {"make", "rayfold"}


@pytest.mark.parametrize("line", [line for line in commands() if line.startswith("make ")])
def test_make_knows_what_the_readme_asks_of_it(line: str) -> None:
    """Only asked for its plan: `make test` would run this very test, `make train` trains for minutes."""
    ended = subprocess.run(
        ["make", "-n", *line.split()[1:]], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert ended.returncode == 0, ended.stderr


@pytest.mark.ray
@pytest.mark.timeout(600)  # as printed, one after the other: four small runs and a tokenization
def test_every_rayfold_command_of_the_readme_works_as_printed(bench: Bench) -> None:
    """In a fresh folder with the examples, in reading order: later ones use what earlier ones made."""
    shutil.copytree(
        ROOT / "examples", bench.folder / "examples", ignore=shutil.ignore_patterns("__pycache__")
    )
    path = f"{Path(sys.executable).parent}:{bench.env['PATH']}"
    for line in commands():
        if line.startswith("rayfold "):
            ended = subprocess.run(
                ["bash", "-c", line],
                cwd=bench.folder,
                env={**bench.env, "PATH": path},
                capture_output=True,
                text=True,
                timeout=120,
                check=False,
            )
            assert ended.returncode == 0, f"{line}\n{ended.stdout[-2000:]}\n{ended.stderr[-2000:]}"
