"""Rayfold inside Ray Train: `train_loop` is the function that a `TorchTrainer` runs on each of its workers.

    trainer = TorchTrainer(
        train_loop,
        train_loop_config=loop_config("examples/quickstart.toml", "run.steps=500"),
        scaling_config=ScalingConfig(num_workers=2),
        run_config=RunConfig(failure_config=FailureConfig(max_failures=3)),
    )

Ray Train places the workers, joins them to a process group, watches them, and starts all of them anew when
one is lost. Inside, the runtime's own trainer does what it does under any launcher. This file is the driver's
side; `train_rank.py` is a worker's.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

try:
    import ray.train  # noqa: F401 (what is missing is said here, before anything is started)
except ImportError as error:
    raise ImportError(f"Ray Train cannot be imported ({error}); pip install 'rayfold[train]'") from error

from ..runtime.config import ConfigError, RunConfig, check_config, read_config
from .home import Home
from .train_pointer import CheckpointLost, Durable, durable_checkpoint

__all__ = ["CheckpointLost", "Durable", "durable_checkpoint", "loop_config", "train_loop"]


def loop_config(config: str | Path | Mapping[str, Mapping[str, Any]], *overrides: str) -> dict[str, Any]:
    """The `train_loop_config` for `train_loop`: keys of a TOML file with `section.key=value` overrides, or a
    mapping of sections.

    It is read and checked here, where relative paths and module names mean what the driver means by them.
    Raises ConfigError with every problem found.
    """
    if not isinstance(config, Mapping):
        path = Path(config)
        return _packed(read_config(path, overrides), Home.of_command(path))
    if overrides:
        raise ConfigError(
            f"loop_config was given overrides ({', '.join(overrides)}) over a mapping; put them into the "
            "mapping, or give the path of a TOML file"
        )
    return _packed(check_config(config), Home.of_command(Path("config.toml")))


def train_loop(config: dict[str, Any]) -> dict[str, Any] | None:
    """Train one rank to the end of the run; `config` is what `loop_config` made.

    Ray Train calls it on every worker. Returns the summary of the run on rank 0, which becomes the result's
    `return_value`. Raises ConfigError when the configuration and the workers do not fit together.
    """
    if config.keys() != {"config", "home"}:
        raise ConfigError(
            f"train_loop_config has the keys {sorted(config)}; make it on the driver with "
            'rayfold.cluster.train.loop_config("config.toml", "section.key=value", ...)'
        )
    from .train_rank import train_rank  # with torch and the trainer, which the driver has no use for

    folder, *module_folders = config["home"]
    return train_rank(check_config(config["config"]), Home(folder, tuple(module_folders)))


def _packed(config: RunConfig, home: Home) -> dict[str, Any]:
    """Plain values: Ray Train writes what it is given into its own records."""
    return {"config": config.to_dict(), "home": [home.folder, *home.module_folders]}
