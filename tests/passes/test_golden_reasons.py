"""Every reason that the program can give stands in a golden text, and every text has its test."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path

from tests.support.golden import FOLDER

ROOT = Path(__file__).parent.parent.parent

#: Where the reasons of records are written.
ROOMS = ("passes", "bnfx/channels", "bnfx/gauges", "bnfx/editing", "bnfx/graphs/norms.py")
#: A reason has so many words at least, those filled in apart.
_WORDS = 3
#: Words that are no reason, or that no small network brings out; with the cause.
EXCEPT = {
    "the BatchNorm here was folded for rank {} only; fold again with example_inputs": "an error",
    "{}, whose parameters serve several calls": "named where nothing nearer fixes a gauge",
    "its module is called several times, and at one of the calls it stays": "parameters of a norm"
    " without labels are held before",
    "a constant of the model's own code": "of an operator, which has no record",
    "no numerically sound gauge was found": "after rounds that no network has needed so far",
    "has other channels at another input size": "the cause of a cause",
    "one behind it has a scale of zero, and gives its constant through it": "where the exchange"
    " of large graphs turns the order round",
    "the shape of its output is unknown; pass example_inputs": "seen at one assumed size alone",
    "a change of shape, {} to {}": "part of an error",
    "the worst site is {}, {} roundings from an identity": "part of an error",
    "no site was reached": "part of an error",
    "output {} by {} relative, where the model itself errs by {}": "part of an error",
}


def test_every_reason_has_a_golden_text() -> None:
    missing = [
        f"{place}: {words}"
        for place, words in reasons()
        if words not in EXCEPT
        and not re.search(_pattern(words), _texts_of(place.partition(":")[0]))
    ]
    assert not missing, "\n".join(["no golden text shows", *missing])


def test_exceptions_are_still_there() -> None:
    assert set(EXCEPT) <= {words for _, words in reasons()}


def test_every_golden_text_has_a_test() -> None:
    names = {
        f"{path.stem.removeprefix('test_golden_')}/{name}.txt"
        for path in Path(__file__).parent.glob("test_golden_*.py")
        for name in re.findall(r"^def test_(\w+)\(", path.read_text(encoding="utf-8"), re.M)
    }
    left = {path.relative_to(FOLDER).as_posix() for path in FOLDER.rglob("*.txt")} - names
    assert not left, f"no test writes {sorted(left)}"


def reasons() -> Iterator[tuple[str, str]]:
    """Where a reason stands, and its words; `{}` where something is filled in."""
    for room in ROOMS:
        top = ROOT / room
        for path in sorted(top.rglob("*.py")) if top.is_dir() else [top]:
            tree = ast.parse(path.read_text(encoding="utf-8"))
            for line, words in _texts(tree):
                if len(re.findall(r"(?<!\S)[a-z]+(?!\S)", words)) >= _WORDS:
                    yield f"{path.relative_to(ROOT)}:{line}", words


@functools.cache
def _texts_of(place: str) -> str:
    """The golden texts of the pass whose file it is, or of all passes."""
    top = FOLDER / Path(place).stem if place.startswith("passes/") else FOLDER
    return "\n".join(path.read_text(encoding="utf-8") for path in top.rglob("*.txt"))


def _texts(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Strings of a module, but for docstrings, messages of errors and lists of words."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Raise) or _is_docstring(node) or _is_list(node):
            continue
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.value
        elif isinstance(node, ast.JoinedStr):
            parts = (v.value if isinstance(v, ast.Constant) else "{}" for v in node.values)
            yield node.lineno, "".join(map(str, parts))
        else:
            yield from _texts(node)


def _is_docstring(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def _is_list(node: ast.AST) -> bool:
    """`"a b c".split()` or `words("a b c")`."""
    if not isinstance(node, ast.Call):
        return False
    function = node.func
    if isinstance(function, ast.Attribute):
        return function.attr == "split"
    return isinstance(function, ast.Name) and function.id == "words"


def _pattern(words: str) -> str:
    return ".+?".join(re.escape(part) for part in words.split("{}"))
