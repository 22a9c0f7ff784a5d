"""Examples that don't fit, copies of examples, and when two results are alike."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bnfx
from bnfx.graphs.agreement import alike, nearly, outputs, reordered
from bnfx.graphs.examples import Example


class Inner(nn.Module):
    """A network below another one; `branches` makes symbolic tracing fail, so it is exported."""

    def __init__(self, *, branches: bool) -> None:
        super().__init__()
        self.branches = branches
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))

    def forward(self, x: Tensor) -> Any:
        if self.branches and x.shape[0] > 99:
            x = x + 1
        return self.body(x)


@pytest.mark.parametrize("call", [bnfx.fold_bn, bnfx.plan_fold])
@pytest.mark.parametrize("branches", [False, True])
@pytest.mark.parametrize(
    ("x", "says"),
    [
        (torch.zeros(1, 5, 8, 8), "1x5x8x8 float32"),
        (torch.zeros(2, 3, 2, 2), "2x3x2x2 float32"),
        (torch.zeros(1, 3, 8, 8).long(), "1x3x8x8 int64"),
    ],
)
def test_an_example_that_does_not_fit(call: Any, branches: bool, x: Tensor, says: str) -> None:  # noqa: FBT001  # a parameter of the test
    model = Inner(branches=branches).eval()
    with pytest.raises(bnfx.CaptureError) as caught:
        call(model, (x,))
    message = str(caught.value)
    assert message.startswith(f"Inner does not run on the example inputs ({says}), in Conv2d")
    assert "'body.0'" in message
    assert message.endswith("Give inputs that its forward takes")
    assert isinstance(caught.value.__cause__, RuntimeError)
    assert str(caught.value.__cause__).partition("\n")[0] in message


def test_a_model_that_runs_but_cannot_be_captured_says_so() -> None:
    class Odd(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return x + (1.0 if float(x.sum()) > 0 else 2.0)

    with pytest.raises(bnfx.CaptureError, match="Odd cannot be captured"):
        bnfx.fold_bn(Odd().eval(), (torch.ones(2),))


def test_copies_of_an_example_are_its_own_and_shared_tensors_stay_shared() -> None:
    x, computed = torch.zeros(2), torch.ones(2, requires_grad=True) * 2
    given = Example((x, [x, 3]), {"c": computed})
    mine = given.copied()
    mine.args[0].add_(1)
    mine.args[1].append(4)
    assert mine.args[1][0] is mine.args[0]
    assert (x.tolist(), given.args[1][1:]) == ([0.0, 0.0], [3])
    assert torch.equal(mine.kwargs["c"], computed)


def test_a_run_leaves_example_and_random_state() -> None:
    class Writes(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return x.add_(torch.rand(2))

    given = Example((torch.zeros(2),), {})
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    assert torch.equal(outputs(Writes(), given), outputs(Writes(), given))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert given.args[0].tolist() == [0.0, 0.0]


@dataclasses.dataclass
class Pair:
    """A result in a dataclass."""

    one: Any
    two: Any


ONE = torch.tensor([1.0, float("nan")])
UNEQUAL: list[tuple[Any, Any]] = [
    (ONE, ONE + 1),
    (ONE, ONE.double()),
    (ONE, ONE[None]),
    ((ONE,), [ONE]),
    ([ONE], [ONE, ONE]),
    ({"a": ONE}, {"b": ONE}),
    ({"a": ONE}, OrderedDict(a=ONE)),
    (Pair(ONE, 1), Pair(ONE + 1, 1)),
    (ONE, None),
    (torch.tensor([1]), torch.tensor([2])),
]


@pytest.mark.parametrize("close", [nearly, reordered])
def test_what_is_alike(close: Any) -> None:
    for a, b in UNEQUAL:
        assert alike(a, a, close)
        assert not alike(a, b, close)
        assert not alike(b, a, close)
    assert alike(torch.ones(2, device="meta"), torch.zeros(2, device="meta"), close)


def test_how_close_is_close() -> None:
    a = torch.tensor([1.0, 1e-3])
    assert reordered(a, a * (1 + 1e-6))
    assert not reordered(a, a * (1 + 1e-4))
    assert nearly(a, a * (1 + 1e-4))
    assert not nearly(a, a * 1.01)
