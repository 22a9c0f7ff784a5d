"""argparse, with errors that say what was meant and completion for shells."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator
from typing import Any, NoReturn

from bnfx.cli.terminal import tell
from bnfx.text import meant


class Parser(argparse.ArgumentParser):
    """A parser that keeps line breaks, takes no abbreviated options and says what is wrong."""

    def __init__(self, **options: Any) -> None:
        super().__init__(
            formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **options
        )

    def error(self, message: str) -> NoReturn:
        """The error, what may have been meant and where help is, without pages of usage."""
        wrong = re.search(r"(?:arguments: |invalid choice: ')([\w-]+)", message)
        if wrong:
            dash = wrong[1].startswith("-")
            message += meant(wrong[1], (w for w in _words(self) if w.startswith("-") == dash))
        tell(f"{message}; see: {self.prog} --help")
        self.exit(2)


def _words(parser: argparse.ArgumentParser) -> Iterator[str]:
    """What can stand on the line of a command, and on that of those below it."""
    for action in parser._actions:
        yield from (*action.option_strings, *map(str, action.choices or ()))
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from command._option_string_actions


class Completion(argparse.Action):
    """Prints what a shell evaluates to complete the command line, and ends."""

    def __call__(self, parser: argparse.ArgumentParser, _: Any, shell: Any, *__: Any) -> NoReturn:
        """Print it for the shell that was named."""
        try:
            import shtab
        except ModuleNotFoundError:
            tell("completion is written by shtab, which is not installed: pip install shtab")
            parser.exit(3)
        commands = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
        for action in (a for c in commands[0].choices.values() for a in c._actions):
            if action.metavar in ("MODEL", "FILE", "FILE.npz", "SPEC", "DIR"):
                action.complete = shtab.FILE  # where shtab looks
        sys.stdout.write(shtab.complete(parser, shell=shell))
        parser.exit()
