"""What a command hands back, and how it is written: results on standard output or in files."""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from bnfx.cli.terminal import Stops
from bnfx.reports.report import Report
from bnfx.reports.writers import to_json
from bnfx.text import printable
from bnfx.workspace import workspace

#: Exit codes, as every help text explains them.
DONE, FAILED, USAGE, MISSING, NOT_CAPTURED = 0, 1, 2, 3, 4
#: Width of a report that is no screen: nobody's names are broken.
_ENDLESS = 100_000


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
    #: Reports that are shown where all is to be shown.
    details: tuple[Report, ...] = ()
    #: What was written, and how to use it.
    written: str = ""

    @property
    def verdict(self) -> str:
        """The news in a line."""
        news = self.failure or self.report.headline().verdict
        return " ".join(f"{news} {self.written}".split())


class Steps:
    """The steps of a command, shown on a terminal on standard error while they run."""

    def __init__(self, stops: Stops, *, quiet: bool = False) -> None:
        self.stops = stops
        self.quiet = quiet
        #: How many there are; 0 where nobody knows yet.
        self.total = 0
        self._begun = 0

    @contextmanager
    def __call__(self, what: str) -> Iterator[Callable[[str], None]]:
        """Show `what` and the time it has taken; yields what shows the next step instead.

        Raises:
            Stopped: A signal came that something has swallowed.
        """
        from rich.console import Console

        self.stops.heed()
        console = Console(file=sys.stderr)
        if self.quiet or not console.is_terminal:
            yield lambda _: self.stops.heed()
        else:
            from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

            text = TextColumn("{task.description}", markup=False)
            columns = (SpinnerColumn(), text, TimeElapsedColumn())
            with Progress(*columns, console=console, transient=True, redirect_stdout=False) as bar:
                task = bar.add_task(self._line(what), total=None)

                def show(now: str) -> None:
                    self.stops.heed()
                    if now != what:
                        bar.update(task, description=self._line(now), refresh=True)

                yield show
        self.stops.heed()

    def _line(self, what: str) -> str:
        self._begun += bool(self.total)
        number = f" ({self._begun} of {self.total})" if self.total else ""
        return printable(f"{what}{number}")


@contextmanager
def results_apart() -> Iterator[IO[str]]:
    """Standard output for results alone.

    Inside, whatever prints to standard output (a model's module, an exporter, a C++ library)
    comes out on standard error, so that `--json -` is JSON and nothing else.
    """
    results = sys.stdout
    try:
        real = results.fileno() == 1
    except (OSError, io.UnsupportedOperation):  # a caller in this process has put in its own
        real = False
    if not real:
        with redirect_stdout(sys.stderr):
            yield results
        return
    results.flush()
    own = os.fdopen(os.dup(1), "w", encoding="utf-8", errors="backslashreplace")
    os.dup2(2, 1)
    try:
        with redirect_stdout(sys.stderr):
            yield own
    finally:
        os.dup2(own.fileno(), 1)
        with suppress(BrokenPipeError):  # the reader has gone
            own.close()


def write_results(options: argparse.Namespace, outcome: Outcome, out: IO[str]) -> None:
    """The report to wherever the options want it; as text on standard output otherwise."""
    report, more = outcome.report, outcome.more
    head = {"command": options.command, "exit_code": outcome.code, "failure": outcome.failure}
    title = f"bnfx: inspect {options.model}" if options.command == "inspect" else ""
    parts = {name: part.to_dict() for name, part in more.items()}
    writers: dict[str, Callable[[], str]] = {
        "json": lambda: to_json({**head, **report.to_dict(), **parts}),
        "markdown": lambda: report.to_markdown(tuple(more.values()), title),
        "html": lambda: report.to_html(tuple(more.values()), title),
    }
    for kind, content in writers.items():
        target = getattr(options, kind)
        if target is not None:
            write(content(), target, out)
    if "-" not in (options.json, options.markdown, options.html):
        shown = () if options.quiet else (report, *more.values())
        shown += outcome.details if options.verbose else ()
        width = _width(out)
        texts = [title.removeprefix("bnfx: ")] if title and shown else []
        texts += [part.text(width) for part in shown]
        write("\n\n".join([*texts, printable(outcome.verdict)]), "-", out)


def _width(out: IO[str]) -> int:
    """Columns of the terminal that is written to; a pipe has no end."""
    if not out.isatty():
        return _ENDLESS
    asked = os.environ.get("COLUMNS", "")
    if asked.isdecimal() and int(asked):
        return int(asked)
    return os.get_terminal_size(out.fileno()).columns or 80


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


def write(text: str, target: str, out: IO[str]) -> None:
    """Write to a file, in one step, or to `out` where the name is "-".

    A device or a pipe is written to and stays what it is.
    """
    if target == "-":
        with suppress(BrokenPipeError):  # the reader has gone: nobody is left to tell
            out.write(text if text.endswith("\n") else text + "\n")
            out.flush()
        return
    path, content = Path(target), text.encode(errors="replace")
    if path.exists() and not path.is_file():
        path.write_bytes(content)
    else:
        place(path, content)


def place(target: Path, content: bytes | memoryview) -> None:
    """Put a file in place in one step; where it is a symbolic link, the file behind it."""
    target = target.resolve()
    with workspace(target) as folder:
        written = folder / target.name
        written.write_bytes(content)
        if target.exists():
            written.chmod(target.stat().st_mode & 0o777)
        written.replace(target)
