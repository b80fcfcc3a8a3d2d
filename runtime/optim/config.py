"""Section `[optim]`. No torch here."""

from dataclasses import dataclass
from typing import Annotated, Literal


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """How parameters are updated."""

    name: Annotated[Literal["adamw"], "Optimizer."] = "adamw"
    lr: Annotated[float, "Peak learning rate."] = 3e-4
    betas: Annotated[tuple[float, float], "Decay of the first and second moment, a pair in [0, 1)."] = (
        0.9,
        0.95,
    )
    eps: Annotated[float, "Added to the root of the second moment."] = 1e-8
    weight_decay: Annotated[float, "Decoupled decay, on matrices only (not on norms or biases)."] = 0.1
    schedule: Annotated[
        Literal["constant", "cosine", "linear", "wsd"],
        "Learning rate after warm-up: constant, cosine or linear to min_lr_ratio, or warm-up-stable-decay.",
    ] = "cosine"
    warmup_steps: Annotated[int, "Steps of linear warm-up from 0.", "steps"] = 0
    decay_steps: Annotated[
        int, "Length of the final linear decay of wsd; 0 takes a tenth of run.steps.", "steps"
    ] = 0
    min_lr_ratio: Annotated[float, "Learning rate at the end, as a part of the peak."] = 0.1
    clip: Annotated[Literal["norm", "none"], "Gradient clipping: by global norm, or none."] = "norm"
    clip_norm: Annotated[float, "Largest global gradient norm when clip is norm."] = 1.0

    def problems(self) -> list[tuple[str, str]]:
        """Every impossible value as (key, what is wrong and what to write instead)."""
        found = []
        if self.lr < 0:
            found.append(("lr", f"is {self.lr}; a learning rate is 0 or more, try 3e-4"))
        if not all(0 <= beta < 1 for beta in self.betas):
            found.append(
                (
                    "betas",
                    f"is {list(self.betas)}; two numbers from 0 up to (not including) 1, as [0.9, 0.95]",
                )
            )
        if self.eps <= 0:
            found.append(("eps", f"is {self.eps}; must be above 0, usually 1e-8"))
        if self.weight_decay < 0:
            found.append(("weight_decay", f"is {self.weight_decay}; use 0 for none, usually 0.1"))
        if self.warmup_steps < 0:
            found.append(("warmup_steps", f"is {self.warmup_steps}; use 0 for none"))
        if self.decay_steps < 0:
            found.append(("decay_steps", f"is {self.decay_steps}; use 0 for a tenth of run.steps"))
        if not 0 <= self.min_lr_ratio <= 1:
            found.append(("min_lr_ratio", f"is {self.min_lr_ratio}; a part of the peak, from 0 to 1"))
        if self.clip_norm <= 0:
            found.append(("clip_norm", f'is {self.clip_norm}; must be above 0 (or set optim.clip = "none")'))
        return found
