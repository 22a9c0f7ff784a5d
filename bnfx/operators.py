"""The one table of operators: what a convolution, a BatchNorm, a nonlinearity is.

Every pass reads it here. An operator has up to four spellings in a graph (module, function, tensor
method, ATen overload); a row names them all. A new operator is one row.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

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

#: Values of arguments that a call leaves out.
_DEFAULTS = {
    "bias": None,
    "weight": None,
    "training": False,
    "use_input_stats": True,
    "eps": 1e-5,
    "stride": 1,
    "padding": 0,
    "output_padding": 0,
    "dilation": 1,
    "groups": 1,
    "running_mean": None,
    "running_var": None,
}


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


def base_name(name: str) -> str:
    """The operator without its in-place mark: "relu_" -> "relu"."""
    return name[:-1] if name.endswith("_") and not name.endswith("__") else name


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


def argument(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    """An argument of a call by position or keyword; ATen calls its first one `self`."""
    if position < len(node.args):
        return node.args[position]
    if name == "input" and "self" in node.kwargs:
        return node.kwargs["self"]
    return node.kwargs.get(name, default)


class Role(Enum):
    """What an operator means to the rule of insertion (Ioffe & Szegedy 2015, section 3.2)."""

    AFFINE = auto()
    NORM = auto()
    NONLINEARITY = auto()
    SQUASHING = auto()  # at the end of a network it belongs to the head: sigmoid, tanh, exp
    MOVE = auto()  # shape-only, dropout, pooling: statistics per channel keep their meaning
    ADD = auto()
    SCALE = auto()  # a product: with a constant, statistics per channel keep their meaning
    OTHER = auto()


_MODULES: dict[Role, tuple[type[nn.Module], ...]] = {
    Role.NORM: (
        *(_BatchNorm, _InstanceNorm, nn.LayerNorm, nn.GroupNorm, nn.LocalResponseNorm),
        *(nn.RMSNorm, nn.CrossMapLRN2d),
    ),
    Role.NONLINEARITY: (
        *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.RReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU),
        *(nn.SiLU, nn.Mish, nn.Softshrink, nn.Hardshrink, nn.Tanhshrink),
        *(nn.Threshold, nn.Hardswish, nn.GLU),
    ),
    Role.SQUASHING: (
        *(nn.Sigmoid, nn.Tanh, nn.Hardsigmoid, nn.Hardtanh, nn.LogSigmoid, nn.Softsign),
    ),
    Role.MOVE: (
        *(nn.Identity, nn.Flatten, nn.Unflatten, nn.PixelShuffle, nn.PixelUnshuffle),
        *(nn.ChannelShuffle, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d),
        *(nn.AlphaDropout, nn.FeatureAlphaDropout),
        *(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d),
        *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d),
        *(nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d),
        *(nn.LPPool1d, nn.LPPool2d, nn.Upsample, nn.ZeroPad2d, nn.ConstantPad2d),
    ),
}


def words(text: str) -> frozenset[str]:
    """The words of a text."""
    return frozenset(text.split())


_NAMES: dict[Role, frozenset[str]] = {
    Role.NORM: words(
        "batch_norm layer_norm group_norm instance_norm rms_norm local_response_norm normalize "
        "native_layer_norm native_group_norm var std var_mean std_mean norm linalg_norm "
        "linalg_vector_norm"
    ),
    Role.NONLINEARITY: words(
        "relu relu_ relu6 leaky_relu leaky_relu_ prelu rrelu rrelu_ elu elu_ selu selu_ celu "
        "celu_ gelu silu mish softshrink hardshrink tanhshrink threshold threshold_ "
        "hardswish clamp_min abs maximum minimum square pow sin cos glu"
    ),
    Role.SQUASHING: words(
        "sigmoid sigmoid_ tanh tanh_ hardsigmoid hardtanh hardtanh_ logsigmoid softsign "
        "log_sigmoid erf exp softplus clamp clamp_ clip"
    ),
    Role.MOVE: words(
        "view reshape flatten unflatten permute transpose movedim swapaxes contiguous squeeze "
        "unsqueeze chunk split getitem cat concat stack narrow select roll t pixel_shuffle "
        "pixel_unshuffle channel_shuffle expand to float type_as clone view_as reshape_as "
        "dropout dropout1d dropout2d dropout3d dropout_ alpha_dropout feature_dropout "
        "max_pool1d max_pool2d max_pool3d boolean_dispatch avg_pool1d avg_pool2d avg_pool3d "
        "adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d "
        "adaptive_max_pool2d adaptive_max_pool3d _max_pool1d _max_pool2d _max_pool3d "
        "_adaptive_max_pool1d _adaptive_max_pool2d _adaptive_max_pool3d lp_pool2d interpolate "
        "upsample pad mean __getitem__ T mT detach alias type half double bfloat16 repeat swapdims "
        "moveaxis flip unfold fold masked_fill dropout_ native_dropout feature_alpha_dropout "
        "max_pool2d_with_indices zero_pad2d reflection_pad2d narrow_copy tensor_split unbind"
    ),
    Role.ADD: words("add iadd sub isub add_ sub_ __add__ __radd__ rsub subtract"),
    Role.SCALE: words("mul imul mul_ multiply div idiv itruediv truediv div_ true_divide"),
}

_ROLE_BY_NAME = {name: role for role, names in _NAMES.items() for name in names}

#: Modules of torch.nn whose forward is one call of a function of this table: tracing goes through.
TRANSPARENT_MODULES: frozenset[type[nn.Module]] = frozenset(
    {row.module for row in AFFINE}
    | {m for role in (Role.NONLINEARITY, Role.SQUASHING) for m in _MODULES[role]}
    | {m for m in _MODULES[Role.MOVE] if m is not nn.Unflatten}
    | {nn.LayerNorm, nn.GroupNorm, nn.RMSNorm}
)


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


def role_of(node: fx.Node, modules: Mapping[str, nn.Module]) -> Role:
    """What the operator of `node` means to the rule of insertion."""
    if affine_of(node, modules) is not None:
        return Role.AFFINE
    if node.op == "call_module":
        module = modules[str(node.target)]
        return next(
            (role for role, kinds in _MODULES.items() if isinstance(module, kinds)), Role.OTHER
        )
    if node.op == "call_method":
        return _ROLE_BY_NAME.get(str(node.target), Role.OTHER)
    if node.op != "call_function":
        return Role.OTHER
    if node.target in (operator.add, operator.iadd, operator.sub, operator.isub, torch.add):
        return Role.ADD
    return _ROLE_BY_NAME.get(function_name(node.target), Role.OTHER)


def function_name(target: Any) -> str:
    """`F.relu` and `aten.relu.default` -> "relu"."""
    if isinstance(target, torch._ops.OpOverload):
        return str(target.overloadpacket.__name__)
    return str(getattr(target, "__name__", target))


def arguments(node: fx.Node, signature: tuple[str, ...]) -> dict[str, Any]:
    """The call's arguments by name, whether given by position or by keyword, with defaults."""
    return _DEFAULTS | dict(zip(signature, node.args, strict=False)) | dict(node.kwargs)


