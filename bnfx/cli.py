"""The command line `bnfx`, also `python -m bnfx`. Nothing heavy is imported before it is needed."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Sequence
from typing import IO

from bnfx import cli_parser
from bnfx.errors import BnfxError, MissingPackageError, ProviderError, UsageError, VerificationError

DONE, FAILED, USAGE, MISSING, NOT_CAPTURED = 0, 1, 2, 3, 4
INTERRUPTED = 128 + signal.SIGINT


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: Arguments without the program's name; None takes those of the process.

    Returns:
        The exit code.
    """
    try:
        options = cli_parser.parser().parse_args(argv)
    except SystemExit as stop:  # argparse has printed help or its message
        return int(stop.code or 0)
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from bnfx.cli_output import results_apart

    try:
        with results_apart() as out, warnings.catch_warnings():
            # torch.export of torch 2.13 calls its own deprecated pytree test
            warnings.filterwarnings("ignore", message=".*LeafSpec.*", category=FutureWarning)
            return _run(options, out)
    except BrokenPipeError:  # the reader of the output has gone: nobody is left to tell
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return DONE
    except KeyboardInterrupt:
        _say("interrupted; files that were there are as they were")
        return INTERRUPTED


def _run(options: argparse.Namespace, out: IO[str]) -> int:
    from bnfx import cli_commands

    try:
        cli_commands.check_targets(options)
        outcome = cli_commands.run(options)
    except BnfxError as error:
        return _give_up(options, out, error, code_of(error))
    except OSError as error:
        return _give_up(options, out, error, NOT_CAPTURED)
    except Exception as error:  # noqa: BLE001  # a defect must not end like a failed verification
        traceback.print_exc()
        _say("this is a defect of bnfx, or of the model's own code: see the lines above")
        return _give_up(options, out, error, NOT_CAPTURED)
    code = FAILED if outcome.failure else DONE
    cli_commands.write_results(options, outcome, code, out)
    if outcome.failure:
        _say(outcome.failure)
    return code


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
    from bnfx import cli_commands

    _say(f"{type(error).__name__}: {error}")
    cli_commands.write_error(options, error, code, out)
    return code


def _say(line: str) -> None:
    sys.stderr.write(f"bnfx: {line}\n")
