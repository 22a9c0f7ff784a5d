"""The driver of passes that edit a model, and what those passes share.

A pass looks with `match` and acts with `rewrite`, through the methods of a
`bnfx.editing.draft.Draft`. It declares what it preserves; the driver checks that.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

from torch import nn

from bnfx.editing.declarations import Preserved, check_preserved
from bnfx.editing.draft import Draft, below
from bnfx.editing.sightings import SeenCall
from bnfx.graphs.examples import example

#: Why a functional call is left.
OUT_OF_REACH = "a functional call in code that cannot be traced; edit it by hand"
OPTIONAL = (
    "a functional call in a module with optional arguments, inside code that cannot be traced, so "
    "that it is not known which arguments it gets; edit it by hand"
)


@dataclass(frozen=True)
class Change:
    """What a pass did, or left, at one place of a model.

    Attributes:
        by: Name of the pass.
        path: Module path; of the calling module for a functional call, "" for the root.
        kind: What stood there, such as "Dropout" or "local_response_norm".
        action: "changed" or "kept".
        reason: What was done, or why nothing was, in words a user can act on.
        values: Names in the state_dict whose values were changed.
    """

    by: str
    path: str
    kind: str
    action: Literal["changed", "kept"]
    reason: str
    values: tuple[str, ...] = ()


class Pass(Protocol):
    """A frozen dataclass whose fields are its options.

    Attributes:
        name: In records and messages.
        preserves: What the driver checks after `rewrite`.
    """

    name: ClassVar[str]
    preserves: ClassVar[Preserved]

    def match(self, draft: Draft) -> Sequence[Any]:
        """Sites to change, and a `Change` with a reason for what is left; changes nothing."""
        ...

    def rewrite(self, draft: Draft, found: Sequence[Any]) -> tuple[Change, ...]:
        """Carry out what `match` found, without asking again."""
        ...


@dataclass(frozen=True)
class Edited:
    """A new model, and what was done to get it."""

    model: nn.Module
    changes: tuple[Change, ...]


def apply_pass(
    edit: Pass,
    model: nn.Module,
    example_inputs: Any = None,
    *,
    example_kwargs: Mapping[str, Any] | None = None,
) -> Edited:
    """A copy of `model` with `edit` applied; what the pass declares to preserve is checked.

    Args:
        edit: A pass of `bnfx.passes`, such as `RemoveDropout()`.
        model: Any module; it stays as it is. Functional calls are edited where the model, or the
            part around them, can be traced symbolically.
        example_inputs: Tuple of positional arguments, or a lone tensor. With them the eval outputs
            are compared where the pass declares to preserve them, and functional calls out of
            reach are named.
        example_kwargs: Keyword arguments that go with them.

    Returns:
        The model, in the mode of the source and of its class, or a `torch.fx.GraphModule` where a
        functional call was edited; and one record for each place.

    Raises:
        CaptureError: The model cannot be copied, or fails on the example inputs.
        RecipeError: The pass did not preserve what it declares.
    """
    given = example(example_inputs, example_kwargs)
    draft = Draft(model, given)
    changes = edit.rewrite(draft, edit.match(draft))
    edited = draft.finish()
    named = {name for change in changes for name in change.values}
    check_preserved(edit.name, edit.preserves, model, edited, given, named)
    return Edited(edited, changes)


def chosen(path: str, globs: str | Sequence[str]) -> bool:
    """Whether a module path is meant by a glob, or by one of several."""
    patterns = (globs,) if isinstance(globs, str) else globs
    return any(fnmatch.fnmatchcase(path, pattern) for pattern in patterns)


def unseen_calls(
    draft: Draft,
    by: str,
    functions: Collection[str],
    known: Callable[[nn.Module], bool],
    found: Iterable[Any],
    reason: Callable[[SeenCall], str],
) -> list[Change]:
    """Records of functional calls that no graph shows, and of code that was not looked into.

    Args:
        draft: The model.
        by: Name of the pass.
        functions: Names of the functions it is about.
        known: Whether a module that makes such calls is edited as a module.
        found: Sites and records with a `path`, which are not reported again.
        reason: Why a call that was seen is left.
    """
    done = {entry.path for entry in found}
    records: dict[str, Change] = {}
    for call in draft.calls or ():
        caller = draft.root.get_submodule(call.path)
        if call.function not in functions or known(caller) or call.path in done:
            continue
        if not draft.in_graph(call.path):
            records[call.path] = Change(by, call.path, call.function, "kept", reason(call))
    if draft.calls is not None:
        return list(records.values())
    outermost = (p for p in draft.untraced if not any(_inside(p, o) for o in draft.untraced))
    return [
        Change(
            by,
            path,
            type(draft.root.get_submodule(path)).__name__,
            "kept",
            "functional calls were not looked for in what cannot be traced of it; give "
            "example_inputs",
        )
        for path in outermost
    ]


def _inside(path: str, top: str) -> bool:
    return path != top and below(path, top)
