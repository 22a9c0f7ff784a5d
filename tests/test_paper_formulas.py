"""The algebra of the paper, as properties of networks that bnfx has given BatchNorm."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import bnfx

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "paper"))
from formulas import batch_norm_backward, inference_map, largest_difference, population_statistics

LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(5, 6), (9, 5)),
    "tokens": (lambda: nn.Linear(5, 6), (4, 3, 5)),
    "conv1d": (lambda: nn.Conv1d(3, 6, 3), (4, 3, 7)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, groups=2), (3, 4, 5, 5)),
    "transposed": (lambda: nn.ConvTranspose2d(3, 6, 2, stride=2), (3, 3, 3, 3)),
    "conv3d": (lambda: nn.Conv3d(2, 6, 2), (3, 2, 3, 3, 3)),
}


def inserted(kind: str, seed: int) -> tuple[nn.Module, _BatchNorm, Tensor]:
    """A layer and a ReLU with BatchNorm between them, in float64 and train mode, and an input.

    eps is 1e-300: torch wants it positive, and this adds nothing to a variance.
    """
    torch.manual_seed(seed)
    build, shape = LAYERS[kind]
    net = bnfx.insert_bn(nn.Sequential(build(), nn.ReLU()), form="graph").double().train()
    norm = net.get_submodule("0_bn")
    assert isinstance(norm, _BatchNorm)
    norm.eps = 1e-300
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    return net, norm, torch.randn(shape, dtype=torch.float64)


def through(net: nn.Module, u: Tensor, a: float) -> tuple[Tensor, Tensor, Tensor]:
    """Output, gradient of u, gradient of the weight, with the weight times `a`."""
    weight = net.get_parameter("0.weight")
    with torch.no_grad():
        kept = weight.clone()
        weight.mul_(a)
    u = u.clone().requires_grad_()
    out = net(u)
    probe = torch.cos(torch.arange(out.numel(), dtype=out.dtype)).reshape(out.shape)
    by_u, by_weight = torch.autograd.grad((out * probe).sum(), (u, weight))
    with torch.no_grad():
        weight.copy_(kept)
    return out.detach(), by_u, by_weight


kinds, seeds = st.sampled_from(sorted(LAYERS)), st.integers(0, 2**31)


@settings(deadline=None, max_examples=40)
@given(kinds, seeds, st.floats(1e-4, 1e4))
def test_scaling_the_weights_changes_nothing(kind: str, seed: int, a: float) -> None:
    """Section 3.3: BN((aW)u) = BN(Wu); d/du stays; d/d(aW) = 1/a d/dW."""
    net, _, u = inserted(kind, seed)
    out, by_u, by_weight = through(net, u, 1.0)
    scaled_out, scaled_by_u, scaled_by_weight = through(net, u, a)
    assert largest_difference(out, scaled_out) < 1e-11
    assert largest_difference(by_u, scaled_by_u) < 1e-9
    assert largest_difference(by_weight, a * scaled_by_weight) < 1e-9


@settings(deadline=None, max_examples=40)
@given(kinds, seeds, st.integers(-20, 20))
def test_powers_of_two_are_exact(kind: str, seed: int, exponent: int) -> None:
    """Multiplying by a power of two rounds nothing, so that not one bit may differ."""
    net, _, u = inserted(kind, seed)
    a = 2.0**exponent
    out, by_u, by_weight = through(net, u, 1.0)
    scaled_out, scaled_by_u, scaled_by_weight = through(net, u, a)
    assert torch.equal(out, scaled_out)
    assert torch.equal(by_u, scaled_by_u)
    assert torch.equal(by_weight, a * scaled_by_weight)


def test_without_batch_norm_the_scale_matters() -> None:
    net = nn.Sequential(nn.Linear(5, 6), nn.ReLU()).double()
    u = torch.randn(9, 5, dtype=torch.float64)
    assert largest_difference(through(net, u, 1.0)[0], through(net, u, 3.0)[0]) > 0.1


def per_channel(x: Tensor) -> Tensor:
    """(N, C, ...) as (N * ..., C): batch and locations together, section 3.2."""
    return x.movedim(1, -1).flatten(0, -2)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 4), seeds, st.sampled_from([1e-5, 1e-2, 1.0]))
def test_backward_formulas(rank: int, seed: int, eps: float) -> None:
    """Section 3: the gradients with respect to x, gamma and beta, against autograd."""
    torch.manual_seed(seed)
    x = torch.randn((6, 3, 4, 3, 2)[: rank + 1], dtype=torch.float64, requires_grad=True)
    gamma, beta = (torch.randn(3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    y = F.batch_norm(x, None, None, gamma, beta, training=True, eps=eps)
    by_y = torch.randn_like(y)
    theirs = torch.autograd.grad(y, (x, gamma, beta), by_y)
    flat_x, flat_by_y = per_channel(x.detach()), per_channel(by_y)
    by_x, by_gamma, by_beta = batch_norm_backward(flat_x, flat_by_y, gamma.detach(), eps)
    assert largest_difference(per_channel(theirs[0]), by_x) < 1e-9
    assert largest_difference(theirs[1], by_gamma) < 1e-9
    assert largest_difference(theirs[2], by_beta) < 1e-9


@pytest.mark.parametrize("kind", sorted(LAYERS))
def test_the_frozen_transform_is_the_folded_layer(kind: str) -> None:
    """Algorithm 2: with population statistics BN is a linear map, and folding puts it into W."""
    net, norm, u = inserted(kind, seed=1)
    norm.eps = 1e-5
    seen: list[Tensor] = []
    with norm.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach())):
        for _ in range(4):
            net(torch.randn_like(u))
    mean, var = population_statistics([per_channel(x) for x in seen])
    assert norm.running_mean is not None
    assert norm.running_var is not None
    norm.running_mean.copy_(mean)
    norm.running_var.copy_(var)
    scale, shift = inference_map(norm.weight, norm.bias, mean, var, norm.eps)
    folded = bnfx.fold_bn(net.eval())
    before = net.get_submodule("0")(u)
    channels = -1 if kind in ("linear", "tokens") else 1
    by_hand = F.relu((before.movedim(channels, -1) * scale + shift).movedim(-1, channels))
    assert largest_difference(by_hand, net(u)) < 1e-12
    assert largest_difference(by_hand, folded(u)) < 1e-12
    assert not any(isinstance(m, _BatchNorm) for m in folded.modules())
