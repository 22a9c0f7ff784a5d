"""Section 3.3: BN((aW)u) = BN(Wu), and its gradients; section 3: the backward formulas."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from claims import Bench, Row, Study, main, within
from formulas import batch_norm_backward, largest_difference
from networks import sigmoid_mlp
from pictures import WITH_BN, WITHOUT_BN, entitle, panel_row, save
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import bnfx

SCALES = (1e-3, 1e-2, 0.1, 0.5, 2.0, 3.7, 10.0, 100.0, 1e3)
#: torch asks for a positive eps in train mode; 1e-300 adds nothing to a variance in float64.
EPS = {"no eps": 1e-300, "eps 1e-5": 1e-5}


def measure(bench: Bench) -> dict[str, Any]:
    """Relative differences in float64, on real images, through a network made by bnfx."""
    bench.expect(len(SCALES) * len(EPS))
    torch.manual_seed(0)
    net = (
        bnfx.insert_bn(sigmoid_mlp(20, 2, inputs=bench.pixels, std=0.1), form="graph")
        .double()
        .cpu()
    )
    images = bench.data.test_images[:60].double().cpu()
    scaled = {}
    for name, eps in EPS.items():
        for module in net.modules():
            if isinstance(module, _BatchNorm):
                module.eps = eps
        rows = []
        for a in SCALES:
            rows.append([a, *_differences(net, images, a)])
            bench.tick()
        scaled[name] = rows
    return {"scaled": scaled, "backward": _backward(net, images)}


def _differences(net: nn.Module, images: Tensor, a: float) -> list[float]:
    """How far output, Jacobian with respect to u, and a times the weight's gradient move."""
    plain, moved = (_pass(net, images, scale) for scale in (1.0, a))
    factors = (1.0, 1.0, a)
    pairs = zip(plain, moved, factors, strict=True)
    return [largest_difference(x, factor * y) for x, y, factor in pairs]


def _pass(net: nn.Module, images: Tensor, a: float) -> tuple[Tensor, Tensor, Tensor]:
    """Output, gradient of u and gradient of the weights, with the first weights times `a`."""
    weight = net.get_parameter("fc1.weight")
    kept = weight.detach().clone()
    u = images.clone().requires_grad_()
    with torch.no_grad():
        weight.mul_(a)
    out = net.train()(u)
    probe = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).reshape(out.shape)
    by_u, by_weight = torch.autograd.grad((out * probe).sum(), (u, weight))
    with torch.no_grad():
        weight.copy_(kept)
    return out.detach(), by_u, by_weight


def _backward(net: nn.Module, images: Tensor) -> dict[str, float]:
    """The paper's six formulas against autograd, at the first BatchNorm of the network."""
    norm = net.get_submodule("fc1_bn")
    assert isinstance(norm, _BatchNorm)
    x = net.get_submodule("fc1")(images.flatten(1)).detach().requires_grad_()
    y = norm.train()(x)
    by_y = torch.cos(torch.arange(y.numel(), dtype=y.dtype)).reshape(y.shape)
    theirs = torch.autograd.grad(y, (x, norm.weight, norm.bias), by_y)
    ours = batch_norm_backward(x.detach(), by_y, norm.weight.detach(), norm.eps)
    names = ("input", "gamma", "beta")
    return {name: largest_difference(a, b) for name, a, b in zip(names, theirs, ours, strict=True)}


def draw(results: dict[str, Any], path: Path) -> None:
    """The largest of the three differences over the factor a; an exact 0 lies on the axis."""
    floor = 1e-17
    figure, (ax,) = panel_row(1, width=6.4)
    for (name, rows), color in zip(results["scaled"].items(), (WITH_BN, WITHOUT_BN), strict=True):
        worst = [max(*row[1:], floor) for row in rows]
        line = ax.plot([row[0] for row in rows], worst, "o-", color=color, label=name)
        line[0].set(markersize=4, clip_on=False)
    ax.axhline(torch.finfo(torch.float64).eps, color="0.55", linestyle=(0, (4, 3)), linewidth=0.9)
    ax.text(SCALES[0], 3e-17, "rounding of float64", color="0.45", fontsize=9)
    ax.set(xscale="log", yscale="log", xlabel="Factor a of the weights", ylim=(floor, 1))
    ax.set_ylabel("Largest relative difference")
    subtitle = "output, Jacobian, a times the gradient; without eps exactly equal at powers of two"
    entitle(ax, "BN((aW)u) = BN(Wu), and its gradients", subtitle)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9.5)
    save(figure, path)


def judge(results: dict[str, Any]) -> list[Row]:
    """Exact to rounding without eps; how far eps disturbs it; the backward formulas."""
    limit = 1e-10
    exact = [max(column) for column in zip(*results["scaled"]["no eps"], strict=True)][1:]
    mild = [row for row in results["scaled"]["eps 1e-5"] if row[0] >= 0.5]
    disturbed = max(max(row[1:]) for row in mild)
    worst = max(results["backward"].values())
    names = ("output", "Jacobian with respect to u", "gradient with respect to aW, times a")
    rows = [
        Row(f"{name}, no eps", "equal", within(value), _holds(value, limit))
        for name, value in zip(names, exact, strict=True)
    ]
    rows.append(
        Row(
            "all three with eps 1e-5, a from 0.5 up",
            "equal (eps is not mentioned)",
            within(disturbed),
            "holds up to eps; for small a, eps outweighs the variance and it does not",
        )
    )
    rows.append(
        Row(
            "backward formulas against autograd, float64",
            "derived",
            within(worst),
            _holds(worst, limit),
        )
    )
    return rows


def _holds(value: float, limit: float) -> str:
    return "holds, to rounding" if value < limit else "does not hold"


STUDY = Study("identities", (__doc__ or "").strip(), measure, draw, judge, seeds=1)

if __name__ == "__main__":
    sys.exit(main(STUDY, sys.argv[1:]))
