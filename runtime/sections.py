"""The configuration sections of the run itself. No torch here; each section checks its own values."""

from dataclasses import dataclass
from typing import Annotated, Literal

from ..parallel.layout import Layout
from ..parallel.microbatches import micro_size


@dataclass(frozen=True, kw_only=True)
class RunSection:
    """Section `[run]`."""

    name: Annotated[str, "Name of the run."] = "run"
    dir: Annotated[
        str, "Folder of the run; empty takes runs/<name>. The same folder goes on where it stands."
    ] = ""
    seed: Annotated[int, "Seed of initial parameters and of the order of samples."] = 0
    steps: Annotated[int, "Optimizer steps in all; raise it to train a finished run further.", "steps"] = 100
    workers: Annotated[
        Literal["auto"] | int,
        "Ranks. auto: what the parallel axes multiply to, or else one a GPU, or else one a CPU core (at "
        "most 8).",
        "ranks",
    ] = "auto"
    device: Annotated[
        Literal["auto", "cpu", "cuda"], "Where ranks compute; auto takes CUDA where there is one."
    ] = "auto"
    address: Annotated[
        str,
        'Ray cluster: "local" starts one inside the command and ends it, "auto" or host:port joins a '
        "running one.",
    ] = "local"
    eval_every: Annotated[int, "Steps between validations; 0 for none.", "steps"] = 0
    eval_samples: Annotated[int, "Held-out samples a validation reads; 0 reads all.", "samples"] = 512
    start_timeout_s: Annotated[
        float, "Longest wait for resources, for workers to start, and for them to find each other.", "seconds"
    ] = 180.0
    collective_timeout_s: Annotated[
        float,
        "Longest wait of one rank for the others inside a step before the run ends with a verdict.",
        "seconds",
    ] = 600.0

    def problems(self) -> list[tuple[str, str]]:
        """Every impossible value as (key, what is wrong and what to write instead)."""
        found = []
        if not self.name or "/" in self.name or self.name.startswith("."):
            found.append(
                ("name", f'is "{self.name}"; a plain folder name such as "first" (use run.dir for a path)')
            )
        if self.steps < 1:
            found.append(("steps", f"is {self.steps}; must be at least 1"))
        if self.seed < 0:
            found.append(("seed", f"is {self.seed}; must be 0 or more"))
        if isinstance(self.workers, int) and self.workers < 1:
            found.append(("workers", f'is {self.workers}; a number from 1, or "auto"'))
        for key in ("eval_every", "eval_samples"):
            if getattr(self, key) < 0:
                found.append((key, f"is {getattr(self, key)}; must be 0 or more"))
        for key in ("start_timeout_s", "collective_timeout_s"):
            if getattr(self, key) <= 0:
                found.append(
                    (key, f"is {getattr(self, key)}; must be above 0 seconds, nothing waits forever")
                )
        return found


@dataclass(frozen=True, kw_only=True)
class BatchConfig:
    """Section `[batch]`."""

    size: Annotated[int, "Sequences of one optimizer step, over all ranks.", "sequences"] = 32
    micro_size: Annotated[
        int,
        "Sequences a data parallel rank takes at once; the rest of its part is accumulated, or is in other "
        "stages of the pipeline meanwhile. 0 takes them all, in a pipeline as many as leave twice as many "
        "micro-batches as stages.",
        "sequences",
    ] = 0

    def problems(self) -> list[tuple[str, str]]:
        """Every impossible value as (key, what is wrong and what to write instead)."""
        found = []
        if self.size < 1:
            found.append(("size", f"is {self.size}; must be at least 1"))
        if self.micro_size < 0:
            found.append(("micro_size", f"is {self.micro_size}; must be 0 (as many as are good) or more"))
        return found

    def micro(self, layout: Layout) -> int:
        """Sequences of one micro-batch."""
        return self.micro_size or micro_size(layout, self.size // layout.dp_size)


@dataclass(frozen=True, kw_only=True)
class PrecisionConfig:
    """Section `[precision]`."""

    compute: Annotated[Literal["fp32", "bf16"], "Type of forward and backward."] = "fp32"
    params: Annotated[Literal["fp32"], "Type of stored parameters and optimizer states."] = "fp32"
    reduce: Annotated[Literal["fp32"], "Type in which gradients are summed over ranks."] = "fp32"

    def problems(self) -> list[tuple[str, str]]:
        """Nothing beyond the allowed names can be wrong here."""
        return []


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Section `[checkpoint]`."""

    every: Annotated[int, "Steps between durable checkpoints; 0 writes one at the end only.", "steps"] = 100
    keep: Annotated[int, "Newest checkpoints kept; older ones are deleted.", "checkpoints"] = 3

    def problems(self) -> list[tuple[str, str]]:
        """Every impossible value as (key, what is wrong and what to write instead)."""
        found = []
        if self.every < 0:
            found.append(("every", f"is {self.every}; must be 0 (at the end only) or more"))
        if self.keep < 1:
            found.append(("keep", f"is {self.keep}; at least 1 must stay, 2 or more survive a damaged one"))
        return found
