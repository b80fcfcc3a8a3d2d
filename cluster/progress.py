"""What a person sees while a run trains: one live line on a terminal, plain lines elsewhere."""

import time
from typing import Any

from rich.console import Console
from rich.status import Status

PLAIN_EVERY_S = 10.0  # a log file wants to grow slowly
SPOKEN = {  # events worth a line of their own
    "formed": "{world_size} ranks formed ({layout})",
    "restored": "goes on from step {from_step} ({source})",
    "checkpoint": "checkpoint of step {step} is durable ({seconds:.1f} s)",
    "fault": "{class}: {message}",
    "remedy": "{sentence}",
    "resized": "{sentence}",
}


class Progress:
    """Shows the news of a run; use it in a `with`."""

    def __init__(self, *, steps: int, quiet: bool) -> None:
        self._console = Console(stderr=True, quiet=quiet, highlight=False, soft_wrap=True)
        self._steps = steps
        self._status: Status | None = None
        self._last_plain = float("-inf")
        self._last_line = ""
        self._first_shown = False

    def __enter__(self) -> "Progress":
        if self._console.is_terminal:
            self._status = self._console.status("starting")
            self._status.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._status is not None:
            self._status.stop()
        if self._last_line:
            self._console.print(self._last_line, markup=False)

    def say(self, text: str) -> None:
        """Print a line of its own."""
        self._console.print(text, markup=False)

    def phase(self, text: str) -> None:
        """What the run is doing before there are steps to show."""
        if self._first_shown or not text:
            return
        self._show(text)

    def news(self, item: dict[str, Any]) -> None:
        """Show one metric or event as the controller wrote it."""
        if (event := item.get("event")) is not None:
            if (template := SPOKEN.get(event["kind"])) is not None:
                self.say(template.format(**event))
            return
        line = item["metric"]
        self._show(self._step_line(line), force=not self._first_shown or "val_loss" in line)
        self._first_shown = True

    def _step_line(self, line: dict[str, Any]) -> str:
        left_s = (self._steps - line["step"]) * line["step_time_s"]
        text = (
            f"step {line['step']}/{self._steps}  loss {line['loss']:.4f}  {line['tokens_per_s']:,.0f} "
            f"tokens/s  {line['step_time_s']:.3f} s/step  {clock(left_s)} left"
        )
        if "val_loss" in line:
            text += f"  val loss {line['val_loss']:.4f} ({line['val_bits_per_byte']:.3f} bits/byte)"
        return text

    def _show(self, text: str, *, force: bool = False) -> None:
        if text == self._last_line:
            return
        if self._status is not None:
            if force:
                self._console.print(text, markup=False)
                self._last_line = ""
            else:
                self._last_line = text
            self._status.update(text)
            return
        now = time.monotonic()
        if force or now - self._last_plain >= PLAIN_EVERY_S:
            self._console.print(text, markup=False)
            self._last_plain, self._last_line = now, ""
        else:
            self._last_line = text


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss."""
    whole = int(max(0.0, seconds))
    return f"{whole // 3600}:{whole % 3600 // 60:02d}:{whole % 60:02d}"
