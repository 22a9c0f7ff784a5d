"""What a command hands back, and how it is written."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from bnfx.cli.files import check_target
from bnfx.cli.output import write
from bnfx.errors import UsageError
from bnfx.reports.report import Report
from bnfx.reports.writers import to_json

#: Exit codes, as every help text explains them.
DONE, FAILED, USAGE, MISSING, NOT_CAPTURED = 0, 1, 2, 3, 4


@dataclass(frozen=True)
class Outcome:
    """What a command found."""

    report: Report
    #: Why the command failed; "" where it did not.
    failure: str = ""
    #: Exit code.
    code: int = DONE
    #: Further reports, by the name under which they stand in the JSON.
    more: Mapping[str, Report] = field(default_factory=dict)


def check_reports(options: argparse.Namespace) -> None:
    """Refuse reports that could not be written in the end, before any work is done.

    Raises:
        UsageError: Two of them want standard output; a folder does not exist; a report would
            overwrite another file of the same command.
    """
    names = [options.json, options.markdown, options.html]
    if names.count("-") > 1:
        raise UsageError("only one report fits on standard output")
    taken = {Path(name).resolve() for name in _files(options)}
    for name in names:
        if name in (None, "-"):
            continue
        path = Path(name)
        check_target(path, ())
        if path.resolve() in taken and (path.is_file() or not path.exists()):
            raise UsageError(f"{name} is another file of this command; give the report its own")
        taken.add(path.resolve())


def _files(options: argparse.Namespace) -> Iterator[str]:
    """The files that a command reads and writes besides its reports."""
    for name in ("model", "file", "checkpoint", "baseline"):
        value = getattr(options, name, None)
        if value is not None:
            yield value
    yield from getattr(options, "input", ())
    yield from getattr(options, "calibration", None) or ()


def write_results(options: argparse.Namespace, outcome: Outcome, out: IO[str]) -> None:
    """The report to wherever the options want it; as text on standard output otherwise."""
    report, more = outcome.report, outcome.more
    head = {"command": options.command, "exit_code": outcome.code, "failure": outcome.failure}
    parts = {name: part.to_dict() for name, part in more.items()}
    writers: dict[str, Callable[[], str]] = {
        "json": lambda: to_json({**head, **report.to_dict(), **parts}),
        "markdown": lambda: report.to_markdown(tuple(more.values())),
        "html": lambda: report.to_html(tuple(more.values())),
    }
    for kind, content in writers.items():
        target = getattr(options, kind)
        if target is not None:
            write(content(), target, out)
    if "-" not in (options.json, options.markdown, options.html):
        write("\n".join(map(str, (report, *more.values()))), "-", out)


def write_error(options: argparse.Namespace, error: Exception, code: int, out: IO[str]) -> None:
    """What stopped the command, as JSON, where JSON was asked for."""
    content = {
        "command": options.command,
        "exit_code": code,
        "failure": str(error),
        "error": type(error).__name__,
    }
    if options.json is not None:
        write(to_json(content), options.json, out)
