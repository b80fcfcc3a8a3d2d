"""`rayfold kernels`: what each operator does on this machine, measured while one waits."""

import json
from dataclasses import asdict

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from ..kernels.survey import Timing, cases, measure, operators
from ..runtime.config import ConfigError


def survey(device: str, *, threads: int, as_json: bool, quiet: bool) -> None:
    """Time every operator on `device` and print what was found. Raises ConfigError for a device that is not
    there.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise ConfigError(f'--device {device}: is none of "auto", "cpu", "cuda"; nearest: "auto"')
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: no CUDA device is here; use --device cpu")
    kind = "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    torch.set_num_threads(threads)
    todo = list(cases(torch.device(kind)))
    timings = []
    with Progress(console=Console(stderr=True), disable=quiet, transient=True) as progress:
        for case in progress.track(todo, description=f"timing {len(todo)} cases on {kind}"):
            timings.append(measure(case))
    if as_json:
        lines = [{**asdict(t), "ratio": t.ratio, "what": operators()[t.operator]} for t in timings]
        print(json.dumps({"device": kind, "threads": torch.get_num_threads(), "operators": lines}))
    elif not quiet:
        console = Console(highlight=False)
        console.print(_table(timings, f"Operators on {kind}, forward and backward, {threads} thread(s)"))
        for name, what in operators().items():
            reasons = {t.why: f"{t.dtype} {t.path}" for t in timings if t.operator == name}
            console.print(f"[bold]{name}[/]: {what}", *(f"\n  {p}: {why}" for why, p in reasons.items()))


def _table(timings: list[Timing], title: str) -> Table:
    table = Table(title=title)
    for column in ("operator", "dtype", "path"):
        table.add_column(column, no_wrap=True)
    for column in ("ms", "plain ms", "times faster"):
        table.add_column(column, justify="right")
    for t in timings:
        figures = (f"{1e3 * t.seconds:.2f}", f"{1e3 * t.reference_seconds:.2f}", f"{t.ratio:.2f}")
        table.add_row(t.operator, t.dtype, t.path, *figures)
    return table
