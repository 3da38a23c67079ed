"""Commands of the command line, one module each: `add(commands)` makes the parser, its `run` returns the exit status."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from typing import NoReturn

from ..adjoints import nearest

__all__ = ["Parser", "guarded", "positive"]

#: Exit statuses; a command line that cannot be read gives argparse's 2.
FAILED, INTERRUPTED = 1, 130


class Parser(argparse.ArgumentParser):
    """argparse, whose errors about commands and options name the nearest valid one.

    fill: adds the arguments, once they are needed: what they name is imported for the command that is called, no other.
    """

    def __init__(self, *arguments, **options) -> None:
        super().__init__(*arguments, **{"allow_abbrev": False, **options})
        self.subcommands: dict[str, Parser] = {}
        self.fill: Callable[[Parser], None] | None = None

    def parse_known_args(self, args=None, namespace=None):
        if self.fill is not None:
            fill, self.fill = self.fill, None
            fill(self)
        return super().parse_known_args(args, namespace)

    def parse_args(self, args=None, namespace=None) -> argparse.Namespace:
        found, extra = self.parse_known_args(args, namespace)
        if extra:
            self.reject(found, extra)
        return found

    def reject(self, found: argparse.Namespace, extra: list[str]) -> NoReturn:
        """The error about arguments that nothing takes."""
        parser = self.subcommands.get(getattr(found, "command", None) or "", self)
        word = next((word for word in extra if word.startswith("-")), extra[0])
        if not word.startswith("-"):
            parser.error(f"argument {word!r} is not expected.")
        known = tuple(option for action in parser._actions for option in action.option_strings)
        name = word.partition("=")[0]
        # Of a word and its beginning: --lr-schedule is near to --schedule, --epoch to --epochs.
        close = nearest(name, known) or next((f" Did you mean {option!r}?" for option in known if len(name) > 3 and (name in option or option in name)), "")
        parser.error(f"option {name!r} is unknown.{close} {parser.prog} --help lists the options.")

    def _check_value(self, action: argparse.Action, value: object) -> None:
        if action.dest == "command" and value not in self.subcommands:
            known = tuple(self.subcommands)
            raise argparse.ArgumentError(None, f"command {value!r} is unknown; wanted one of {', '.join(known)}.{nearest(value, known)}")
        if action.choices is not None and value not in action.choices:
            known = tuple(map(str, action.choices))
            raise argparse.ArgumentError(action, f"{value!r} is unknown; wanted one of {', '.join(known)}.{nearest(value, known)}")


def guarded(command: Callable[[argparse.Namespace], int]) -> Callable[[argparse.Namespace], int]:
    """A command whose expected failures are one line on stderr and an exit status: 1, or 128 + the signal that stopped it.

    With --traceback they are raised as they are.
    """

    def run(arguments: argparse.Namespace) -> int:
        try:
            status = command(arguments)
            sys.stdout.flush()
            return status
        except BrokenPipeError:  # whoever read the output, such as `head`, has enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        except KeyboardInterrupt as stop:
            if arguments.traceback:
                raise
            print(f"fastsnn {arguments.command}: {str(stop).removeprefix(f'{arguments.command}: ') or 'stopped'}", file=sys.stderr)
            return 128 + stop.number if hasattr(stop, "number") else INTERRUPTED
        except (ArithmeticError, ImportError, OSError, RuntimeError, TypeError, ValueError) as error:
            if arguments.traceback:
                raise
            print(f"fastsnn {arguments.command}: {_text(error).removeprefix(f'{arguments.command}: ')}", file=sys.stderr)
            return FAILED

    return run


def _text(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    plain = (FloatingPointError, ImportError, OSError, ValueError)
    return str(error) if isinstance(error, plain) else f"{type(error).__name__}: {error}"


def positive(text: str) -> int:
    """A whole number >= 1 of the command line."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}; wanted a whole number >= 1")
    return int(text)
