"""The command line `bnfx`, also `python -m bnfx`. Nothing heavy is imported before it is needed."""

from __future__ import annotations

from collections.abc import Sequence

from bnfx.cli.terminal import Stopped, Stops, stoppable, tell


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: Arguments without the program's name; None takes those of the process.

    Returns:
        The exit code.
    """
    stops = Stops()
    try:
        with stoppable(stops):
            from bnfx.cli.run import run  # imports more, which a signal may interrupt

            return run(argv, stops)
    except (KeyboardInterrupt, Stopped):
        pass
    except Exception:
        if stops.number is None:
            raise
    tell("interrupted; files that were there are as they were")
    return stops.code
