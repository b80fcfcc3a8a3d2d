"""How long a run is down when a rank is killed, beside Ray Train, and how much of its time is useful.

    python benchmarks/recovery.py [--pairs 3] [--kills 3] [--seconds 120] [--ranks 2] [--only KIND ...]
                                  [KEY=VALUE ...]

One small Llama on two ranks, steps of some 0.2 s, a snapshot in memory at every one. Prints one JSON object a
line:

    spare      kill -9 of a drawn rank at a drawn instant; a warm process takes its place
    shrink     the same without a spare: the ranks left over go on, and a new one joins them later
    ray_train  the same model and data in Ray Train's TorchTrainer (FSDP2 on gloo, a checkpoint on disk every
               five steps): kill -9 of a drawn worker
    ratio      Ray Train's time over Rayfold's, pair by pair
    goodput    committed steps of a run with a kill every 15 s and every 60 s, over those of an undisturbed
               run of the same length beside it

`outside_s` is from the kill to the end of the next step, by the wall clock; the phases, and `phases_s`, their
sum, are what the run told of itself in events.jsonl (of Ray Train: how long until the workers ran again, and
from there). `injected` counts all kills, `kills` those that were made up for in the way that is measured: one
that comes before a new spare is up shrinks the run. A pair is one run of each kind, one after the other, in
alternating order. Times are medians with the smallest and the largest. Ray Train is left out where
`ray[train]` is not installed. Keys such as `data.seq_len=256` change the run of all kinds.
"""

import argparse
import importlib.util
import sys
from collections.abc import Callable, Sequence
from typing import Any

from figures import median, spread, tell
from killed_runs import Kill, Told, plain_run_killed, rayfold_run

KINDS = ("spare", "shrink", "ray_train", "goodput")
SMALL = ["data.seq_len=128", "batch.size=4"]  # a step takes some 0.2 s on two cores
SPARES = {"spare": 1, "shrink": 0}
ACTIONS = {"spare": "replace", "shrink": "shrink"}
SETTLE_S = {"spare": 20.0, "shrink": 25.0}  # between kills: a new spare is up, the run has grown back
EVERY_S = (15, 60)
BENCH = "recovery"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=3, help="runs of each kind (default 3)")
    parser.add_argument("--kills", type=int, default=3, help="in a run of Rayfold's (default 3)")
    parser.add_argument(
        "--seconds", type=float, default=120, help="length of the runs of goodput (default 120)"
    )
    parser.add_argument(
        "--ranks", type=int, default=2, help="of the run; fewer than cores leave one to a spare's start"
    )
    parser.add_argument("--only", nargs="+", choices=KINDS, default=KINDS, help="what to measure")
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE", help="put over the configuration")
    args = parser.parse_intermixed_args()
    settings = [f"run.workers={args.ranks}", *SMALL, *args.settings]
    down = [kind for kind in args.only if kind != "goodput"]
    if "ray_train" in down and importlib.util.find_spec("pandas") is None:  # which ray[train] brings
        down.remove("ray_train")
        print("Ray Train is left out: pip install 'ray[train]'", file=sys.stderr)
    if down:
        measure_kills(down, settings, ranks=args.ranks, pairs=args.pairs, kills=args.kills)
    if "goodput" in args.only:
        measure_goodput(settings, seconds=args.seconds, pairs=args.pairs)


def measure_kills(kinds: Sequence[str], settings: list[str], *, ranks: int, pairs: int, kills: int) -> None:
    """Pairs of runs; prints a line a kind, and the ratios."""
    found: dict[str, list[list[Kill]]] = {kind: [] for kind in kinds}
    step_s: dict[str, list[float]] = {kind: [] for kind in kinds}
    injected = dict.fromkeys(kinds, 0)
    for pair in range(pairs):
        for kind in kinds if pair % 2 == 0 else reversed(kinds):
            told, recovered = killed(kind, settings, ranks=ranks, kills=kills, seed=pair)
            found[kind].append(recovered)
            step_s[kind].append(told.step_s)
            injected[kind] += len(told.kills)
            say = ", ".join(f"{kill.outside_s:.2f} s" for kill in recovered)
            print(f"pair {pair + 1}/{pairs}: {kind} {say}", file=sys.stderr, flush=True)
    for kind in kinds:
        every = said_of([kill for run in found[kind] for kill in run])
        tell(BENCH, kind, injected=injected[kind], **every, step_s=median(step_s[kind]))
    for kind in [kind for kind in ACTIONS if kind in found and "ray_train" in found]:
        ratios = [
            plain[0].outside_s / median([kill.outside_s for kill in ours])
            for ours, plain in zip(found[kind], found["ray_train"], strict=True)
            if ours
        ]
        tell(BENCH, "ratio", of=f"ray_train over {kind}", ratio=spread(ratios))


def killed(kind: str, settings: list[str], *, ranks: int, kills: int, seed: int) -> tuple[Told, list[Kill]]:
    """One run of a kind, and its recoveries; those by another remedy (no spare was up yet) are left out."""
    if kind == "ray_train":
        told, kill = plain_run_killed(settings, ranks=ranks, seed=seed)
        return told, [kill]
    told = rayfold_run(
        [*settings, f"snapshot.spares={SPARES[kind]}"],
        every_s=SETTLE_S[kind],
        kills=kills,
        seconds=SETTLE_S[kind] * (kills + 1),
        seed=seed,
    )
    return told, [kill for kill in told.recoveries() if kill.action == ACTIONS[kind]]


def measure_goodput(settings: list[str], *, seconds: float, pairs: int) -> None:
    """An undisturbed run and one for each rate of kills, in alternating order; prints a line a rate."""
    rates = [every for every in EVERY_S if every < seconds]  # the others would not kill once
    shares: dict[int, list[float]] = {every: [] for every in rates}
    kills: dict[int, list[Kill]] = {every: [] for every in rates}
    step_s = []
    for pair in range(pairs):
        steps, down = {}, {}
        order = (0, *rates) if pair % 2 == 0 else (*reversed(rates), 0)
        for every in order:
            # the last one is to be made up for within the time
            number = int((seconds - 1) // every) if every else 0
            run = rayfold_run(
                [*settings, "snapshot.spares=1"], every_s=every, kills=number, seconds=seconds, seed=pair
            )
            steps[every], down[every] = run.steps_within(seconds), run.recoveries()
            if not every:
                step_s.append(run.step_s)
            said = f"{steps[every]} steps, {number} kills"
            print(f"pair {pair + 1}/{pairs}: {said}", file=sys.stderr, flush=True)
        for every in rates:
            shares[every].append(steps[every] / steps[0])
            kills[every] += down[every]
    for every in rates:
        recovered = said_of(kills[every]) if kills[every] else {}
        tell(
            BENCH,
            "goodput",
            kill_every_s=every,
            seconds=seconds,
            committed_share=spread(shares[every]),
            step_s=median(step_s),
            **recovered,
        )


def said_of(kills: Sequence[Kill]) -> dict[str, Any]:
    """What there is to say of some recoveries."""
    names = dict.fromkeys(name for kill in kills for name in kill.phases)

    def of(value: Callable[[Kill], float]) -> dict[str, float] | None:
        return spread([value(kill) for kill in kills])

    return {
        "kills": len(kills),
        "outside_s": of(lambda kill: kill.outside_s),
        "phases_s": of(lambda kill: sum(kill.phases.values())),
        **{name: spread([k.phases[name] for k in kills if name in k.phases]) for name in names},
        "lost_steps": of(lambda kill: kill.lost_steps),
        "sources": sorted({kill.source for kill in kills}),
    }


if __name__ == "__main__":
    main()
