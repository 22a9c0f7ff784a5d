"""The driver of passes that edit a model, and what those passes share.

A pass looks with `match` and acts with `rewrite`, through the methods of a
`bnfx.editing.draft.Draft`. It declares what it preserves; the driver checks that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Protocol, Self, TypeVar

import torch
from torch import nn

from bnfx.editing.declarations import Preserved
from bnfx.editing.draft import Draft
from bnfx.graphs.examples import example
from bnfx.reports.report import Change


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
