"""The `rayfold` command. Each verb checks what it is given, calls one function of the house, and says how it
went.

Exit status: 0 done (also when stopped on request), 1 the run failed, 2 the command or the configuration is
wrong, 130 stopped at once by a second Ctrl-C.
"""

import json
import os
import sys
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text
from typer.core import TyperCommand

from ..faulttol.campaign import read_campaign, schedule
from ..faulttol.outcome import report_table
from ..runtime.config import ConfigError, CustomModel, documented_keys, read_settings
from ..runtime.journal import SUMMARY, Journal
from ..runtime.plan import RunPlan, plan_settings
from ..runtime.resume import check_goes_on, newest_step
from .chaos import (
    EXAMPLE,
    Chaos,
    check_campaign,
    failure_of_campaign,
    kinds_table,
    planned_lines,
    run_chaos,
)
from .chaos import REPORT as CHAOS_REPORT
from .claim import claim
from .home import Home
from .interrupts import StoppedAtOnce

app = typer.Typer(
    name="rayfold",
    help="Train large models on a Ray cluster, or on this laptop, by the same command.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback(invoke_without_command=True)
def _rayfold(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        print(metadata.version("rayfold"))
        raise typer.Exit


data_app = typer.Typer(help="Prepare text for training.", no_args_is_help=True)
app.add_typer(data_app, name="data")

errors = Console(stderr=True, highlight=False, soft_wrap=True)

ConfigPath = Annotated[Path, typer.Argument(help="TOML file; see `rayfold config` for every key.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="Keys put over the file, as in optim.lr=1e-3 run.steps=500.", metavar="KEY=VALUE"),
]
AsJson = Annotated[bool, typer.Option("--json", help="End standard output with one JSON object.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress, only the result.")]


class _WithKeys(TyperCommand):
    """A command whose help ends with every configuration key."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        super().format_help(ctx, formatter)
        Console().print(_keys_table())


@app.command(cls=_WithKeys)
def train(
    config: ConfigPath,
    overrides: Overrides = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Print configuration, layout and memory per rank; start nothing."),
    ] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Start a run, or go on where its folder stands: the same command does both."""
    plan = _plan(config, overrides)
    home = Home.of_command(config)
    home.enter()
    if dry_run:
        from .plan import show_dry_run  # with torch, by which memory is counted

        show_dry_run(plan, as_json=as_json)
        return
    run = plan.config.run
    run_dir = plan.config.run_dir
    check_goes_on(run_dir, plan.config)
    if newest_step(run_dir) >= run.steps:
        _say(f"{run_dir} is finished at step {newest_step(run_dir)}; raise run.steps to train further", quiet)
        _end(_finished_summary(plan), as_json=as_json, quiet=quiet)
        return
    _check_what_it_names(plan)
    _end(_run(plan, home, quiet), as_json=as_json, quiet=quiet)


class _WithKinds(TyperCommand):
    """A command whose help ends with every kind of fault."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        super().format_help(ctx, formatter)
        Console().print(EXAMPLE, markup=False, highlight=False)
        Console().print(kinds_table())


@app.command(cls=_WithKinds)
def chaos(
    campaign: Annotated[Path, typer.Argument(help="TOML file that lists faults; see below.")],
    config: ConfigPath,
    overrides: Overrides = None,
    seed: Annotated[
        int, typer.Option(help="Draws ranks and steps; the same file and seed give the same faults.")
    ] = 0,
    out: Annotated[
        Path | None, typer.Option("--report", help="JSON file to write; default RUN/chaos.json.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print which faults are due when; start nothing.")
    ] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Train as `rayfold train` does, injure the run on purpose, and report whether it kept its promises.

    Faults come one after another: the next waits until the last is made up for. Each is held against its
    promise, and its recovery is cut into detect, decide, fence, regroup, restore and catch up. Only processes
    of this run are touched, and only on this machine.

    Exit 1 if a promise was broken, the run did not finish, or nothing was injected. Start from
    examples/chaos.toml.
    """
    asked = read_campaign(campaign)
    plan = _plan(config, overrides)
    home = Home.of_command(config)
    home.enter()
    check_campaign(asked, plan)
    run_dir = plan.config.run_dir
    planned = schedule(asked, seed, plan.layout)
    if dry_run:
        faults = [vars(fault) for fault in planned]
        print(json.dumps({"faults": faults}) if as_json else "\n".join(planned_lines(planned)))
        return
    check_goes_on(run_dir, plan.config)
    _check_what_it_names(plan)
    made = Chaos(campaign=asked, planned=planned, seed=seed, report=out or run_dir / CHAOS_REPORT)
    report = run_chaos(made, run_dir, home, lambda at: _run(plan, at, quiet))
    if as_json:
        print(json.dumps(report))
    elif not quiet:
        print(report_table(report))
        print(f"\nreport: {made.report}")
    if (failed := failure_of_campaign(report)) is not None:
        errors.print(failed, markup=False)
        raise typer.Exit(1)


@app.command(cls=_WithKeys)
def plan(
    config: ConfigPath,
    overrides: Overrides = None,
    schedule: Annotated[
        bool, typer.Option("--schedule", help="Show the work of a pipeline's ranks over time.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option("--out", help="Draw the schedule to this file, an SVG image.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Print the layout of a run, its ranks, their memory and their schedule; start nothing."""
    made = _plan(config, overrides)
    Home.of_command(config).enter()
    from .plan import show_plan

    show_plan(made, schedule=schedule, out=out, as_json=as_json)


@app.command()
def config(as_json: AsJson = False) -> None:
    """Document every configuration key: type, default, unit."""
    if as_json:
        keys = [{**vars(key), "default": _default(key.default)} for key in documented_keys()]
        print(json.dumps({"keys": keys}))
        return
    Console().print(_keys_table())


@app.command()
def kernels(
    device: Annotated[str, typer.Option(help='Where to look: "auto", "cpu" or "cuda".')] = "auto",
    threads: Annotated[
        int, typer.Option(help="Threads of the CPU; a run with a rank a core gives each rank one.", min=1)
    ] = 1,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """List the operators of a step: the path each takes on this machine, why, and its time against plain
    PyTorch.
    """
    from .kernels import survey

    survey(device, threads=threads, as_json=as_json, quiet=quiet)


@data_app.command("tokenize")
def tokenize(
    source: Annotated[str, typer.Argument(help='File, folder, glob, or "stdlib".')],
    out: Annotated[Path, typer.Argument(help="Folder for tokenizer.json, index.json and the shards.")],
    vocab_size: Annotated[
        int, typer.Option(help="Size of the vocabulary that is trained, in tokens.")
    ] = 8192,
    tokenizer: Annotated[
        str | None, typer.Option(help="Use this tokenizer.json instead of training one.")
    ] = None,
    column: Annotated[str, typer.Option(help="Column or key of the text.")] = "text",
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Train a byte-level BPE on a source and write it as tokenized shards; run again to go on after an
    interruption.
    """
    from .tokenize import run_tokenize

    summary = run_tokenize(
        source, out, vocab_size=vocab_size, tokenizer=tokenizer, column=column, quiet=quiet
    )
    _result(summary, as_json=as_json, quiet=quiet)


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="Folder of a run.")],
    out: Annotated[Path, typer.Argument(help="New folder for the weights.")],
    to: Annotated[str, typer.Option("--to", help="Format: hf (Hugging Face Llama).")] = "hf",
    as_json: AsJson = False,
) -> None:
    """Write the newest checkpoint of a run as standard weights."""
    if to != "hf":
        raise ConfigError(f'--to {to}: only "hf" is known')
    from .export import export_run

    _result(export_run(run, out), as_json=as_json, quiet=False)


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="Folder of a run.")],
    out: Annotated[Path | None, typer.Option("--out", help="File to write; default RUN/report.html.")] = None,
    as_json: AsJson = False,
) -> None:
    """Write one self-contained HTML page about a run."""
    from ..runtime.report import write_report

    _result({"report": str(write_report(run, out))}, as_json=as_json, quiet=False)


