"""What was promised stays: public names, how they are called, fields, and options of the shell.

`public_api.txt` is what the last release promised. It may grow at any time; what stands in it goes
only as CONTRIBUTING.md says. `pytest tests/test_public_api.py --update-golden` writes it anew.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import bnfx
from bnfx.cli.parser import parser
from bnfx.reports.report import Report

FILE = Path(__file__).parent / "public_api.txt"
NAMED, KEYWORD = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY
VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def arguments(function: object) -> str:
    """The arguments of a call as text, without types."""
    assert callable(function)
    found = inspect.signature(function)
    plain = [
        p.replace(annotation=p.empty, default=p.default if _is_literal(p.default) else ...)
        for p in found.parameters.values()
        if p.name != "self"
    ]
    return str(found.replace(parameters=plain, return_annotation=found.empty))


def _is_literal(value: object) -> bool:
    return (
        value is inspect.Parameter.empty
        or value in (None, ())
        or isinstance(value, str | float | int)
    )


def members(name: str, kind: type) -> Iterator[str]:
    """Fields, properties and methods that a class has of its own."""
    if dataclasses.is_dataclass(kind):
        yield from (f"{name}.{field.name}" for field in dataclasses.fields(kind))
    for word, member in vars(kind).items():
        if word.startswith("_"):
            continue
        if isinstance(member, property):
            yield f"{name}.{word}"
        elif inspect.isfunction(member):
            yield f"{name}.{word}{arguments(member)}"


def options(command: argparse.ArgumentParser) -> Iterator[str]:
    """The options of a command, each with what it may be."""
    for action in command._actions:
        for name in action.option_strings or [action.dest.upper()]:
            yield f"{command.prog} {name}"
            yield from (f"{command.prog} {name} {word}" for word in action.choices or ())


def surface() -> list[str]:
    """All that is public, a line each."""
    lines = [*members("bnfx.*Report", Report)]
    for word in sorted(bnfx.__all__):
        thing, name = getattr(bnfx, word), f"bnfx.{word}"
        if word == "passes":
            lines += [f"{name}.{inner}" for inner in sorted(thing.__all__)]
        elif not isinstance(thing, type):
            lines.append(f"{name}{arguments(thing)}")
        elif issubclass(thing, BaseException):
            lines.append(f"{name}: {thing.__mro__[1].__name__}")
        else:
            lines += [name, *sorted(set(members(name, thing)))]
    own = parser()
    choices = next(a.choices for a in own._actions if isinstance(a, argparse._SubParsersAction))
    assert isinstance(choices, dict)
    commands = [own, *choices.values()]
    return lines + [line for command in commands for line in options(command)]


def parameters(line: str) -> dict[str, inspect.Parameter]:
    """The arguments that a line of the list tells."""
    call = "(" + line.partition("(")[2]
    space: dict[str, Any] = {}
    exec(f"def told{call}: ...", space)  # lines that this file wrote
    return dict(inspect.signature(space["told"]).parameters)


def broken(promised: list[str], now: list[str]) -> list[str]:
    """What of the promises does not hold any more."""
    there = {line.partition("(")[0]: line for line in now}
    faults = []
    for line in promised:
        name = line.partition("(")[0]
        if name not in there:
            faults.append(f"{name} is gone")
        elif "(" in line:
            faults += [f"{name}: {what}" for what in _changed(line, there[name])]
    return faults


def _changed(old: str, new: str) -> Iterator[str]:
    before, after = parameters(old), parameters(new)
    placed = [p.name for p in after.values() if p.kind is NAMED]
    for place, (name, was) in enumerate(before.items()):
        if name not in after:
            yield f"{name} is gone"
            continue
        if was.kind is NAMED and (name not in placed or placed.index(name) != place):
            yield f"{name} has another place"
        if was.default != after[name].default:
            yield f"{name} is {after[name].default} by default, and was {was.default}"
    for name, came in after.items():
        if name not in before and came.kind not in VARIADIC and came.default is came.empty:
            yield f"{name} came, and has no default"


def test_what_was_promised_is_there(pytestconfig: pytest.Config) -> None:
    now = surface()
    if pytestconfig.getoption("--update-golden"):
        FILE.write_text("\n".join(now) + "\n", encoding="utf-8")
    faults = broken(FILE.read_text(encoding="utf-8").splitlines(), now)
    assert not faults, "deprecate it first, see CONTRIBUTING.md:\n" + "\n".join(faults)


@pytest.mark.parametrize(
    ("now", "fault"),
    [
        ("f(x, y=1, *, z=2)", ""),
        ("f(x, y=1, new=0, *, z=2, other=None)", ""),
        ("f(x, y=1, z=2)", ""),
        ("f(x, y=1, *, z=2, **more)", ""),
        ("g(x, y=1, *, z=2)", "f is gone"),
        ("f(x, y=1)", "f: z is gone"),
        ("f(x, y=2, *, z=2)", "f: y is 2 by default, and was 1"),
        ("f(x, *, y=1, z=2)", "f: y has another place"),
        ("f(x, new=0, y=1, *, z=2)", "f: y has another place"),
        ("f(x, y=1, *, z=2, new)", "f: new came, and has no default"),
    ],
)
def test_broken_promises_are_seen(now: str, fault: str) -> None:
    assert broken(["f(x, y=1, *, z=2)"], [now]) == ([fault] if fault else [])
