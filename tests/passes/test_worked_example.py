"""The pass that CONTRIBUTING shows is run as it stands there, and by a driver that checks it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

import bnfx
from bnfx.editing.declarations import Preserved
from bnfx.editing.draft import Draft
from bnfx.editing.driver import repeat, run
from bnfx.editing.inference_draft import InferenceDraft
from bnfx.graphs.inference import inference_graph
from tests.support.laws import assert_same_state

PAGE = Path(__file__).parent.parent.parent / "CONTRIBUTING.md"


def example() -> Any:
    """`UseSiLU` from the section on passes."""
    section = PAGE.read_text(encoding="utf-8").partition("## How to add a pass")[2]
    [code] = re.findall(r"```python\n(.*?)```", section.partition("\n## ")[0], re.S)
    names: dict[str, Any] = {"__name__": "worked_example"}
    exec(compile(code, str(PAGE), "exec", dont_inherit=True), names)
    return names["UseSiLU"]


def network() -> nn.Sequential:
    body = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    return nn.Sequential(body, nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)).eval()


def test_the_worked_example() -> None:
    model, x = network(), torch.randn(3, 4)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    done = bnfx.apply_pass(example()(exclude="2"), model, x)
    kinds = [type(m).__name__ for m in done.model.modules() if not list(m.children())]
    assert kinds == ["Linear", "SiLU", "Linear", "ReLU", "Linear"]
    assert [(c.path, c.action, c.reason) for c in done.changes] == [
        ("0.1", "changed", "SiLU now"),
        ("2", "kept", "chosen by exclude"),
    ]
    assert_same_state(dict(model.state_dict()), before)
    again = bnfx.apply_pass(example()(exclude="2"), done.model, x)
    assert [change.action for change in again.changes] == ["kept"]


@dataclass(frozen=True)
class Wrong:
    """A pass on the graph of inference that does what it is told."""

    does: str
    name: ClassVar[str] = "wrong"
    preserves: ClassVar[Preserved] = Preserved.SIGNATURE | Preserved.STATE_VALUES

    def match(self, draft: InferenceDraft) -> list[str]:
        return [self.does]

    def rewrite(self, draft: InferenceDraft, found: Sequence[Any]) -> tuple[bnfx.Change, ...]:
        [out] = draft.graph.find_nodes(op="output")
        if self.does == "structure":
            out.args = ((out.args[0],),)
        elif self.does == "values":
            [name] = [n for n in draft.graph.find_nodes(op="get_attr") if "bias" in str(n.target)]
            draft.module.get_submodule("0").bias = nn.Parameter(torch.ones(2))
            assert name.target == "0.bias"
        else:
            raise ValueError(self.does)
        return ()


@pytest.mark.parametrize(
    ("does", "words"), [("structure", "structure of the result"), ("values", r"'0\.bias'")]
)
def test_what_a_pass_on_a_graph_declares_is_checked(does: str, words: str) -> None:
    draft = InferenceDraft(inference_graph(nn.Sequential(nn.Linear(2, 2)), None))
    with pytest.raises(bnfx.FoldError, match=words):
        run(draft, Wrong(does))


def test_the_graph_stands_below_what_went_wrong_in_a_rewrite() -> None:
    draft = InferenceDraft(inference_graph(network(), None))
    with pytest.raises(ValueError, match="boom") as raised:
        run(draft, Wrong("boom"))
    [note] = raised.value.__notes__
    assert "wrong was rewriting" in note
    assert "call_function[target=torch.nn.functional.relu]" in note


def test_a_pass_is_repeated_until_it_finds_nothing_more() -> None:
    seen: list[int] = []

    @dataclass(frozen=True)
    class Peel:
        """Take one ReLU away at a time."""

        name: ClassVar[str] = "peel"
        preserves: ClassVar[Preserved] = Preserved.STATE_KEYS

        def match(self, draft: Draft) -> list[str]:
            return [path for path, module in draft.modules() if isinstance(module, nn.ReLU)][:1]

        def rewrite(self, draft: Draft, found: Sequence[str]) -> tuple[bnfx.Change, ...]:
            for path in found:
                draft.replace(path, nn.Identity())
            seen.append(len(found))
            return ()

    draft = Draft(network(), None)
    run(draft, repeat(Peel()))
    assert seen == [1, 1, 0]
