"""Ctrl-C and SIGTERM in the middle of a training run: a stop after the step, not within it."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["Interrupted", "listening"]


class Interrupted(KeyboardInterrupt):
    """A run was asked to stop by a signal, and has written a checkpoint after its last whole step."""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.number = number


@contextmanager
def listening(say: Callable[[str], None]) -> Iterator[list[int]]:
    """Within this block, Ctrl-C and SIGTERM ask to stop after the step, and a second one stops at once. Yields what came."""
    came: list[int] = []

    def handler(number, _) -> None:
        if came:
            raise KeyboardInterrupt
        came.append(number)
        say(f"train: {signal.Signals(number).name}: stopping after this step, with a checkpoint; once more stops at once.")

    if threading.current_thread() is not threading.main_thread():
        yield came
        return
    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield came
    finally:
        for number, old in before.items():
            signal.signal(number, old)
