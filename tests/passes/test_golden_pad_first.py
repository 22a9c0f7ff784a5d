"""PadFirst as text, through fold_bn: frames assigned from a map's shift, and other assignments."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bnfx
from bnfx.reports.report import FoldReport
from tests.support.golden import Golden
from tests.support.laws import assert_close, randomise
from tests.support.networks import conv, net, norm

X = torch.randn(2, 1, 5, 5, dtype=torch.float64)

#: Assignments of a whole frame of one, of `c` to `y`.
FRAME = ("y[:, :, :1] = c", "y[..., -1:, :] = c", "y[:, :, :, 0] = c[..., 0]", "y[..., -1:] = c")


def framed(shift: str, *assignments: str, result: str = "self.b(y)", **parts: Any) -> nn.Module:
    """A network that pads `self.a(x)` and assigns `shift` to the border."""
    lines = ("y = F.pad(self.a(x), (1, 1, 1, 1))", f"c = ({shift}).view(1, -1, 1, 1)")
    return net(result, *lines, *assignments, b=conv(1, 1, 3, padding=0), **parts)


def test_the_bias_of_a_layer(golden: Golden) -> None:
    golden.fold(framed("self.a.bias", *FRAME, a=conv(1, 1)), X)


def test_the_shift_of_a_batch_norm(golden: Golden) -> None:
    shift = "self.n.bias - self.n.running_mean * self.n.weight / self.n.running_var.sqrt()"
    model: Any = framed(shift, *FRAME, n=norm([3], [5], [2], [0.5]), a=nn.Identity())
    model.a = nn.Sequential(conv(1, 1, bias=False), model.n).double()
    golden.fold(model.eval(), X)


def test_another_constant(golden: Golden) -> None:
    golden.fold(framed("self.a.bias + 1", *FRAME, a=conv(1, 1)), X)


def test_a_part_of_the_frame(golden: Golden) -> None:
    golden.fold(framed("self.a.bias", *FRAME[1:], a=conv(1, 1)), X)


def test_more_than_the_frame(golden: Golden) -> None:
    golden.fold(framed("self.a.bias", "y[:, :, :2] = c", *FRAME[1:], a=conv(1, 1)), X)


def test_a_frame_behind_a_kernel(golden: Golden) -> None:
    golden.fold(framed("self.a.bias", *FRAME, a=conv(1, 1, 2)), X)


def test_what_is_read_before(golden: Golden) -> None:
    model = framed("self.a.bias", "z = y + 0", *FRAME, result="self.b(y), z", a=conv(1, 1))
    golden.fold(model, X)


def test_what_is_padded_is_read(golden: Golden) -> None:
    golden.fold(
        net(
            "self.b(y) + z[..., :1]",
            "z = self.a(x)",
            "y = F.pad(z, (1, 1, 1, 1))",
            "c = self.a.bias.view(1, -1, 1, 1)",
            *FRAME,
            a=conv(1, 1),
            b=conv(1, 1, 3),
        ),
        X,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_frames_in_programs(dtype: torch.dtype) -> None:
    shift = "self.n.bias - self.n.running_mean * self.n.weight / (self.n.running_var + 1e-5).sqrt()"
    model: Any = framed(shift, *FRAME, a=nn.Identity(), n=nn.BatchNorm2d(1))
    model.a = nn.Sequential(nn.Conv2d(1, 1, 1, bias=False), model.n)
    model, x = randomise(model).to(dtype), X.to(dtype)
    program = torch.export.export(model, (x,))
    folded = bnfx.fold_bn(program)
    told = bnfx.report(folded)
    assert isinstance(told, FoldReport)
    assert [record.verdict for record in told.batch_norms] == ["folded"]
    assert not [node for node in folded.graph.nodes if "copy_" in node.name or "pad" in node.name]
    ours: Tensor = folded.module()(x)
    torch.testing.assert_close(ours, model(x))


def test_frames_of_other_sizes_are_frames() -> None:
    model = framed("self.a.bias", *FRAME, a=conv(1, 1))
    folded = bnfx.fold_bn(model, X)
    assert len([node for node in folded.graph.nodes if node.op == "call_function"]) == 1
    for size in (1, 2, 9):
        assert_close(model, folded, [torch.randn(3, 1, size, size + 1, dtype=torch.float64)])
