"""The main figures of a run as Ray metrics, for Prometheus and whatever draws from it."""

from typing import Any

from ray.util.metrics import Gauge

FIGURES = {
    "step": ("rayfold_step", "Optimizer steps done."),
    "loss": ("rayfold_loss", "Mean training loss of a token, in nats."),
    "val_loss": ("rayfold_val_loss", "Mean validation loss of a token, in nats."),
    "grad_norm": ("rayfold_grad_norm", "Global gradient norm before clipping."),
    "lr": ("rayfold_learning_rate", "Learning rate."),
    "tokens_per_s": ("rayfold_tokens_per_second", "Valid target tokens a second, over all ranks."),
    "step_time_s": ("rayfold_step_seconds", "Seconds of one optimizer step."),
    "data_wait_s": ("rayfold_data_wait_seconds", "Seconds of a step that waited for data."),
    "snapshot_stall_s": (
        "rayfold_snapshot_stall_seconds",
        "Seconds of a step that waited for a copy of the state.",
    ),
    "exposed_comm_s": (
        "rayfold_exposed_communication_seconds",
        "Seconds of a step that waited for other ranks.",
    ),
    "memory_bytes": ("rayfold_memory_bytes", "Memory of rank 0."),
}


class Gauges:
    """One gauge a figure, tagged with the run's name."""

    def __init__(self, run: str) -> None:
        self._tags = {"run": run}
        self._gauges = {
            key: Gauge(name, description=doc, tag_keys=("run",)) for key, (name, doc) in FIGURES.items()
        }

    def show(self, line: dict[str, Any]) -> None:
        """Show the figures of a metrics line."""
        for key in FIGURES.keys() & line.keys():
            self._gauges[key].set(line[key], tags=self._tags)
