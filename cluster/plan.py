"""`rayfold plan`: what a configuration comes to, before anything starts."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from ..models.llama_config import LlamaConfig
from ..parallel.folding import coordinate, dense_view
from ..parallel.schedules import order_of
from ..parallel.timeline import Durations, Timeline, in_flight, simulate
from ..runtime.config import ConfigError, write_toml
from ..runtime.journal import write_atomically
from ..runtime.memory import RankMemory, estimate_memory
from ..runtime.plan import RunPlan
from ..runtime.schedule_chart import Cell, draw_schedule, text_rows
from .machine import machine_bytes, shared_memory_bytes

COLOURS = {
    "": "",
    "F": "bold white on blue",
    "B": "bold white on green",
    "I": "black on cyan",
    "W": "white on magenta",
}
NO_PIPELINE = (
    "no pipeline: parallel.pp = 1. One of two ranks: parallel.pp=2 run.workers=2; its order of work is "
    "parallel.pipeline_schedule"
)


def show_plan(plan: RunPlan, *, schedule: bool, out: Path | None, as_json: bool) -> None:
    """Print layout, ranks and memory of a rank; with `schedule` a pipeline's work over time, drawn to `out`.

    Raises ConfigError where there is nothing to draw.
    """
    if out is not None and out.suffix != ".svg":
        raise ConfigError(f"--out {out}: the image is an SVG; write --out {out.with_suffix('.svg')}")
    if out is not None and plan.layout.pp == 1:
        raise ConfigError(f"--out {out}: there is nothing to draw, {NO_PIPELINE}")
    estimate = estimate_memory(plan)
    memory, no_room = estimate.as_dict(), room_for_snapshots(plan, estimate)
    timeline = _timeline(plan) if (schedule or out) and plan.layout.pp > 1 else None
    if out is not None and timeline is not None:
        labels = [f"pp {rank}, {_stages(plan, rank)}" for rank in range(plan.layout.pp)]
        write_atomically(out, draw_schedule(timeline, title=_title(plan, timeline), labels=labels))
    if as_json:
        print(json.dumps({**_as_dict(plan, memory, timeline), "no_snapshots": no_room}))
        return
    _print_layout(plan, memory)
    if no_room is not None:
        print(f"no snapshots in memory here: {no_room}")
    if timeline is not None:
        _print_schedule(plan, timeline)
    elif schedule:
        print(f"\n{NO_PIPELINE}")


def show_dry_run(plan: RunPlan, *, as_json: bool) -> None:
    """Print the configuration, layout and memory per rank of what `train` would start."""
    estimate = estimate_memory(plan)
    memory, no_room = estimate.as_dict(), room_for_snapshots(plan, estimate)
    if as_json:
        layout = vars(plan.layout)
        print(json.dumps({"config": plan.config.to_dict(), "layout": layout, "memory_per_rank": memory}))
        return
    print(write_toml(plan.config))
    print(f"# layout: {plan.layout}, {plan.layout.world_size} ranks on {plan.device}")
    for name, size in memory.items():
        print(f"# memory per rank: {name:>15} {size / 2**20:12,.1f} MiB")
    if no_room is not None:
        print(f"# no snapshots in memory here: {no_room}")


def room_for_snapshots(plan: RunPlan, memory: RankMemory) -> str | None:
    """Why a run of this machine alone would go without snapshots; None where it need not, and for a cluster,
    whose machines are seen only when the run is there.

    Raises ConfigError where `snapshot.enabled = true` asks for them by name.
    """
    config = plan.config
    if config.run.address != "local" or config.snapshot.enabled is False:
        return None
    lacking = config.snapshot.why_no_room(
        state_bytes=memory.state,
        ranks=plan.layout.world_size,
        arena=plan.device == "cpu",
        memory_bytes=machine_bytes(),
        shm_bytes=shared_memory_bytes(),
    )
    if lacking is not None and config.snapshot.enabled is True:
        raise ConfigError(f"snapshot.enabled: is true, and {lacking}")
    return lacking


def _print_layout(plan: RunPlan, memory: dict[str, int]) -> None:
    layout, batch = plan.layout, plan.config.batch
    print(f"layout   {layout}")
    print(f"ranks    {layout.world_size} on {plan.device}")
    apart = layout.world_size
    for axis, size in dense_view(layout).items():
        apart //= size
        if size > 1:
            print(f"         {axis:>12}: {size} ranks, {apart} apart")
    rows = batch.micro(layout)
    print(
        f"batch    {batch.size} sequences a step: {_microbatches(plan)} micro-batches of {rows} on each of "
        f"{layout.dp_size} data parallel ranks"
    )
    if layout.pp > 1:
        for rank in range(layout.pp):
            each = layout.world_size // layout.pp
            print(f"stages   ranks {rank * each} to {(rank + 1) * each - 1}: {_stages(plan, rank)}")
    print(f"memory   of {'the fullest' if layout.pp > 1 else 'a'} rank")
    for name, size in memory.items():
        print(f"         {name:>15} {size / 2**20:12,.1f} MiB")


def _print_schedule(plan: RunPlan, timeline: Timeline) -> None:
    print(f"\n{_title(plan, timeline)}")
    console = Console(highlight=False)
    # a terminal shows what fits; a file or a pipe gets all
    room = shutil.get_terminal_size().columns - 8 if console.is_terminal else None
    hidden = False
    for rank, cells in enumerate(text_rows(timeline)):
        line = _coloured(cells)
        if room is not None and line.cell_len > room:
            line, hidden = line[:room], True
        console.print(Text.assemble(f"pp {rank:<4} ", line), soft_wrap=True)
    if hidden:
        print("        ... goes on to the right; --out FILE.svg draws all of it")
    print(f"micro-batches whose activations are held at once, at most: {_held(plan)}")


def _coloured(cells: Sequence[Cell]) -> Text:
    line = Text()
    for text, kind in cells:
        line.append(text.rstrip(" ") if kind else text, style=COLOURS[kind])
        line.append(" " if kind else "")
    return line


def _title(plan: RunPlan, timeline: Timeline) -> str:
    layout, count, unit = plan.layout, _microbatches(plan), "layer" if _uneven(plan) else "stage"
    return (
        f"{layout.schedule}: {layout.stages} stages on {layout.pp} ranks, {count} micro-batches, "
        f"{timeline.bubble:.1%} of the time waiting (a {unit} takes 1 forward and 2 backward)"
    )


def _timeline(plan: RunPlan) -> Timeline:
    layers = [len(span) for span in _layers(plan)]
    durations = Durations(stages=layers if _uneven(plan) else ())
    return simulate(order_of(plan.layout, _microbatches(plan)), durations)


def _uneven(plan: RunPlan) -> bool:
    return len({len(layers) for layers in _layers(plan)}) > 1


def _layers(plan: RunPlan) -> list[range]:
    """The layers of each stage, as far as they are known before the model is built."""
    model, layout = plan.config.model, plan.layout
    total = model.shape().layers if isinstance(model, LlamaConfig) else sum(layout.stage_layers)
    return [layout.layers_of(stage, total) for stage in range(layout.stages)] if total else []


def _stages(plan: RunPlan, rank: int) -> str:
    """What a pipeline rank holds, in words."""
    stages, layers = plan.layout.stages_of(rank), _layers(plan)
    spans = [f"{span[0]} to {span[-1]}" if len(span) > 1 else f"{span[0]}" for span in layers]
    told = ", ".join(map(str, stages))
    where = f" (layers {'; '.join(spans[stage] for stage in stages)})" if layers else ""
    return f"stage{'s' if len(stages) > 1 else ''} {told}{where}"


def _microbatches(plan: RunPlan) -> int:
    """Of one step on each data parallel rank."""
    batch, layout = plan.config.batch, plan.layout
    return batch.size // layout.dp_size // batch.micro(layout)


def _held(plan: RunPlan) -> str:
    most = in_flight(order_of(plan.layout, _microbatches(plan)))
    each = plan.layout.stages // plan.layout.pp
    return ", ".join(map(str, most)) + (f" (of one of {each} stages)" if each > 1 else "")


def _as_dict(plan: RunPlan, memory: dict[str, int], timeline: Timeline | None) -> dict[str, Any]:
    layout, layers = plan.layout, _layers(plan)
    ranks = []
    for rank in range(layout.world_size):
        place = coordinate(dense_view(layout), rank)
        stages = list(layout.stages_of(place["pp"]))
        held = [[layers[stage].start, layers[stage].stop] for stage in stages] if layers else None
        ranks.append({"rank": rank, **place, "stages": stages, "layers": held})
    made: dict[str, Any] = {
        "config": plan.config.to_dict(),
        "layout": vars(layout),
        "microbatches": _microbatches(plan),
        "ranks": ranks,
        "memory_per_rank": memory,
        "schedule": None,
    }
    if timeline is not None:
        made["schedule"] = {
            "name": layout.schedule,
            "bubble": timeline.bubble,
            "length": timeline.length,
            "held": in_flight(order_of(layout, _microbatches(plan))),
            "steps": [[[str(t.step), t.start, t.end] for t in steps] for steps in timeline.ranks],
        }
    return made
