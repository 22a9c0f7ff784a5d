"""The budget is of the precision asked for, whatever PyTorch is allowed to compute in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from bnfx.graphs.examples import Example
from bnfx.numbers import relative_error
from bnfx.verification.references import (
    TorchReference,
    strict_float32,
    to_tf32,
    to_tf32_truncated,
)

BACKENDS: Any = torch.backends


def allowed() -> list[str | bool]:
    """What products may be computed in, by the newer words and by the older."""
    newer = [BACKENDS.cudnn.conv, BACKENDS.cudnn.rnn, BACKENDS.cuda.matmul]
    newer += [BACKENDS.mkldnn.conv, BACKENDS.mkldnn.rnn, BACKENDS.mkldnn.matmul]
    older = (lambda: BACKENDS.cudnn.allow_tf32, torch.get_float32_matmul_precision)
    return [backend.fp32_precision for backend in newer] + [_read(read) for read in older]


def _read(read: Callable[[], Any]) -> Any:
    try:
        return read()
    except RuntimeError:
        return "mixed"


class Told(nn.Module):
    """Tells what its products may be computed in."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.found = allowed()
        return x


def users_choices() -> list[Callable[[], None]]:
    def mixed() -> None:
        BACKENDS.cudnn.conv.fp32_precision = "ieee"
        BACKENDS.cuda.matmul.fp32_precision = "tf32"

    return [
        lambda: None,
        lambda: torch.set_float32_matmul_precision("high"),
        lambda: torch.set_float32_matmul_precision("medium"),
        lambda: setattr(BACKENDS.mkldnn.conv, "fp32_precision", "bf16"),
        mixed,
    ]


@pytest.mark.parametrize("choose", users_choices())
def test_the_reference_computes_in_float32_proper(choose: Callable[[], None]) -> None:
    with strict_float32():
        choose()
        before = allowed()
        model = Told().eval()
        reference = TorchReference(model, "fp32", 1)
        reference._call(model, Example((torch.ones(1),), {}), None)
        assert set(model.found) <= {"ieee", "none", False, "highest"}
        assert allowed() == before


def test_tf32_may_be_cut_off() -> None:
    x = torch.tensor([1 + 2.0**-12, 1 + 3 * 2.0**-12, -1 - 3 * 2.0**-12, 1 + 2.0**-10, 3e38])
    nearest = torch.tensor([1.0, 1 + 2.0**-10, -1 - 2.0**-10, 1 + 2.0**-10, 3e38])
    cut = torch.tensor([1.0, 1.0, -1.0, 1 + 2.0**-10, 3e38])
    assert torch.equal(to_tf32(x)[:4], nearest[:4])
    assert torch.equal(to_tf32_truncated(x)[:4], cut[:4])
    layer, given = nn.Linear(256, 8).eval(), Example((torch.rand(4, 256),), {})
    with torch.no_grad():
        layer.weight.abs_()
    reference = TorchReference(layer, "tf32", 1)
    runs = reference.run([given])
    (truncated,) = reference.truncated([given], runs)
    # Cutting off loses up to twice as much, and of positive numbers always the same way.
    cut_off = relative_error(truncated, runs.exact[0])
    assert cut_off > 4 * relative_error(runs.rounded[0], runs.exact[0]) > 0
