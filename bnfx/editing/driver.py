"""The driver of passes that edit a model, and what those passes share.

A pass looks with `match` and acts with `rewrite`, through the methods of a
`bnfx.editing.draft.Draft`. It declares what it preserves; the driver checks that.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Protocol, Self, TypeVar

import torch
from torch import nn

from bnfx.editing.declarations import Preserved
from bnfx.editing.draft import Draft, below
from bnfx.editing.sightings import SeenCall, seen_calls
from bnfx.graphs.examples import example
from bnfx.reports.report import Change

#: Why a functional call is left.
OUT_OF_REACH = "a functional call in code that cannot be traced; edit it by hand"
OPTIONAL = (
    "a functional call in a module with optional arguments, inside code that cannot be traced, so "
    "that it is not known which arguments it gets; edit it by hand"
)


class Facts(Protocol):
    """What can be compared of a draft before and after a pass."""

    def check(self, name: str, declared: Preserved, after: Self, /) -> None:
        """Raise unless the pass `name` preserved what it declares."""
        ...


class AnyDraft(Protocol):
    """A private copy of a model under edit, as the driver sees it."""

    def picture(self) -> str:
        """It as text, to show where a rewrite went wrong."""
        ...

    def facts(self, declared: Preserved, /) -> Facts:
        """What a pass with this declaration must preserve, as it is now."""
        ...

    def settle(self, changes: Sequence[Change], /) -> None:
        """Take up what a pass did, and see to what it left behind."""
        ...


_Draft_contra = TypeVar("_Draft_contra", bound=AnyDraft, contravariant=True)


class Pass(Protocol[_Draft_contra]):
    """A frozen dataclass whose fields are its options."""

    #: In records and messages.
    name: ClassVar[str]

    @property
    def preserves(self) -> Preserved:
        """What the driver checks after `rewrite`."""
        ...

    def match(self, draft: _Draft_contra, /) -> Sequence[Any]:
        """Sites to change, and a `Change` with a reason for what is left; changes nothing."""
        ...

    def rewrite(self, draft: _Draft_contra, found: Any, /) -> Sequence[Change]:
        """Carry out what `match` found, without asking again."""
        ...


_Draft = TypeVar("_Draft", bound=AnyDraft)


@dataclass(frozen=True)
class Repeated(Generic[_Draft]):
    """A pass that is run until it finds nothing more."""

    edit: Pass[_Draft]


def repeat(edit: Pass[_Draft]) -> Repeated[_Draft]:
    """`edit` again and again: what it did may have made new sites."""
    return Repeated(edit)


def run(draft: _Draft, *passes: Pass[_Draft] | Repeated[_Draft]) -> None:
    """Run passes on `draft`, one after the other, and check what each declares to preserve."""
    for step in passes:
        if isinstance(step, Repeated):
            while _once(draft, step.edit):
                pass
        else:
            _once(draft, step)


def _once(draft: _Draft, edit: Pass[_Draft]) -> bool:
    """Run a pass once. Whether there was anything to do."""
    found, before = edit.match(draft), draft.facts(edit.preserves)
    try:
        changes = edit.rewrite(draft, found)
    except Exception as error:
        error.add_note(f"{edit.name} was rewriting\n{draft.picture()}")
        raise
    draft.settle(changes)
    before.check(edit.name, edit.preserves, draft.facts(edit.preserves))
    return any(not isinstance(entry, Change) for entry in found)


@dataclass(frozen=True)
class Edited:
    """A new model, and what was done to get it."""

    model: nn.Module
    changes: tuple[Change, ...]


@torch.inference_mode(mode=False)  # what it returns is trained
def apply_pass(
    edit: Pass[Draft],
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
    run(draft, edit)
    return Edited(draft.root, tuple(draft.changes))


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
    for call in seen_calls(draft.seen):
        caller = draft.root.get_submodule(call.path)
        if call.function not in functions or known(caller) or call.path in done:
            continue
        if not draft.in_graph(call.path):
            records[call.path] = Change(by, call.path, call.function, "kept", reason(call))
    if draft.seen is not None:
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
