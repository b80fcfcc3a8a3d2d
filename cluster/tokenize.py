"""`rayfold data tokenize`: a progress bar around `runtime.data.tokenize`."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from ..runtime.config import ConfigError
from ..runtime.data.config import DataConfig
from ..runtime.data.tokenize import tokenize_source


def run_tokenize(
    source: str, out: Path, *, vocab_size: int, tokenizer: str | None, column: str, quiet: bool
) -> dict[str, Any]:
    """Tokenize `source` into `out`, or go on with it; returns plain values. Raises DataError."""
    config = DataConfig(source=source, column=column)
    if problems := config.problems():
        raise ConfigError("\n".join(f"{key}: {message}" for key, message in problems))
    columns = (TextColumn("{task.description}"), BarColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True, quiet=quiet)) as bar:
        task = bar.add_task("reading", total=None)

        def show(done: int, total: int, what: str) -> None:
            bar.update(task, completed=done, total=total, description=what)

        summary = tokenize_source(
            config, out, vocab_size=None if tokenizer else vocab_size, tokenizer=tokenizer, progress=show
        )
    return {key: str(value) if isinstance(value, Path) else value for key, value in asdict(summary).items()}
