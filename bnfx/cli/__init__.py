"""The command line `bnfx`, also `python -m bnfx`. Nothing heavy is imported before it is needed."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import IO

from bnfx.cli import parser
from bnfx.cli.output import results_apart, step, tell
from bnfx.cli.results import (
    FAILED,
    MISSING,
    NOT_CAPTURED,
    USAGE,
    Outcome,
    check_reports,
    write_error,
    write_results,
)
from bnfx.errors import BnfxError, MissingPackageError, ProviderError, UsageError, VerificationError

INTERRUPTED = 128 + signal.SIGINT
#: These end a process of Python at once, with temporary files and processes left behind.
_STOPS = (signal.SIGTERM,) if sys.platform == "win32" else (signal.SIGTERM, signal.SIGHUP)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: Arguments without the program's name; None takes those of the process.

    Returns:
        The exit code.
    """
    try:
        options = parser.parser().parse_args(argv)
    except SystemExit as stop:  # argparse has printed help or its message
        return int(stop.code or 0)
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    try:
        with _stoppable(), results_apart() as out, warnings.catch_warnings():
            # torch.export of torch 2.13 calls its own deprecated pytree test
            warnings.filterwarnings("ignore", message=".*LeafSpec.*", category=FutureWarning)
            return _run(options, out)
    except (KeyboardInterrupt, _Stopped) as stop:
        tell("interrupted; files that were there are as they were")
        return int(stop.args[0]) if isinstance(stop, _Stopped) else INTERRUPTED


class _Stopped(BaseException):
    """A signal came that asks the process to end; the argument is the exit code."""


@contextmanager
def _stoppable() -> Iterator[None]:
    """Signals that ask the process to end do it like an interrupt, which leaves nothing behind."""

    def stop(number: int, _: FrameType | None) -> None:
        raise _Stopped(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    mine = [number for number in _STOPS if signal.getsignal(number) is signal.SIG_DFL]
    for number in mine:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number in mine:
            signal.signal(number, signal.SIG_DFL)


def _run(options: argparse.Namespace, out: IO[str]) -> int:
    try:
        check_reports(options)
    except UsageError as error:  # a report must not land where it was just refused
        tell(f"{type(error).__name__}: {error}")
        if options.json == "-":
            write_error(options, error, USAGE, out)
        return USAGE
    try:
        outcome = _carry_out(options)
        write_results(options, outcome, out)
    except BnfxError as error:
        return _give_up(options, out, error, code_of(error))
    except ModuleNotFoundError as error:
        tell("'bnfx doctor' tells what is missing here")
        return _give_up(options, out, error, MISSING)
    except OSError as error:
        return _give_up(options, out, error, NOT_CAPTURED)
    except SystemExit as stop:  # a factory or a forward that ends the process has verified nothing
        said = UsageError(f"the model's own code ended the process with SystemExit({stop.code!r})")
        return _give_up(options, out, said, USAGE)
    except Exception as error:  # noqa: BLE001  # a defect must not end like a failed verification
        traceback.print_exc()
        tell("this is a defect of bnfx, or of the model's own code: see the lines above")
        return _give_up(options, out, error, NOT_CAPTURED)
    if outcome.failure:
        tell(outcome.failure)
    return outcome.code


def _carry_out(options: argparse.Namespace) -> Outcome:
    if options.command == "doctor":  # works where torch, which the others import, does not
        return _doctor(options)
    from bnfx.cli import commands

    return commands.run(options)


def _doctor(options: argparse.Namespace) -> Outcome:
    from bnfx.environment.doctor import doctor

    with step("looking at the environment"):
        done = doctor()
    missing = [name for name in options.require if done.why_not(name)]
    if missing:
        failure = f"{missing[0]} is required, and no node runs there: {done.why_not(missing[0])}"
        return Outcome(done, failure, MISSING)
    if not done:
        return Outcome(done, "this environment does not work yet: see the lines above", MISSING)
    return Outcome(done)


def code_of(error: BnfxError) -> int:
    """The exit code that an error of bnfx ends with."""
    by_kind: tuple[tuple[type[BnfxError], int], ...] = (
        (VerificationError, FAILED),
        (UsageError, USAGE),
        (ProviderError, MISSING),
        (MissingPackageError, MISSING),
    )
    if type(error) is BnfxError:  # an argument that a function refused
        return USAGE
    return next((code for kind, code in by_kind if isinstance(error, kind)), NOT_CAPTURED)


def _give_up(options: argparse.Namespace, out: IO[str], error: Exception, code: int) -> int:
    tell(f"{type(error).__name__}: {error}")
    try:
        write_error(options, error, code, out)
    except (OSError, UsageError) as second:
        tell(f"the JSON report cannot be written: {second}")
    return code