def main() -> None:
    """Entry point of the command."""
    try:
        sys.exit(app(standalone_mode=False))  # typer returns the status of an Exit, of Ctrl-C too
    except (Exception, StoppedAtOnce) as error:
        sys.exit(_explain(error))


def _explain(error: BaseException) -> int:
    """Say what went wrong as the last lines of standard error; returns the exit status."""
    if hasattr(error, "format_message"):  # how typer reports a wrong command line
        errors.print(f"rayfold: {error.format_message()}", markup=False)
        return 2
    ours = type(error).__module__.startswith("rayfold.")
    if ours and isinstance(error, ValueError):  # every mistake of the user's is a ValueError of its folder
        errors.print(str(error), markup=False)
        return 2
    if isinstance(error, StoppedAtOnce):
        errors.print("stopped at once; the last durable checkpoint stands", markup=False)
        return 130
    if (ours and isinstance(error, RuntimeError)) or isinstance(error, OSError):
        errors.print(f"rayfold: {error}", markup=False)
        return 1
    raise error


def _finished_summary(plan: RunPlan) -> dict[str, Any]:
    """The summary of a run that has all its steps; made now if a kill came between them and it."""
    run_dir, layout = plan.config.run_dir, plan.layout
    path = run_dir / SUMMARY
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    if found.get("status") == "finished":
        return found
    journal = Journal(run_dir)
    journal.event("run_finished", newest_step(run_dir), status="finished")
    made = journal.summary("finished", world_size=layout.world_size, layout=str(layout))
    journal.close()
    return made


