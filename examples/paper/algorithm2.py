"""Algorithm 2: population statistics freeze BatchNorm into a linear map, which folds away."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import torch
from claims import Bench, Row, Study, main, two_arms, within
from formulas import inference_map, largest_difference, population_statistics
from pictures import WITH_BN, WITHOUT_BN, entitle, panel_row, save
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from training import constant, train

import bnfx

BATCH = 60


def measure(bench: Bench) -> dict[str, Any]:
    """A trained network: its statistics and its folded form, against the paper's formulas."""
    steps = 200 if bench.quick else 5_000
    bench.expect(steps)
    net = two_arms(bench, bench.seeds[0])["with"]
    train(net, bench.data, lr=0.3, steps=steps, decay=constant, tick=bench.tick, points=1)
    net, images = net.double().cpu(), bench.data.train_images.double().cpu()
    batches = list(images.split(BATCH))[: len(images) // BATCH]
    by_hand = _by_hand(net, batches)
    paper = bnfx.recalibrate_bn(copy.deepcopy(net), batches, estimator="paper", progress=False)
    exact = bnfx.recalibrate_bn(copy.deepcopy(net), batches, estimator="exact", progress=False)
    test = bench.data.test_images.double().cpu()
    names = [name for name, m in net.named_modules() if isinstance(m, _BatchNorm)]
    return {
        "batches": len(batches),
        "statistics": {name: _against(paper, name, by_hand[name]) for name in names},
        "estimators": {name: _against(exact, name, by_hand[name]) for name in names},
        "moving_averages": {name: _against(net, name, by_hand[name]) for name in names},
        "folded": _folded(paper.eval(), names, test),
    }


def _by_hand(net: nn.Module, batches: list[Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """What Algorithm 2 gives, from the inputs of every BatchNorm in train mode."""
    copied = copy.deepcopy(net).train()
    seen: dict[str, list[Tensor]] = {}
    for name, module in copied.named_modules():
        if isinstance(module, _BatchNorm):
            kept = seen.setdefault(name, [])
            module.register_forward_pre_hook(lambda _, args, kept=kept: kept.append(args[0]))
    with torch.no_grad():
        for batch in batches:
            copied(batch)
    return {name: population_statistics(inputs) for name, inputs in seen.items()}


def _against(net: nn.Module, name: str, truth: tuple[Tensor, Tensor]) -> list[float]:
    """Relative differences of running mean and running variance."""
    buffers = (net.get_buffer(f"{name}.{kind}") for kind in ("running_mean", "running_var"))
    return [largest_difference(a, b) for a, b in zip(truth, buffers, strict=True)]


def _folded(net: nn.Module, names: list[str], test: Tensor) -> dict[str, float]:
    """The folded network against the network, and its weights against the paper's linear map."""
    folded = bnfx.fold_bn(net)
    weights, biases = [], []
    for name in names:
        norm = net.get_submodule(name)
        assert isinstance(norm, _BatchNorm)
        assert norm.running_mean is not None
        assert norm.running_var is not None
        stats = (norm.running_mean, norm.running_var)
        scale, shift = inference_map(norm.weight, norm.bias, *stats, norm.eps)
        layer = name.removesuffix("_bn")
        weight = net.get_parameter(f"{layer}.weight")
        weights.append(
            largest_difference(scale[:, None] * weight, folded.get_parameter(f"{layer}.weight"))
        )
        biases.append(largest_difference(shift, folded.get_parameter(f"{layer}.bias")))
    with torch.no_grad():
        outputs = largest_difference(net(test), folded(test))
    left = sum(isinstance(module, _BatchNorm) for module in folded.modules())
    return {"outputs": outputs, "weights": max(weights), "biases": max(biases), "left": left}


def draw(results: dict[str, Any], path: Path) -> None:
    """How far each way of taking the statistics is from Algorithm 2, layer by layer."""
    figure, (ax,) = panel_row(1, width=6.4)
    ways = (
        ("recalibrate_bn, paper", results["statistics"], WITH_BN),
        ("recalibrate_bn, exact", results["estimators"], "#009E73"),
        ("moving averages of training", results["moving_averages"], WITHOUT_BN),
    )
    layers = list(results["statistics"])
    ticks = [f"{layer}\n{kind}" for layer in layers for kind in ("mean", "variance")]
    for name, differences, color in ways:
        values = [max(value, 1e-17) for layer in layers for value in differences[layer]]
        ax.plot(range(len(ticks)), values, "o", color=color, label=name, clip_on=False)
    ax.set_xticks(range(len(ticks)), ticks, fontsize=8)
    ax.set(yscale="log", ylim=(1e-17, 1), ylabel="Relative difference to Algorithm 2")
    entitle(ax, f"Population statistics, {results['data']}", f"{results['batches']} batches of 60")
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    save(figure, path)


def judge(results: dict[str, Any]) -> list[Row]:
    """Statistics and folded map, equal to the formulas up to rounding."""
    worst = {
        way: max(max(values) for values in results[way].values())
        for way in ("statistics", "estimators", "moving_averages")
    }
    folded = results["folded"]
    by_map = max(folded["weights"], folded["biases"])
    return [
        Row(
            "recalibrate_bn(estimator='paper') against E_B[mean], m/(m-1) E_B[var]",
            "the definition",
            within(worst["statistics"]),
            _holds(worst["statistics"]),
        ),
        Row(
            "moving averages after training, against the same",
            "may be used instead",
            within(worst["moving_averages"]),
            "an estimate: the last batches count most, and the weights moved meanwhile",
        ),
        Row(
            "exact moments of all images (estimator='exact'), against the same",
            "-",
            within(worst["estimators"]),
            "another estimator: it adds the spread of the batch means",
        ),
        Row(
            "folded weights against gamma / sqrt(Var + eps) W, and their biases",
            "the definition",
            within(by_map),
            _holds(by_map),
        ),
        Row(
            "outputs, folded against unfolded, float64",
            "equal",
            f"{within(folded['outputs'])}, {folded['left']} BatchNorms left",
            _holds(folded["outputs"]),
        ),
    ]


def _holds(value: float) -> str:
    return "holds, to rounding" if value < 1e-10 else "does not hold"


STUDY = Study("algorithm2", (__doc__ or "").strip(), measure, draw, judge, seeds=1)

if __name__ == "__main__":
    sys.exit(main(STUDY, sys.argv[1:]))
