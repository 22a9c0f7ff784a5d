"""Results go to standard output or to files; everything else goes to standard error."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from pathlib import Path
from typing import IO

from bnfx.cli.files import replacing


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
    own = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    try:
        with redirect_stdout(sys.stderr):
            yield own
    finally:
        os.dup2(own.fileno(), 1)
        with suppress(BrokenPipeError):  # the reader has gone
            own.close()


@contextmanager
def step(what: str) -> Iterator[Callable[[str], None]]:
    """Show `what` and the time it has taken on standard error while it runs, on a terminal only.

    Yields what shows something else instead, as the work goes on.
    """
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    console = Console(file=sys.stderr)
    if not console.is_terminal:
        yield lambda _: None
        return
    text = TextColumn("{task.description}", markup=False)
    columns = (SpinnerColumn(), text, TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, redirect_stdout=False) as progress:
        task = progress.add_task(what, total=None)
        yield lambda now: progress.update(task, description=now, refresh=True)


def tell(line: str) -> None:
    """A line on standard error."""
    sys.stderr.write(f"bnfx: {line}\n")


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
        return
    with replacing(path) as written:
        written.write_bytes(content)
