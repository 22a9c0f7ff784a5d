"""The table of passages: how a per-channel affine map passes through an operator."""

from __future__ import annotations

import operator
from collections.abc import Callable
from enum import Enum, auto
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from bnfx.operators.calls import base_name, function_name


class Passage(Enum):
    """How a per-channel affine map x' = a (x + d) passes through an operator.

    `a` is the scale, `d` the displacement. An operator that has no row lets nothing through.
    """

    MOVE = auto()  # moves elements, whatever they are: executed on the labels
    IDENTITY = auto()  # the same elements
    SHAPE = auto()  # depends on shapes and dtypes alone
    RECTIFIER = auto()  # f(a x) = a f(x) for a > 0; d = 0
    MAX_POOL = auto()  # one scale and one displacement for each window; a > 0
    AVERAGE_POOL = auto()  # weighted means over space; d = 0 if padded zeros are counted
    INTERPOLATE = auto()  # weighted means over space
    MEAN = auto()  # over the axes it is given
    SUM = auto()  # likewise, d = 0
    PAD = auto()  # with zeros d = 0; mirrored and repeated elements keep theirs
    CONCAT = auto()
    STACK = auto()
    ADD = auto()
    SUBTRACT = auto()
    MULTIPLY = auto()
    DIVIDE = auto()
    MATMUL = auto()  # linear in its second operand, rows that sum to one pass d too
    ATTENTION = auto()  # likewise in its third
    SOFTMAX = auto()  # lets nothing through; its rows sum to one
    EXTREMUM = auto()  # of two tensors: one scale, a > 0, one displacement
    NORM = auto()  # layer and group norm: nothing in, anything out of its own affine map
    CLAMP = auto()  # bounds per channel carry any map; only by choice (thresholds)


_PASSAGES: dict[Passage, str] = {
    Passage.MOVE: "view reshape flatten unflatten permute transpose movedim moveaxis swapaxes "
    "swapdims squeeze unsqueeze chunk split split_with_sizes tensor_split unbind getitem narrow "
    "select slice roll t flip pixel_shuffle pixel_unshuffle channel_shuffle expand repeat tile "
    "expand_as view_as reshape_as index_select index unfold rot90 adjoint numpy_T "
    "unsafe_chunk unsafe_split _unsafe_view",
    Passage.IDENTITY: "contiguous clone detach alias to float half double bfloat16 type_as type "
    "dropout dropout1d dropout2d dropout3d feature_dropout alpha_dropout feature_alpha_dropout "
    "identity lift_fresh_copy lift_fresh _to_copy positive",
    Passage.SHAPE: "size dim numel zeros_like ones_like empty_like full_like rand_like new_zeros "
    "new_ones new_full new_empty sym_size sym_numel is_floating_point ndimension stride",
    Passage.RECTIFIER: "relu leaky_relu prelu",
    Passage.MAX_POOL: "max_pool1d max_pool2d max_pool3d max_pool2d_with_indices "
    "max_pool3d_with_indices adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d",
    Passage.AVERAGE_POOL: "avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d "
    "adaptive_avg_pool2d adaptive_avg_pool3d",
    Passage.INTERPOLATE: "interpolate upsample upsample_nearest1d upsample_nearest2d "
    "upsample_nearest3d upsample_bilinear2d upsample_linear1d upsample_trilinear3d "
    "upsample_bicubic2d",
    Passage.MEAN: "mean",
    Passage.SUM: "sum",
    Passage.PAD: "pad constant_pad_nd",
    Passage.CONCAT: "cat concat concatenate",
    Passage.STACK: "stack",
    Passage.ADD: "add iadd",
    Passage.SUBTRACT: "sub subtract isub",
    Passage.MULTIPLY: "mul multiply imul",
    Passage.DIVIDE: "div divide truediv itruediv true_divide",
    Passage.MATMUL: "matmul bmm",
    Passage.ATTENTION: "scaled_dot_product_attention",
    Passage.SOFTMAX: "softmax",
    Passage.EXTREMUM: "maximum minimum",
    Passage.NORM: "layer_norm group_norm",
    Passage.CLAMP: "relu6 hardtanh clamp clip clamp_min clamp_max",
}

_PASSAGE_BY_NAME = {name: row for row, names in _PASSAGES.items() for name in names.split()}

#: Where an operator's name must come from to count: a user's function may be called `add` too.
_NAMESPACES: tuple[Any, ...] = (torch, F, operator, torch._C._nn, torch.special, torch.Tensor)


def passage_of(node: fx.Node) -> Passage | None:
    """How a per-channel affine map passes through the call; None where nothing is known."""
    if node.op == "call_method":
        return _PASSAGE_BY_NAME.get(base_name(str(node.target)))
    if node.op != "call_function":
        return None
    if isinstance(node.target, torch._ops.OpOverload):
        known = node.target.namespace == "aten"
        return _PASSAGE_BY_NAME.get(base_name(function_name(node.target))) if known else None
    return _PASSAGE_BY_FUNCTION.get(node.target)  # type: ignore[arg-type]  # lookup by any key


def _functions() -> dict[Callable[..., Any], Passage]:
    found: dict[Callable[..., Any], Passage] = {}
    for name, row in _PASSAGE_BY_NAME.items():
        for spelling in (name, f"{name}_"):
            for space in _NAMESPACES:
                function = vars(space).get(spelling)
                if callable(function):
                    found[function] = row
    return found


_PASSAGE_BY_FUNCTION = _functions()
