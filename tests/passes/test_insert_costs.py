"""What insertion costs, counted: forwards of the model, and copies of its weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import bnfx
from bnfx import Change
from bnfx.editing.declarations import Preserved
from bnfx.editing.draft import Draft
from bnfx.insertion import Init

_WIDE = (37, 41)  # of no other tensor


class _Net(nn.Module):
    """Two layers to normalise, the second with a weight that `spoil` is called on."""

    def __init__(self, spoil: Callable[[Tensor], object] = id) -> None:
        super().__init__()
        self.spoil = spoil
        self.first, self.second = nn.Conv2d(3, 41, 3), nn.Linear(41, 37)
        self.head = nn.Linear(37, 2)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) -> (N, 2)."""
        y = torch.relu(self.first(x)).mean((2, 3))
        out: Tensor = self.head(torch.relu(self.second(y)))
        self.spoil(self.second.weight)
        return out


class _Counted(TorchDispatchMode):
    """Forwards of a `_Net` on tensors, and new tensors of the size of its wide weight."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's
        self.forwards = self.copies = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call `func`, and count what it is."""
        out = func(*args, **(kwargs or {}))
        self.forwards += func is torch.ops.aten.convolution.default and not args[0].is_meta
        fresh = isinstance(out, Tensor) and tuple(out.shape) == _WIDE and out.dtype != torch.bool
        known = {t.untyped_storage().data_ptr() for t in args if isinstance(t, Tensor)}
        self.copies += bool(fresh and out.untyped_storage().data_ptr() not in known)
        return out


@pytest.mark.parametrize("form", ["module", "graph"])
@pytest.mark.parametrize(("init", "most"), [("fresh", 4), ("identity", 5), ("calibrate", 5)])
def test_weights_are_copied_once_and_forwards_are_few(init: Init, most: int, form: Any) -> None:
    model, x = _Net().eval(), torch.randn(4, 3, 8, 8)
    data = [torch.randn(4, 3, 8, 8) for _ in range(3)] if init == "calibrate" else []
    with _Counted() as counted:
        bnfx.insert_bn(model, x, init=init, calibration_data=data or None, form=form)
    assert counted.copies == 1
    assert counted.forwards - len(data) <= most


def _in_place(weight: Tensor) -> None:
    if type(weight) is nn.Parameter:  # and no proxy
        with torch.no_grad():
            weight.mul_(0.5)


def _in_data(weight: Tensor) -> None:
    if type(weight) is nn.Parameter:  # and no proxy
        weight.data.mul_(0.5)


@pytest.mark.parametrize("init", ["fresh", "identity"])
@pytest.mark.parametrize("spoil", [_in_place, _in_data])
def test_a_forward_that_writes_its_weights_leaves_no_trace(
    init: Init, spoil: Callable[[Tensor], object]
) -> None:
    model, x = _Net(spoil).eval(), torch.randn(4, 3, 8, 8)
    before = model.second.weight.detach().clone()
    made = bnfx.insert_bn(model, x, init=init)
    assert torch.equal(model.second.weight, before)
    assert torch.equal(made.get_parameter("second.weight"), before)


class _Alone(nn.Linear):
    """A layer that is never copied, so that every copy of the model holds the same one."""

    def __deepcopy__(self, memo: dict[int, Any]) -> _Alone:
        return self


def test_a_layer_that_is_not_copied_is_as_it_was() -> None:
    model, x = _Net(_in_place).eval(), torch.randn(4, 3, 8, 8)
    model.second = _Alone(41, 37)
    before = model.second.weight.detach().clone()
    bnfx.insert_bn(model, x, exclude="second")
    assert torch.equal(model.second.weight, before)


@dataclass(frozen=True)
class _Halve:
    """A pass that halves a weight."""

    name: ClassVar[str] = "halve"
    preserves: Preserved

    def match(self, _draft: Draft) -> list[str]:
        """The weight."""
        return ["second.weight"]

    def rewrite(self, draft: Draft, found: Sequence[str]) -> tuple[Change, ...]:
        """Halve it, past autograd's count of what was written."""
        for name in found:
            draft.root.get_parameter(name).data.mul_(0.5)
        return tuple(Change(self.name, n, "Linear", "changed", "", values=(n,)) for n in found)


@pytest.mark.parametrize("values", [Preserved.STATE_VALUES, Preserved(0)])
def test_what_a_pass_changed_stays_when_the_model_runs(values: Preserved) -> None:
    model, x = _Net().eval(), torch.randn(4, 3, 8, 8)
    made = bnfx.apply_pass(_Halve(Preserved.RUNS | values), model, x).model
    torch.testing.assert_close(made.get_parameter("second.weight"), model.second.weight / 2)
