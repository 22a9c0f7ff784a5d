"""Where a 16-bit model is finite on inputs of its calibrated range, so is the fold."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import bnfx

NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), (32, 4)),
    "conv": (lambda: nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)), (8, 4, 6, 6)),
    "transposed": (
        lambda: nn.Sequential(nn.ConvTranspose2d(4, 4, 2), nn.BatchNorm2d(4)),
        (8, 4, 6, 6),
    ),
    "forward": (lambda: nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 4)), (32, 4)),
    "between": (
        lambda: nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 4)),
        (32, 4),
    ),
}


def calibrated(model: nn.Module, x: Tensor, size: float, gammas: float) -> nn.Module:
    """`model` with norms that saw `x`, weights times `size` and gammas times `gammas`."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
                layer.weight.copy_(torch.rand(layer.weight.shape, generator=generator) * size)
            if isinstance(layer, nn.modules.batchnorm._BatchNorm):
                layer.momentum = None
                layer.weight.mul_(gammas)
        model.train()(x)
    return model.eval()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("gammas", [1e-3, 1.0, 50.0])
@pytest.mark.parametrize(("offset", "size"), [(0.0, 1.0), (200.0, 2.0), (200.0, 1e-3), (5.0, 30.0)])
@pytest.mark.parametrize("name", NETWORKS)
def test_finite_where_the_source_is(
    name: str, offset: float, size: float, gammas: float, dtype: torch.dtype
) -> None:
    build, shape = NETWORKS[name]
    # a narrow spread around a large mean makes the shift large beside what is left of it
    x = offset + torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 0.1
    model = calibrated(build(), x, size, gammas).to(dtype)
    x = x.to(dtype)
    truth = model(x)
    if not truth.isfinite().all():
        pytest.skip("the source itself is not finite")
    for folded in (bnfx.fold_bn(model, (x,)), bnfx.fold_bn(model)):
        assert folded(x).isfinite().all()
        for tensor in folded.state_dict().values():
            assert tensor.isfinite().all()


@pytest.mark.parametrize("layer", [nn.Conv2d(4, 4, 1), nn.ConvTranspose2d(4, 4, 1)])
def test_half_layers_with_norms_in_single_precision(layer: nn.Module) -> None:
    x = 200 + torch.randn(8, 4, 5, 5, generator=torch.Generator().manual_seed(1)) * 0.1
    model = calibrated(nn.Sequential(layer, nn.BatchNorm2d(4)), x, 2.0, 50.0)
    model[0].half()  # type: ignore[index]  # a Sequential
    truth = model(x.half())
    assert truth.isfinite().all()
    assert bnfx.fold_bn(model, (x.half(),))(x.half()).isfinite().all()


def test_a_reason_is_given() -> None:
    x = 200 + torch.randn(32, 4, generator=torch.Generator().manual_seed(1)) * 0.1
    build, _ = NETWORKS["linear"]
    folded = bnfx.fold_bn(calibrated(build(), x, 2.0, 50.0).half())
    report = bnfx.report(folded)
    assert isinstance(report, bnfx.FoldReport)
    assert "the range of float16" in report.batch_norms[0].reason
