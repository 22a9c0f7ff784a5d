"""BatchNorm as an affine map: y = s x + t for each channel, in float64."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeGuard

import numpy as np
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from bnfx.graphs.constants import Values
from bnfx.numbers import Floats
from bnfx.operators.calls import arguments
from bnfx.operators.table import is_batch_norm, is_instance_norm

#: The tensors of a BatchNorm call.
STATE = ("running_mean", "running_var", "weight", "bias")


@dataclass(frozen=True)
class AffineMap:
    """y = s x + t, and what is known of x. All (channels,), float64."""

    s: Floats  #: gamma / sqrt(var + eps)
    t: Floats  #: beta - mean s
    mean: Floats  #: running mean of x
    std: Floats  #: sqrt(var + eps)


def norm_call(node: fx.Node) -> dict[str, Any]:
    """The arguments of a batch or instance norm by name; `training` tells for both."""
    call = arguments(node)
    return call if is_batch_norm(node) else call | {"training": call["use_input_stats"]}


def is_norm(node: fx.Node) -> bool:
    """Whether the call evaluates a BatchNorm, or an InstanceNorm with running statistics."""
    if is_batch_norm(node):
        return True
    if not is_instance_norm(node):
        return False
    call = arguments(node)
    return call["running_mean"] is not None and call["use_input_stats"] is False


def holds_norm(module: nn.Module) -> bool:
    """Whether a module is a BatchNorm: one of torch's, or one with running statistics of its own.

    InstanceNorm, which may have some too, is none.
    """
    if isinstance(module, _BatchNorm | _InstanceNorm):
        return isinstance(module, _BatchNorm)
    state = {**module._parameters, **module._buffers}
    known = (state.get(name) is not None for name in ("running_mean", "running_var"))
    return all(known) and not module._modules


def is_stock_norm(module: nn.Module) -> TypeGuard[_BatchNorm]:
    """Whether this is BatchNorm as torch computes it; in eval mode SyncBatchNorm is the same."""
    stock = (_BatchNorm.forward, nn.SyncBatchNorm.forward)
    if not isinstance(module, _BatchNorm) or "forward" in vars(module):
        return False
    return type(module).forward in stock


def affine_map_of(node: fx.Node, values: Values) -> AffineMap | str:
    """The map, or why this norm is none."""
    call = norm_call(node)
    if call["training"] is not False:
        return "it normalises with batch statistics (train mode); call model.eval() first"
    if call["running_mean"] is None or call["running_var"] is None:
        return "it has no running statistics, so its scale depends on the batch"
    state: dict[str, Floats | None] = {}
    for name in STATE:
        value = values.of(call[name])
        if call[name] is not None and value is None:
            return f"its {name} is computed, or written while the network runs"
        if value is not None and value.is_meta:
            return f"its {name} is on the meta device and has no values; load the weights first"
        state[name] = None if value is None else _float64(value)
    if not isinstance(call["eps"], float | int):
        return "its eps is computed while the network runs"
    mean, var = state["running_mean"], state["running_var"]
    assert mean is not None
    assert var is not None
    gamma, beta = state["weight"], state["bias"]
    with np.errstate(all="ignore"):
        std = np.sqrt(var + call["eps"])
        s = 1.0 / std if gamma is None else gamma / std
        t = -mean * s if beta is None else beta - mean * s
    bad = np.flatnonzero(~(np.isfinite(s) & np.isfinite(t)))
    if len(bad):
        return f"its map is not finite on channels {bad.tolist()[:8]}"
    with np.errstate(all="ignore"):  # a fold carries what it reads as s (x + t/s)
        lost = np.flatnonzero((s != 0) & ~(np.isfinite(1 / s) & np.isfinite(t / s)))
    if len(lost):
        return f"its scale is too small to divide by on channels {lost.tolist()[:8]}"
    return AffineMap(s, t, mean, std)


def _float64(value: Tensor) -> Floats:
    return np.asarray(value.detach().double().cpu().numpy())
