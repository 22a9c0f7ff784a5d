"""What the command line says beside its results, and what asks it to end.

A signal is raised as an exception wherever the work is. Where that is swallowed (an import that
fails for it, a destructor, a callback), it is raised again at the next step.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from bnfx.text import printable

#: These end a process of Python at once, with temporary files and processes left behind; SIGINT
#: raises an exception that much code takes for an error of its own.
_STOPS = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
if sys.platform != "win32":
    _STOPS[signal.SIGHUP] = signal.SIG_DFL


class Stopped(BaseException):
    """A signal came that asks the process to end."""


class Stops:
    """Which signal came, if one has."""

    number: int | None = None

    @property
    def code(self) -> int:
        """The exit code, as a shell would tell it."""
        return 128 + (self.number or signal.SIGINT)

    def heed(self) -> None:
        """Raise what something has swallowed.

        Raises:
            Stopped: A signal came.
        """
        if self.number is not None:
            raise Stopped


@contextmanager
def stoppable(stops: Stops) -> Iterator[None]:
    """Signals that ask the process to end do it by an exception, which leaves nothing behind."""

    def stop(number: int, _: FrameType | None) -> None:
        stops.number = number
        raise Stopped

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    mine = {n: usual for n, usual in _STOPS.items() if signal.getsignal(n) is usual}
    for number in mine:  # and not those that the caller ignores or handles
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number, usual in mine.items():
            signal.signal(number, usual)


def tell(line: str) -> None:
    """A line on standard error; of what has more, such as a library's error, one is made."""
    sys.stderr.write(f"bnfx: {printable(' '.join(line.split()))}\n")
    sys.stderr.flush()
