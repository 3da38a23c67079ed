"""How far an evaluation is: a bar with the time left, or a line for each row."""

from __future__ import annotations

import sys
import time

from ..attacks import Attack
from ..extras import need

__all__ = ["Progress", "work"]


def work(attack: Attack | None) -> float:
    """About how many forward passes an attack makes for each sample, a gradient counted as three."""
    if attack is None:
        return 1.0
    attack = getattr(attack, "attack", attack)  # of a transfer, what runs on the source
    options = attack.options()

    def number(*names: str) -> int:
        return next((options[name] for name in names if isinstance(options.get(name), int) and not isinstance(options[name], bool)), 1)

    if attack.access == "gradient":
        passes = 3.0 * number("steps") * number("eot") * number("targets", "target_classes", "classes") * len(options.get("members") or [0])
    else:
        passes = float(number("budget"))
    return 1.0 + passes * number("restarts")


def span(seconds: float) -> str:
    """A time in words: 40 s, 12 min, 3.5 h."""
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


class Progress:
    """Counts work in forward passes, so that the time left of cheap and dear attacks adds up. kind: False, True (a bar) or "lines"."""

    def __init__(self, kind: bool | str) -> None:
        if kind not in (False, True, "lines"):
            raise ValueError(f"evaluate: progress is {kind!r}; wanted True, False or 'lines'.")
        self.lines, self.bar = kind == "lines", None
        self.total = self.done = self.resumed = 0.0
        self.began = time.monotonic()
        if kind is True:
            self.bar = need("tqdm", "train").tqdm(total=1.0, leave=False, bar_format="{desc} {percentage:3.0f}%|{bar}| {elapsed}{postfix}")

    def plan(self, work: float) -> None:
        """So much is to come, at most."""
        self.total += work

    def begin(self, name: str, planned: float, wanted: float, done: float) -> None:
        """A row begins: of what was planned, so much is wanted, of which a file held some."""
        self.total += wanted - planned
        self.end_of_row = self.done + wanted
        self.done += done
        self.resumed += done
        if self.bar is not None:
            self.bar.set_description(name)
        self._show()

    def advance(self, work: float) -> None:
        self.done = min(self.done + work, self.end_of_row)
        self._show()

    def end(self, name: str, accuracy: float) -> None:
        """A row is done."""
        self.done = self.end_of_row
        if self.lines:
            left, share = self.left(), self.done / max(self.total, 1e-9)
            told = f", about {span(left)} left" if left else ""
            print(f"{name}: {accuracy:.2%}; {share:.0%} of the work is done{told}", file=sys.stderr, flush=True)

    def left(self) -> float | None:
        """Seconds, by the work done since the start; None before there is any."""
        worked = self.done - self.resumed
        return (time.monotonic() - self.began) * (self.total - self.done) / worked if worked > 0 else None

    def _show(self) -> None:
        if self.bar is not None:
            self.bar.n, left = self.done / max(self.total, 1e-9), self.left()
            self.bar.set_postfix_str("" if left is None else f"about {span(left)} left", refresh=False)
            self.bar.refresh()

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
