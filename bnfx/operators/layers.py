"""The one table of operators: what a convolution, a linear layer, a BatchNorm is.

Every pass reads it here. An operator has up to four spellings in a graph (module, function, tensor
method, ATen overload); a row names them all. A new operator is one row. How a gauge passes through
the other operators is in `bnfx.operators.passages`, what they mean to insertion in
`bnfx.operators.roles`.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from bnfx.operators.calls import function_name

_aten = torch.ops.aten


@dataclass(frozen=True)
class Affine:
    """A layer y = W * x + b, linear in its input, with one bias per output channel.

    Attributes:
        kind: Name in reports.
        module: Module class.
        functions: Functions and ATen overloads that compute it.
        spatial: Number of spatial axes of a convolution; None for linear, whose channels are the
            last axis.
        transposed: Whether the weight is (in, out / groups, ...), not (out, in / groups, ...).
        signature: Argument names in positional order.
    """

    kind: str
    module: type[nn.Module]
    functions: tuple[Callable[..., Any], ...]
    spatial: int | None
    transposed: bool
    signature: tuple[str, ...]


_CONV = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_CONV_T = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")

AFFINE: tuple[Affine, ...] = (
    Affine("conv1d", nn.Conv1d, (F.conv1d, _aten.conv1d.default), 1, False, _CONV),
    Affine("conv2d", nn.Conv2d, (F.conv2d, _aten.conv2d.default), 2, False, _CONV),
    Affine("conv3d", nn.Conv3d, (F.conv3d, _aten.conv3d.default), 3, False, _CONV),
    Affine("conv1d", nn.Conv1d, (_aten.conv1d.padding,), 1, False, _CONV),
    Affine("conv2d", nn.Conv2d, (_aten.conv2d.padding,), 2, False, _CONV),
    Affine("conv3d", nn.Conv3d, (_aten.conv3d.padding,), 3, False, _CONV),
    Affine(
        "conv_transpose1d",
        nn.ConvTranspose1d,
        (F.conv_transpose1d, _aten.conv_transpose1d.default),
        1,
        True,
        _CONV_T,
    ),
    Affine(
        "conv_transpose2d",
        nn.ConvTranspose2d,
        (F.conv_transpose2d, _aten.conv_transpose2d.input),
        2,
        True,
        _CONV_T,
    ),
    Affine(
        "conv_transpose3d",
        nn.ConvTranspose3d,
        (F.conv_transpose3d, _aten.conv_transpose3d.input),
        3,
        True,
        _CONV_T,
    ),
    Affine(
        "linear",
        nn.Linear,
        (F.linear, _aten.linear.default),
        None,
        False,
        ("input", "weight", "bias"),
    ),
)

_AFFINE_BY_FUNCTION = {function: row for row in AFFINE for function in row.functions}

#: Matrix products that are a linear layer where the second factor is a parameter, (in, out).
_PRODUCTS = {
    "addmm": Affine(
        "addmm",
        nn.Module,
        (torch.addmm, _aten.addmm.default),
        None,
        True,
        ("bias", "input", "weight"),
    ),
    "matmul": Affine(
        "matmul",
        nn.Module,
        (torch.matmul, operator.matmul, _aten.matmul.default),
        None,
        True,
        ("input", "weight"),
    ),
}

#: Spellings of batch normalisation and the order of their arguments.
BATCH_NORM: dict[Callable[..., Any], tuple[str, ...]] = {
    F.batch_norm: (
        *("input", "running_mean", "running_var", "weight", "bias"),
        *("training", "momentum", "eps"),
    ),
    **dict.fromkeys(
        (torch.batch_norm, _aten.batch_norm.default),
        (
            *("input", "weight", "bias", "running_mean", "running_var"),
            *("training", "momentum", "eps", "cudnn_enabled"),
        ),
    ),
}

#: Instance normalisation, which with running statistics in eval mode is batch normalisation.
INSTANCE_NORM: dict[Callable[..., Any], tuple[str, ...]] = {
    F.instance_norm: (
        *("input", "running_mean", "running_var", "weight", "bias"),
        *("use_input_stats", "momentum", "eps"),
    ),
    **dict.fromkeys(
        (torch.instance_norm, _aten.instance_norm.default),
        (
            *("input", "weight", "bias", "running_mean", "running_var"),
            *("use_input_stats", "momentum", "eps", "cudnn_enabled"),
        ),
    ),
}


def affine_of(node: fx.Node, modules: Mapping[str, nn.Module]) -> Affine | None:
    """The row of an affine layer, called as a function or as one of `modules`; None for others."""
    if node.op == "call_function":
        return _AFFINE_BY_FUNCTION.get(node.target)  # type: ignore[arg-type]  # lookup by any key
    if node.op != "call_module" or str(node.target) not in modules:
        return None
    return affine_module(modules[str(node.target)])


def product_of(node: fx.Node) -> Affine | None:
    """The row of a matrix product; it is an affine layer if its weight is a parameter of rank 2."""
    if node.op not in ("call_function", "call_method"):
        return None
    return _PRODUCTS.get(function_name(node.target))


def affine_module(module: nn.Module) -> Affine | None:
    """The row of an affine module. A subclass with a forward of its own is something else."""
    for row in AFFINE:
        if isinstance(module, row.module) and type(module).forward is row.module.forward:
            return row
    return None
