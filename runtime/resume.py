"""Whether a command may go on in a run's folder: what a run is made of must not change under it."""

from pathlib import Path
from typing import Any

from .checkpoint.shelf import Shelf
from .config import ConfigError, RunConfig, read_config

# Sections whose keys decide what the numbers mean; everything else (steps, layout, batch, rates) may change.
_FIXED_SECTIONS = ("model", "data")
_FREE_KEYS = {
    ("model", "init_from"),
    ("data", "source"),
    ("data", "prefetch"),
}  # the index compares the source's content
_FIXED_KEYS = {("run", "seed")}


def newest_step(run_dir: Path) -> int:
    """Step of the newest committed checkpoint; 0 without one."""
    return next(iter(Shelf(run_dir / "checkpoints", keep=1).steps()), 0)


def check_goes_on(run_dir: Path, config: RunConfig) -> None:
    """Compare `config` with the one the run in `run_dir` has.

    Raises ConfigError naming every key that cannot change, with both values.
    """
    path = run_dir / "config.toml"
    if not path.exists() or not newest_step(run_dir):
        return
    changed = changes(read_config(path).to_dict(), config.to_dict())
    if changed:
        raise ConfigError("\n".join(_sentence(path, *change) for change in changed))


def changes(before: dict[str, dict[str, Any]], now: dict[str, dict[str, Any]]) -> list[tuple[str, Any, Any]]:
    """The keys that a run cannot change and that differ between two configurations, with both values."""
    changed = []
    for section in now:
        for key in sorted(before[section].keys() | now[section].keys()):
            fixed = section in _FIXED_SECTIONS or (section, key) in _FIXED_KEYS
            old, new = before[section].get(key), now[section].get(key)
            if fixed and (section, key) not in _FREE_KEYS and old != new:
                changed.append((f"{section}.{key}", old, new))
    return changed


def _sentence(path: Path, key: str, old: Any, new: Any) -> str:
    return (
        f"{path}: {key}: the run there was started with {old!r} and cannot go on with {new!r}; "
        f"keep {old!r}, or choose another run.name"
    )
