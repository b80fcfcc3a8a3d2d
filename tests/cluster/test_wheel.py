"""What is installed is what the repository holds: nothing is forgotten, and nothing else comes along."""

import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
from commands import Bench

ROOT = Path(__file__).parents[2]
PACKAGES = ("cluster", "faulttol", "kernels", "models", "parallel", "runtime")


def run(*args: str | Path, cwd: Path, timeout_s: float = 100) -> str:
    """Run a program to its end and return what it printed."""
    ended = subprocess.run(
        [str(arg) for arg in args], cwd=cwd, capture_output=True, text=True, timeout=timeout_s, check=False
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


@pytest.mark.timeout(600)  # builds a wheel and makes an environment
def test_the_wheel_holds_every_module_and_works_without_the_checkout(
    bench: Bench, small: Path, tmp_path: Path
) -> None:
    """A package forgotten in pyproject.toml works in the checkout and nowhere else."""
    source = tmp_path / "source"  # a copy: building writes into its folder
    source.mkdir()
    tracked = {"pyproject.toml", "README.md", "LICENSE", "__init__.py"}
    for path in [ROOT / name for name in tracked] + [p for d in PACKAGES for p in (ROOT / d).rglob("*.py")]:
        target = source / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    # no build isolation: setuptools is there, and nothing may be downloaded in a test
    isolated = [] if _has_setuptools() else ["--no-build-isolation"]
    run(
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        *isolated,
        "-w",
        tmp_path,
        source,
        cwd=tmp_path,
    )
    (wheel,) = tmp_path.glob("rayfold-*.whl")
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    expected = {f"rayfold/{p.relative_to(ROOT)}" for d in PACKAGES for p in (ROOT / d).rglob("*.py")}
    assert held == expected | {"rayfold/__init__.py"}

    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "env", cwd=tmp_path)
    site = next((tmp_path / "env").glob("lib/python*/site-packages"))
    run(sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", site, wheel, cwd=tmp_path)
    # the dependencies come from this environment, after the installed wheel
    (site / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    python = tmp_path / "env/bin/python"
    place = run(python, "-c", "import rayfold.runtime.config as c; print(c.__file__)", cwd=tmp_path)
    assert place.startswith(str(site)), "the installed one, not the checkout"
    assert "checkpoint.every" in run(python, "-m", "rayfold.cluster.cli", "train", "--help", cwd=tmp_path)
    shown = run(python, "-m", "rayfold.cluster.cli", "train", small, "--dry-run", cwd=tmp_path)
    assert "memory per rank" in shown


def _has_setuptools() -> bool:
    """Whether pip must fetch the build system itself, because this environment lacks it."""
    import importlib.util

    return importlib.util.find_spec("setuptools") is None
