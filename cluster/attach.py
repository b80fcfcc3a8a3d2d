"""Whether a command means the run that is under way in its folder."""

from pathlib import Path
from typing import Any

FREE = frozenset({("run", "address")})  # one cluster has many addresses


class RunDiffers(ValueError):
    """A run is under way in the folder, and the command describes another one."""


def check_same(theirs: dict[str, dict[str, Any]], ours: dict[str, dict[str, Any]], *, run_dir: Path) -> None:
    """Compare two configurations as plain values. Raises RunDiffers naming every key that is not the same."""
    changed = []
    for section in ours:
        for key in sorted(theirs[section].keys() | ours[section].keys()):
            before, now = theirs[section].get(key), ours[section].get(key)
            if (section, key) not in FREE and before != now:
                changed.append(f"{section}.{key} is {before!r} there and {now!r} here")
    if changed:
        raise RunDiffers(
            f"{run_dir}: a run is under way there, and this command describes another: {'; '.join(changed)}. "
            "Give it the same values to watch that run and to stop it with Ctrl-C, or choose another run.name"
        )
