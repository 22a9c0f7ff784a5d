"""Networks as other libraries write them: every BatchNorm folds that mathematics allows."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import bnfx


class MaskedConv(nn.Module):
    """QuartzNet (NeMo): what lies behind the end of a sequence is zero before each convolution."""

    def __init__(self, inputs: int, outputs: int, size: int, groups: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv1d(inputs, outputs, size, padding=size // 2, groups=groups, bias=False)

    def forward(self, x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        times = torch.arange(x.size(2), device=x.device).expand(x.size(0), -1)
        x = x.masked_fill((times >= lengths.unsqueeze(1)).unsqueeze(1), 0)
        return self.conv(x), lengths


class QuartzBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, size: int) -> None:
        super().__init__()
        self.depthwise = MaskedConv(inputs, inputs, size, inputs)
        self.pointwise, self.norm = MaskedConv(inputs, outputs, 1), nn.BatchNorm1d(outputs)
        self.skip, self.skip_norm = MaskedConv(inputs, outputs, 1), nn.BatchNorm1d(outputs)

    def forward(self, x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        y, lengths = self.pointwise(*self.depthwise(x, lengths))
        skip, _ = self.skip(x, lengths)
        return torch.relu(self.norm(y) + self.skip_norm(skip)), lengths


class QuartzNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = QuartzBlock(4, 6, 3), QuartzBlock(6, 6, 5)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        return self.second(*self.first(x, lengths))[0]  # type: ignore[no-any-return]  # torch.nn's __call__


class GhostNorm(nn.Module):
    """TabNet: the batch is normalised in parts."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(size)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.bn(part) for part in x.chunk(math.ceil(x.shape[0] / 4), 0)], 0)


class Gated(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.fc, self.bn = nn.Linear(inputs, 2 * outputs, bias=False), GhostNorm(2 * outputs)
        self.size = outputs

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.fc(x))
        return x[:, : self.size] * torch.sigmoid(x[:, self.size :])


class TabNet(nn.Module):
    """A tensor is a plain attribute, as there."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.attend = Gated(5, 6), Gated(6, 6), nn.Linear(6, 5, bias=False)
        self.norm, self.scale = GhostNorm(5), torch.sqrt(torch.tensor(0.5, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        y = (self.second(y) + y) * self.scale
        out: Tensor = self.first(torch.softmax(self.norm(self.attend(y)), -1) * x)
        return out


class PatchLayer(nn.Module):
    """PatchTST: BatchNorm over features that stand last."""

    def __init__(self, size: int, *, before: bool) -> None:
        super().__init__()
        self.mix, self.before = nn.Linear(size, size), before
        self.feed = nn.Sequential(nn.Linear(size, 2 * size), nn.GELU(), nn.Linear(2 * size, size))
        self.first, self.second = nn.BatchNorm1d(size), nn.BatchNorm1d(size)

    def forward(self, x: Tensor) -> Tensor:
        for norm, layer in ((self.first, self.mix), (self.second, self.feed)):
            if self.before:
                x = x + layer(norm(x.transpose(1, 2)).transpose(1, 2))
            else:
                x = norm((x + layer(x)).transpose(1, 2)).transpose(1, 2)
        return x


def patches(*, before: bool) -> nn.Module:
    layers = (PatchLayer(6, before=before) for _ in range(2))
    return nn.Sequential(nn.Linear(4, 6), *layers, nn.Linear(6, 2))


class Chomp(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[:, :, :-2].contiguous()


class Temporal(nn.Module):
    """A temporal convolutional network (Bai et al. 2018): weight norm, padding cut off."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        convs = (nn.Conv1d(i, outputs, 3, padding=2) for i in (inputs, outputs))
        layers = [
            (parametrizations.weight_norm(conv), Chomp(), nn.BatchNorm1d(outputs), nn.ReLU())
            for conv in convs
        ]
        self.net = nn.Sequential(*(part for parts in layers for part in parts))
        self.down = nn.Conv1d(inputs, outputs, 1) if inputs != outputs else None

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.net(x) + (x if self.down is None else self.down(x)))


class Body(nn.Module):
    def __init__(self, body: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.body, self.conv, self.norm = body, nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Any:
        return torch.relu(self.norm(self.body(self, x)))


def tried(m: Any, x: Tensor) -> Any:
    """As speechbrain calls layers of which some take lengths."""
    try:
        return m.conv(x, lengths=1)
    except TypeError:
        return m.conv(x)


def asserted(m: Any, x: Tensor) -> Any:
    y = m.conv(x)
    torch.ops.aten._assert_tensor_metadata(y, None, None, torch.float64)
    return y


BODIES: dict[str, Callable[[Any, Tensor], Any]] = {
    "tried": tried,
    "asserted": asserted,
    "view": lambda m, x: (y := m.conv(x)).view(y.shape),
    "reshape": lambda m, x: (y := m.conv(x)).flatten(1).reshape(y.size()),
    "unflatten": lambda m, x: m.conv(x).flatten(2).unflatten(2, x.shape[2:]),
    "dtype": lambda m, x: m.conv(x).to(x.dtype),
    "like": lambda m, x: m.conv(x).type_as(x),
    "double": lambda m, x: m.conv(x).double(),
    "device": lambda m, x: m.conv(x).to(x.device),
    "pad": lambda m, x: m.conv(F.pad(x, (2, 0))),
}

SEQUENCES = (torch.randn(2, 4, 9), torch.tensor([9, 6]))
NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[Tensor, ...]]] = {
    "QuartzNet": (QuartzNet, SEQUENCES),
    "TabNet": (TabNet, (torch.randn(10, 5),)),
    "PatchTST, norm first": (lambda: patches(before=True), (torch.randn(2, 5, 4),)),
    "PatchTST": (lambda: patches(before=False), (torch.randn(2, 5, 4),)),
    "TCN": (lambda: nn.Sequential(Temporal(3, 4), Temporal(4, 4)), (torch.randn(2, 3, 12),)),
    **{name: (partial(Body, b), (torch.randn(2, 3, 5, 6),)) for name, b in BODIES.items()},
}


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize(("build", "inputs"), NETWORKS.values(), ids=NETWORKS)
def test_every_batch_norm_folds(
    build: Callable[[], nn.Module],
    inputs: tuple[Tensor, ...],
    given: bool,  # noqa: FBT001  # drawn by pytest
) -> None:
    if not given and build is TabNet:
        pytest.skip("the number of parts depends on the batch, which no symbolic trace takes")
    model = build()
    for name, value in model.state_dict().items():
        if "running" in name:
            value.uniform_(0.5, 1.5)
    model.double().eval()
    x = tuple(t.double() if t.is_floating_point() else t for t in inputs)
    folded = bnfx.fold_bn(model, x if given else None)
    torch.testing.assert_close(folded(*x), model(*x), rtol=1e-10, atol=1e-10)
    done = bnfx.report(folded)
    assert isinstance(done, bnfx.FoldReport)
    assert all(r.verdict == "folded" for r in done.batch_norms), done
