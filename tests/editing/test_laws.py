"""What holds for every pass: looking changes nothing, twice is once, and a breach is told."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx, nn

import bnfx
from bnfx.editing.draft import Draft
from bnfx.graphs.examples import Example
from bnfx.passes import (
    InsertBatchNorm,
    RemoveDropout,
    RemoveLocalResponseNorm,
    ZeroInitResidual,
)
from tests.support.laws import assert_same_state
from tests.support.networks import conv, net

PASSES: list[Any] = [
    InsertBatchNorm(),
    InsertBatchNorm(placement="post_activation"),
    RemoveDropout(),
    RemoveDropout(rate=0.1, attention=True),
    RemoveLocalResponseNorm(),
    ZeroInitResidual(),
]


def everything() -> nn.Module:
    """Something to do for each pass, as modules and as functions."""
    return net(
        "self.head(self.drop(F.dropout(y, 0.5, self.training)).mean((2, 3)))",
        "y = F.relu(self.lrn(self.conv(F.relu(self.first(x)))))",
        "y = F.relu(y + self.bn(self.inner(F.local_response_norm(y, 2))))",
        first=conv(2, 2),
        conv=conv(2, 4),
        inner=conv(4, 4, 3, padding=1),
        bn=nn.BatchNorm2d(4),
        lrn=nn.LocalResponseNorm(2),
        drop=nn.Dropout(0.5),
        head=nn.Linear(4, 3),
    ).train()


def untraceable() -> nn.Module:
    """The same in a model whose forward asks for values."""
    return net("y if y.sum() < 1e9 else -y", "y = self.body(x)", body=everything()).train()


MODELS: list[Callable[[], nn.Module]] = [everything, untraceable]
X = torch.randn(2, 2, 6, 6, dtype=torch.float64)


def picture(model: nn.Module) -> dict[str, Any]:
    """All that a pass may change."""
    modules = dict(model.named_modules(remove_duplicate=False))
    graphs = {p: str(m.graph) for p, m in modules.items() if isinstance(m, fx.GraphModule)}
    kinds = {path: (type(m), m.training, m.extra_repr()) for path, m in modules.items()}
    return {"graphs": graphs, "kinds": kinds}


@pytest.mark.parametrize("edit", PASSES, ids=lambda p: p.name)
@pytest.mark.parametrize("make", MODELS)
@pytest.mark.parametrize("given", [False, True])
def test_match_changes_nothing(edit: Any, make: Callable[[], nn.Module], *, given: bool) -> None:
    model = make()
    draft = Draft(model, Example((X,), {}) if given else None)
    state, before = copy.deepcopy(draft.root.state_dict()), picture(draft.root)
    first = edit.match(draft)
    graphs = [str(region.graph) for region in draft.regions]
    second = edit.match(draft)
    assert len(first) == len(second)
    assert picture(draft.root) == before
    assert [str(region.graph) for region in draft.regions] == graphs
    assert_same_state(draft.root.state_dict(), state)


@pytest.mark.parametrize("edit", PASSES, ids=lambda p: p.name)
@pytest.mark.parametrize("make", MODELS)
@pytest.mark.parametrize("given", [False, True])
def test_twice_is_once(edit: Any, make: Callable[[], nn.Module], *, given: bool) -> None:
    model = make()
    before, state = picture(model), copy.deepcopy(model.state_dict())
    example = X if given else None
    once = bnfx.apply_pass(edit, model, example)
    assert any(change.action != "kept" for change in once.changes)
    assert picture(model) == before
    assert_same_state(model.state_dict(), state)
    twice = bnfx.apply_pass(edit, once.model, example)
    assert {change.action for change in twice.changes} <= {"kept"}
    assert_same_state(twice.model.state_dict(), once.model.state_dict())
    assert all(change.reason for change in (*once.changes, *twice.changes))


@pytest.mark.parametrize("make", MODELS)
def test_every_change_names_its_pass_and_a_place(make: Callable[[], nn.Module]) -> None:
    model = make()
    for edit in PASSES:
        for change in bnfx.apply_pass(edit, model, X).changes:
            assert change.by == edit.name
            model.get_submodule(change.path)


class Broken(RemoveDropout):
    def rewrite(self, draft: Any, found: Any) -> Any:
        raise KeyError("something")


def test_what_goes_wrong_in_a_rewrite_comes_with_the_graph() -> None:
    with pytest.raises(KeyError) as caught:
        bnfx.apply_pass(Broken(), everything())
    notes = "\n".join(caught.value.__notes__)
    assert "remove_dropout was rewriting" in notes
    assert "(drop): Dropout(p=0.5" in notes
