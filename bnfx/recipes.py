"""`recipe`: section 4.2.1 of Ioffe & Szegedy 2015, as edits of a model and training numbers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from rich.console import Group, RenderableType
from rich.text import Text
from torch import nn

from bnfx.editing.draft import Draft
from bnfx.editing.driver import run
from bnfx.editing.preservation import require_reached
from bnfx.errors import RecipeError
from bnfx.graphs.examples import example
from bnfx.insertion import insert_into, insert_report
from bnfx.passes import (
    InsertBatchNorm,
    InsertFilter,
    RemoveDropout,
    RemoveLocalResponseNorm,
    ZeroInitResidual,
)
from bnfx.reports.document import Headline
from bnfx.reports.report import Change, Report, remember, table, tally

#: What the section says beyond the model and the numbers: it is up to the data pipeline.
_ADVICE = (
    "shuffle the training examples more thoroughly, so that the same do not always share a batch",
    "reduce photometric distortions: each example is seen fewer times, so show more real images",
)


@dataclass(frozen=True)
class Hparams(Mapping[str, float]):
    """Hyper-parameters of training, as attributes and as a mapping.

    Attributes:
        lr: Learning rate to start with.
        weight_decay: Weight of the L2 loss.
        decay_speedup: How many times faster the learning rate should decay: divide the steps of
            a schedule by it, or raise the factor of an exponential decay to this power.
    """

    lr: float
    weight_decay: float
    decay_speedup: float

    def __getitem__(self, name: str) -> float:
        if name not in {f.name for f in fields(self)}:
            raise KeyError(name)
        return float(getattr(self, name))

    def __iter__(self) -> Iterator[str]:
        return iter(f.name for f in fields(self))

    def __len__(self) -> int:
        return len(fields(self))


@dataclass(frozen=True)
class Recipe(Report):
    """What `recipe` returns.

    Attributes:
        model: The edited model; the one given stays as it was.
        changes: One record for each place that was changed or left.
        hparams: How to train it.
        given: The hyper-parameters that it started from.
        advice: What the section asks for that is no matter of the model.
    """

    model: nn.Module
    changes: tuple[Change, ...]
    hparams: Hparams
    given: Hparams
    advice: tuple[str, ...] = _ADVICE

    def to_dict(self) -> dict[str, Any]:
        """All but the model, which is named by its class."""
        return {**super().to_dict(), "model": type(self.model).__name__}

    def headline(self) -> Headline:
        """How many changes were made."""
        done = tally(change.action for change in self.changes)
        return Headline("bnfx: recipe", "neutral", f"Changes: {done}.")

    def __rich__(self) -> RenderableType:
        numbers = table(
            "recipe: hyper-parameters",
            ("name", "given", "now"),
            ((name, f"{self.given[name]:g}", f"{self.hparams[name]:g}") for name in self.hparams),
        )
        rows = ((c.by, c.path or "(root)", c.kind, c.action, c.reason) for c in self.changes)
        edits = table(
            f"changes: {tally(change.action for change in self.changes)}",
            ("pass", "path", "kind", "action", "reason"),
            rows,
        )
        return Group(numbers, edits, *(Text(f"Still to do: {line}.") for line in self.advice))


@torch.inference_mode(mode=False)  # what it returns is trained
def recipe(
    model: nn.Module,
    *,
    lr: float,
    weight_decay: float,
    example_inputs: Any = None,
    example_kwargs: Mapping[str, Any] | None = None,
    lr_factor: float = 5.0,
    weight_decay_divisor: float = 5.0,
    decay_speedup: float = 6.0,
    dropout: float = 0.0,
    attention_dropout: bool = False,
    keep: str | Sequence[str] = (),
    zero_init_residual: bool = False,
    include: InsertFilter = None,
    exclude: InsertFilter = None,
) -> Recipe:
    """The accelerated network of Ioffe & Szegedy 2015, section 4.2.1, made from yours.

    In this order: local response normalisation goes, dropout goes, BatchNorm is inserted with
    init="fresh" (to train from scratch), and if asked for, residual branches start at zero. The
    learning rate rises, the weight of the L2 loss falls, the learning rate decays faster. The
    factors are the paper's for Inception on ImageNet (BN-x5); `lr_factor=30` is its BN-x30, which
    ended highest. They are a start, not a law: try them on yours.

    Args:
        model: A network without BatchNorm, or with some; it stays as it is.
        lr: The learning rate that it is trained with now.
        weight_decay: The weight of the L2 loss that it is trained with now.
        example_inputs: Tuple of positional arguments, or a lone tensor; as in `insert_bn`.
        example_kwargs: Keyword arguments that go with them.
        lr_factor: Of the learning rate.
        weight_decay_divisor: Of the weight of the L2 loss.
        decay_speedup: How many times faster the learning rate decays.
        dropout: The rate that is left where dropout was stronger; 0 removes it.
        attention_dropout: Whether dropout of attention weights goes too.
        keep: Glob or globs over module paths in which dropout and local response normalisation
            stay.
        zero_init_residual: Whether gamma of the last new BatchNorm of residual branches is 0.
        include: Layers to consider for BatchNorm, as in `insert_bn`.
        exclude: Layers to leave without BatchNorm, as in `insert_bn`.

    Returns:
        The model, the changes and the hyper-parameters; printed, a table of all of them.

    Raises:
        RecipeError: A number makes no sense, or a pass did not preserve what it declares.
        CaptureError, InsertError: As `insert_bn`.
    """
    _check_numbers(
        lr=lr,
        weight_decay=weight_decay,
        lr_factor=lr_factor,
        weight_decay_divisor=weight_decay_divisor,
        decay_speedup=decay_speedup,
    )
    draft = Draft(model, example(example_inputs, example_kwargs))
    lrn = RemoveLocalResponseNorm(keep)
    run(draft, lrn, RemoveDropout(rate=dropout, attention=attention_dropout, exclude=keep))
    must_run = insert_into(draft, InsertBatchNorm("fresh", include=include, exclude=exclude))
    if draft.given is not None and draft.origins:
        require_reached(draft.root, must_run, draft.given)
    if zero_init_residual:
        run(draft, ZeroInitResidual())
    edited = remember(draft.root, insert_report(draft.changes))
    changes = tuple(_as_edit(change) for change in draft.changes)
    given = Hparams(lr, weight_decay, 1.0)
    hparams = Hparams(lr * lr_factor, weight_decay / weight_decay_divisor, decay_speedup)
    return Recipe(edited, changes, hparams, given)


def _as_edit(change: Change) -> Change:
    """A record with words that stand alone beside those of the other passes."""
    if not change.into:
        return change
    return replace(change, reason=f"{change.into[0]} inserted: it {change.reason}")


def _check_numbers(**numbers: float) -> None:
    for name, value in numbers.items():
        low_enough = value >= 0 if name == "weight_decay" else value > 0
        if not low_enough or value == float("inf"):
            raise RecipeError(f"{name}={value} makes no sense; give a positive number")
