"""Learning rate as a pure function of the step: nothing to save, nothing to restore."""

import math

from .config import OptimConfig


def learning_rate(config: OptimConfig, *, step: int, steps: int) -> float:
    """The rate of optimizer step `step` (1 to `steps`).

    Warm-up rises linearly and reaches the peak at `warmup_steps`. After it, cosine and linear fall to
    `min_lr_ratio` of the peak at the last step; wsd (warm-up-stable-decay, arXiv 2404.06395) stays at the
    peak and falls linearly over the last `decay_steps`.
    """
    if step <= config.warmup_steps:
        return config.lr * step / config.warmup_steps
    floor = config.min_lr_ratio
    after_warmup = max(1, steps - config.warmup_steps)
    done = min(1.0, (step - config.warmup_steps) / after_warmup)
    match config.schedule:
        case "constant":
            part = 1.0
        case "linear":
            part = 1.0 - (1.0 - floor) * done
        case "cosine":
            part = floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * done))
        case "wsd":
            decay_steps = min(config.decay_steps or max(1, steps // 10), after_warmup)
            into_decay = max(0.0, (step - (steps - decay_steps)) / decay_steps)
            part = 1.0 - (1.0 - floor) * min(1.0, into_decay)
    return config.lr * part
