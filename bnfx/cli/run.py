"""One command from its arguments to its exit code."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import IO, Any

from bnfx.cli import checks, parser
from bnfx.cli.results import (
    FAILED,
    MISSING,
    NOT_CAPTURED,
    USAGE,
    Outcome,
    Steps,
    results_apart,
    write_error,
    write_results,
)
from bnfx.cli.terminal import Stops, tell
from bnfx.errors import BnfxError, MissingPackageError, ProviderError, UsageError, VerificationError
from bnfx.text import printable


def run(argv: Sequence[str] | None, stops: Stops) -> int:
    """Run one command; the exit code."""
    try:
        options = parser.parse(argv)
    except SystemExit as stop:  # argparse has printed help or its message
        return int(stop.code or 0)
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    steps = Steps(stops, quiet=options.quiet)
    with results_apart() as out, _hushed(verbose=options.verbose):
        code = _run(options, steps, out)
    stops.heed()
    return code


@contextmanager
def _hushed(*, verbose: bool) -> Iterator[None]:
    """Warnings of the libraries are about them; what matters to the user, bnfx says itself."""

    def show(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
        if verbose:
            tell(f"{category.__name__}: {message}")

    before = logging.root.manager.disable
    with warnings.catch_warnings():
        warnings.simplefilter("default" if verbose else "ignore")
        warnings.showwarning = show
        if not verbose:
            logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(before)


def _run(options: argparse.Namespace, steps: Steps, out: IO[str]) -> int:
    try:
        checks.check_reports(options)
    except UsageError as error:  # a report must not land where it was just refused
        tell(f"{type(error).__name__}: {error}")
        if options.json == "-":
            write_error(options, error, USAGE, out)
        return USAGE
    try:
        checks.check(options)
        outcome = _carry_out(options, steps)
        steps.stops.heed()
        write_results(options, outcome, out)
    except BnfxError as error:
        return _give_up(options, out, error, code_of(error))
    except ModuleNotFoundError as error:
        tell("'bnfx doctor' tells what is missing here")
        return _give_up(options, out, error, MISSING)
    except MemoryError as error:
        tell("this machine, or 'ulimit -v', leaves too little memory for it")
        return _give_up(options, out, error, MISSING)
    except OSError as error:
        return _give_up(options, out, error, NOT_CAPTURED)
    except SystemExit as stop:  # a factory or a forward that ends the process has verified nothing
        said = UsageError(f"the model's own code ended the process with SystemExit({stop.code!r})")
        return _give_up(options, out, said, USAGE)
    except Exception as error:  # noqa: BLE001  # a defect must not end like a failed verification
        steps.stops.heed()  # an import that a signal cut short fails with anything
        sys.stderr.write(printable(traceback.format_exc()))
        tell("this is a defect of bnfx, or of the model's own code: see the lines above")
        return _give_up(options, out, error, NOT_CAPTURED)
    if outcome.failure:
        tell(outcome.failure)
    return outcome.code


def _carry_out(options: argparse.Namespace, steps: Steps) -> Outcome:
    if options.command == "doctor":  # works where torch, which the others import, does not
        return _doctor(options, steps)
    with steps("loading torch"):
        from bnfx.cli import commands
    return commands.run(options, steps)


def _doctor(options: argparse.Namespace, steps: Steps) -> Outcome:
    from bnfx.environment.doctor import doctor

    with steps("looking at the environment"):
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
    if type(error) is BnfxError:  # an argument that a function refused
        return USAGE
    by_kind: tuple[tuple[type[BnfxError], int], ...] = (
        (VerificationError, FAILED),
        (UsageError, USAGE),
        (ProviderError, MISSING),
        (MissingPackageError, MISSING),
    )
    return next((code for kind, code in by_kind if isinstance(error, kind)), NOT_CAPTURED)


def _give_up(options: argparse.Namespace, out: IO[str], error: Exception, code: int) -> int:
    tell(f"{type(error).__name__}: {error}")
    try:
        write_error(options, error, code, out)
    except (OSError, UsageError) as second:
        tell(f"the JSON report cannot be written: {second}")
    return code