#: Position of the flag `inplace` in functions of torch.nn.functional.
_INPLACE = {
    **dict.fromkeys(("relu", "relu6", "selu", "silu", "mish", "hardswish", "hardsigmoid"), 1),
    **dict.fromkeys(("elu", "celu", "leaky_relu"), 2),
    **dict.fromkeys(("hardtanh", "threshold", "dropout", "dropout1d", "dropout2d", "dropout3d"), 3),
    **dict.fromkeys(("alpha_dropout", "feature_alpha_dropout"), 3),
    "rrelu": 4,
}


def name_inplace_flag(node: fx.Node) -> None:
    """Turn a positional `inplace` into a keyword, where `writes` looks for it."""
    name = function_name(node.target)
    at = _INPLACE.get(name)
    if node.op != "call_function" or at is None or getattr(F, name, None) is not node.target:
        return
    if len(node.args) > at:
        node.kwargs = {**node.kwargs, "inplace": node.args[at]}
        node.args = node.args[:at]


def writes(node: fx.Node) -> bool:
    """Whether the call may change one of its arguments in place."""
    if node.op == "call_module":
        return False
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.is_mutable
    if node.kwargs.get("inplace") or "out" in node.kwargs:
        return True
    if node.target in BATCH_NORM:
        signature = BATCH_NORM[node.target]
        return arguments(node, signature)["training"] is not False
    if node.target in (setattr, operator.setitem) or node.target is operator.delitem:
        return True
    name = str(node.target) if node.op == "call_method" else function_name(node.target)
    if name.startswith("i") and getattr(operator, name, None) is node.target:
        return name not in ("is_", "is_not", "index", "indexOf", "inv", "invert", "itemgetter")
    return (name.endswith("_") and not name.endswith("__")) or name in ("__setitem__", "set_")


def reads_shape_only(user: fx.Node, value: fx.Node) -> bool:
    """Whether `user` asks `value` for its shape alone, whatever its elements are."""
    if user.op == "call_method" and user.target == "view_as":
        return user.args[0] is not value
    if user.target is getattr:
        return user.args[1] in ("shape", "ndim", "dtype", "device")
    return user.op == "call_method" and user.target in ("size", "dim", "numel")
