"""Reads nothing, writes to the terminal: what a run is doing, as one moving line, or as plain lines in a log."""

from __future__ import annotations

import time

from rich.console import Console

#: What the moving line shows of a training record, in this order.
SHOWN = {
    "images": "{:.0f} images",
    "share_done": "{:.0%}",
    "step": "step {:.0f}",
    "loss": "loss {:.3f}",
    "squared_error": "squared error {:.4f}",
    "accuracy": "accuracy {:.2f}",
    "held_out_accuracy": "held-out accuracy {:.3f}",
    "margin": "margin {:.2f}",
    "images_per_s": "{:.4g} images/s",
    "seconds_left": "{:.0f} s left",
    "bad_images": "{:.0f} bad",
    "trials_done": "{:.0f} trials done",
    "trials_left": "{:.0f} to go",
    "best_distance": "best distance {:.2f}",
}
#: A log that is not a terminal gets a line this often.
PLAIN_EVERY_S = 5.0


class Progress:
    """One line per finished step, and a line that says where the present one is."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.stage = ""
        self.started = time.monotonic()
        self.last = 0.0

    def line(self, text: str) -> None:
        self._clear()
        self.console.print(text, highlight=False, soft_wrap=True)

    def start_stage(self, name: str, makes: str) -> None:
        self.stage, self.started, self.last = name, time.monotonic(), 0.0
        self._moving(makes)

    def end_stage(self, name: str, how: str) -> None:
        self.line(f"[green]done[/] {name:<10} {how}")
        self.stage = ""

    def units(self, done: int, total: int) -> None:
        """Units of work done; shows the time left once a tenth is done."""
        elapsed = time.monotonic() - self.started
        left = f", {elapsed / done * (total - done):.0f} s left" if done * 10 >= total and done < total else ""
        self._moving(f"{done}/{total} units{left}")

    def record(self, record: dict[str, float]) -> None:
        """A record of a training curve, or of how far the images or the trials are."""
        shown = {name: value for name, value in record.items() if name in SHOWN}
        if {"images", "trials_done"} & set(shown):  # whose count is the step of its metrics
            shown.pop("step", None)
        self._moving(", ".join(text.format(shown[name]) for name, text in SHOWN.items() if name in shown))

    def _moving(self, text: str) -> None:
        now = time.monotonic()
        if self.console.is_terminal:
            if now - self.last >= 0.1:
                self.console.print(
                    f"\r\x1b[K     {self.stage:<10} {text}", end="", highlight=False, markup=False, soft_wrap=True
                )
                self.last = now
        elif now - self.last >= PLAIN_EVERY_S:
            self.console.print(f"     {self.stage:<10} {text}", highlight=False, markup=False, soft_wrap=True)
            self.last = now

    def _clear(self) -> None:
        if self.console.is_terminal:
            self.console.print("\r\x1b[K", end="")