def _run(plan: RunPlan, home: Home, quiet: bool) -> dict[str, Any]:
    """Train in the run's folder, alone there; the summary."""
    run_dir = plan.config.run_dir
    run_dir.mkdir(parents=True, exist_ok=True)
    with claim(run_dir):
        from .launch import launch  # Ray takes a second to import; wrong configurations need not wait for it

        return launch(plan, home=home, quiet=quiet)


def _plan(path: Path, overrides: list[str] | None) -> RunPlan:
    asked = read_settings(path, overrides or [])
    gpus = 0 if asked.config.run.device == "cpu" else _local_gpus()
    return plan_settings(asked, cpus=os.cpu_count() or 1, gpus=gpus)


def _local_gpus() -> int:
    """GPUs of this machine by Ray's own count, without importing torch."""
    from ray._private.accelerators.nvidia_gpu import NvidiaGPUAcceleratorManager

    return NvidiaGPUAcceleratorManager.get_current_node_num_accelerators()


def _check_what_it_names(plan: RunPlan) -> None:
    """Find a missing source or model in the first seconds; a cluster's machines may see other files, so there
    it waits for them.
    """
    if plan.config.run.address != "local":
        return
    from ..runtime.data.blocks import list_blocks

    list_blocks(plan.config.data)
    if isinstance(plan.config.model, CustomModel):
        from .own_model import check_own_model  # imports torch, as the user's module does

        check_own_model(plan, plan.config.model)


def _keys_table() -> Table:
    table = Table(
        title=Text("Configuration keys (file: [section] key = value; command line: section.key=value)")
    )
    for column in ("key", "type", "default", "unit", "meaning"):
        table.add_column(column, overflow="fold", no_wrap=column == "key")
    for key in documented_keys():
        default = _default(key.default)
        shown = "" if default is None else json.dumps(default)
        table.add_row(f"{key.section}.{key.name}", key.type, shown, key.unit, key.doc)
    return table


def _default(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _end(summary: dict[str, Any], *, as_json: bool, quiet: bool) -> None:
    """Report a run's summary; exits with 1 and the verdict as the last line when it failed."""
    _result(summary, as_json=as_json, quiet=quiet)
    if summary["status"] == "failed":
        errors.print(" ".join(str(summary.get("verdict", "failed")).split()), markup=False)
        raise typer.Exit(1)


def _result(values: dict[str, Any], *, as_json: bool, quiet: bool) -> None:
    if as_json:
        print(json.dumps(values))
    elif not quiet:
        for key, value in values.items():
            print(f"{key:>14}  {value}")


def _say(text: str, quiet: bool) -> None:
    if not quiet:
        errors.print(text, markup=False)


if __name__ == "__main__":
    main()
