"""What passes over modules and functional calls share: what is meant, and what no graph shows."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from bnfx.editing.draft import Draft, Region, below
from bnfx.operators.calls import call_name
from bnfx.operators.table import Passage, passage_of
from bnfx.reports.report import Change

#: Why a functional call is left.
OUT_OF_REACH = "a functional call in code that cannot be traced; edit it by hand"
OPTIONAL = (
    "a functional call in a module with optional arguments, inside code that cannot be traced, so "
    "that it is not known which arguments it gets; edit it by hand"
)


@dataclass(frozen=True)
class SeenCall:
    """A functional call that was seen in a run."""

    #: Name of the operator.
    function: str
    #: Module in whose forward it was called.
    path: str
    #: Whether its input was the result of a softmax: attention, that is.
    after_softmax: bool


def seen_calls(seen: Region | None, functions: Collection[str]) -> Iterator[SeenCall]:
    """The calls of `functions` in what was seen of a run, in the order of execution."""
    for node in seen.graph.nodes if seen is not None else ():
        if seen is not None and call_name(node) in functions:
            behind = call_name(source_of(node)) == "softmax"
            yield SeenCall(call_name(node), seen.caller(node), behind)


def source_of(node: fx.Node) -> fx.Node:
    """What made the first input of `node`, seen through casts and views."""
    source = node.all_input_nodes[0]
    while passage_of(source) in (Passage.IDENTITY, Passage.MOVE) and source.all_input_nodes:
        source = source.all_input_nodes[0]
    return source


def chosen(path: str, globs: str | Sequence[str]) -> bool:
    """Whether a module path is meant by a glob, or by one of several."""
    patterns = (globs,) if isinstance(globs, str) else globs
    return any(fnmatch.fnmatchcase(path, pattern) for pattern in patterns)


def is_stock(module: nn.Module, kinds: tuple[type[nn.Module], ...]) -> bool:
    """A module of torch.nn; a subclass with a forward of its own is code like any other."""
    return isinstance(module, kinds) and type(module).forward.__module__.startswith("torch.nn")


def unseen_calls(
    draft: Draft,
    by: str,
    functions: Collection[str],
    kinds: tuple[type[nn.Module], ...],
    found: Iterable[Any],
    reason: Callable[[SeenCall], str] = lambda _: OUT_OF_REACH,
) -> Iterator[Change]:
    """Records of functional calls that no graph shows, and of code that was not looked into.

    Args:
        draft: The model.
        by: Name of the pass.
        functions: Names of the functions it is about.
        kinds: Modules of torch.nn that make such calls, and are edited as modules.
        found: Sites and records with a `path`, which are not reported again.
        reason: Why a call that was seen is left.
    """
    done = {entry.path for entry in found}
    for call in seen_calls(draft.seen, functions):
        caller = draft.root.get_submodule(call.path)
        if call.path in done or is_stock(caller, kinds) or draft.in_graph(call.path):
            continue
        done.add(call.path)
        yield Change(by, call.path, call.function, "kept", reason(call))
    if draft.seen is not None:
        return
    why = "functional calls were not looked for in what cannot be traced of it; give example_inputs"
    for path in draft.untraced:
        if not any(path != outer and below(path, outer) for outer in draft.untraced):
            kind = type(draft.root.get_submodule(path)).__name__
            yield Change(by, path, kind, "kept", why)
