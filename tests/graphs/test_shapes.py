"""Without example inputs: what is assumed of ranks holds for what the model runs on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bnfx


class Net(nn.Module):
    def __init__(self, body: Callable[..., Any], **layers: nn.Module) -> None:
        super().__init__()
        self.body = body
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Any:
        return self.body(self, x)


class Matrix(nn.Module):
    """A linear layer that is written as a product."""

    def __init__(self, how: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.how, self.w = how, nn.Parameter(torch.randn(6, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.how(x, self.w)


def norms(*channels: int) -> dict[str, nn.Module]:
    return {name: nn.BatchNorm1d(c) for name, c in zip("abc", channels, strict=False)}


#: A network, the shapes that it runs on, and how many of its BatchNorms fold.
CASES: dict[str, tuple[Callable[[], nn.Module], Sequence[tuple[int, ...]], int]] = {
    "norms around a sum, then a convolution": (
        lambda: Net(
            lambda m, x: m.conv(m.b(torch.relu(m.a(x) + x))),
            **norms(6, 6),
            conv=nn.Conv1d(6, 2, 1),
        ),
        [(2, 6, 7), (1, 6, 4)],
        1,
    ),
    "behind a view": (
        lambda: Net(
            lambda m, x: m.conv(m.b(F.gelu(m.a(x.view(-1, 6, 7))))),
            **norms(6, 6),
            conv=nn.Conv1d(6, 2, 1),
        ),
        [(2, 42), (3, 2, 21)],
        1,
    ),
    "transposed": (
        lambda: Net(
            lambda m, x: m.a(m.conv(F.gelu(x) * 2)), **norms(2), conv=nn.ConvTranspose1d(6, 2, 3)
        ),
        [(2, 6, 7)],
        1,
    ),
    "norms alone": (
        lambda: Net(lambda m, x: m.b(m.a(x) + 1).sigmoid(), **norms(6, 6)),
        [(2, 6)],
        1,
    ),
    "a product": (
        lambda: Net(lambda m, x: m.a(m.lin(x)), lin=Matrix(torch.matmul), **norms(4)),
        [(5, 6), (2, 6)],
        1,
    ),
    "mm": (
        lambda: Net(lambda m, x: m.a(m.lin(x)), lin=Matrix(torch.mm), **norms(4)),
        [(5, 6)],
        1,
    ),
    "a linear layer over a length, then a convolution": (
        lambda: Net(
            lambda m, x: m.conv(m.b(m.lin(m.a(x)))),
            a=nn.SyncBatchNorm(3),
            lin=nn.Linear(6, 5),
            b=nn.BatchNorm1d(3),
            conv=nn.Conv1d(3, 2, 1),
        ),
        [(2, 3, 6)],
        1,
    ),
    "a product over a length, then a convolution": (
        lambda: Net(
            lambda m, x: m.conv(m.a(m.lin(x))),
            lin=Matrix(torch.matmul),
            a=nn.BatchNorm1d(3),
            conv=nn.Conv1d(3, 2, 1),
        ),
        [(2, 3, 6)],
        1,
    ),
    "a length that a linear layer fixes": (
        lambda: Net(
            lambda m, x: m.b(m.lin(m.a(m.conv(x.sum(-1))))),
            conv=nn.Conv1d(4, 3, 2),
            a=nn.BatchNorm1d(3),
            lin=nn.Linear(5, 4),
            b=nn.BatchNorm1d(3),
        ),
        [(2, 4, 6, 3)],
        1,
    ),
    "a product in a row": (
        lambda: Net(lambda m, x: m.lin(m.a(F.gelu(x) * 2)), lin=Matrix(torch.matmul), **norms(6)),
        [(5, 6)],
        1,
    ),
}


@pytest.mark.parametrize(("build", "sizes", "folded"), CASES.values(), ids=CASES)
def test_the_result_runs_on_what_the_model_runs_on(
    build: Callable[[], nn.Module], sizes: Sequence[tuple[int, ...]], folded: int
) -> None:
    model = build()
    for name, value in model.state_dict().items():
        if "running" in name:
            value.uniform_(0.5, 1.5)
    model.double().eval()
    made = bnfx.fold_bn(model)
    for size in sizes:
        x = torch.randn(*size, dtype=torch.float64)
        torch.testing.assert_close(made(x), model(x), rtol=1e-10, atol=1e-10)
    done = bnfx.report(made)
    assert isinstance(done, bnfx.FoldReport)
    assert sum(r.verdict == "folded" for r in done.batch_norms) >= folded, done
