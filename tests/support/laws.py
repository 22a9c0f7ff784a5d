"""Laws that hold for every pass, model and input."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils import _pytree as pytree

import bnfx
from bnfx.gauges.written_out import AS_ARITHMETIC
from bnfx.graphs.norms import holds_norm, is_norm


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Running statistics, gamma and beta drawn at random; some gammas negative. In eval mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if not isinstance(module, _BatchNorm):
                continue
            for tensor in (module.running_mean, module.weight, module.bias):
                if tensor is not None:
                    tensor.copy_(torch.randn(tensor.shape, generator=generator))
            if module.running_var is not None:
                drawn = torch.rand(module.running_var.shape, generator=generator)
                module.running_var.copy_(drawn + 0.5)
    return model.eval()


def check_fold(model: nn.Module, *args: Tensor, **options: Any) -> list[str]:
    """Fold a float64 copy; outputs agree to 1e-10, the source is untouched. The verdicts."""
    wide, inputs = copy.deepcopy(model).double(), [x.double() for x in args]
    before = copy.deepcopy(wide.state_dict())
    flags = [module.training for module in wide.modules()]
    folded = bnfx.fold_bn(wide, **options)
    assert_same_state(wide.state_dict(), before)
    assert flags == [module.training for module in wide.modules()]
    assert_close(wide, folded, inputs)
    again = bnfx.fold_bn(folded, **options)
    assert_close(folded, again, inputs)
    records = bnfx.report(folded).to_dict()["batch_norms"]
    assert all(record["reason"] for record in records if record["verdict"] != "folded")
    kept = [record for record in records if record["verdict"] == "kept"]
    operators = [record for record in kept if not record["reason"].startswith(AS_ARITHMETIC)]
    assert count_batch_norms(folded) == len(operators)
    return [record["verdict"] for record in records]


def assert_close(a: nn.Module, b: nn.Module, inputs: list[Tensor]) -> None:
    """The same outputs to 1e-10 of the largest."""
    with torch.no_grad():
        truth = pytree.tree_leaves(a(*copy.deepcopy(inputs)))
        ours = pytree.tree_leaves(b(*copy.deepcopy(inputs)))
    assert len(truth) == len(ours)
    for x, y in zip(truth, ours, strict=True):
        assert x.shape == y.shape
        assert x.dtype == y.dtype
        assert float((x - y).abs().max()) <= 1e-10 * max(1.0, float(x.abs().max()))


def assert_same_state(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    """Bit-identical state dicts."""
    assert list(a) == list(b)
    assert all(a[name].is_meta or torch.equal(a[name], b[name]) for name in a)


def count_batch_norms(folded: fx.GraphModule) -> int:
    """Evaluations of BatchNorm in an inference graph, those of modules kept whole included."""
    functional = sum(is_norm(node) for node in folded.graph.nodes)
    called = [node for node in folded.graph.nodes if node.op == "call_module"]
    modules = [folded.get_submodule(str(node.target)) for node in called]
    return functional + sum(holds_norm(m) for top in modules for m in top.modules())
