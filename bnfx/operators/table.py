"""The one table of operators: what each one is, however it is spelled.

An operator is called as a function, a tensor method, an ATen overload or a torch.nn module. A row
names them all, and says how a gauge passes through (folding reads that), what it means to the rule
of insertion, and what capture has to know of it. A new operator is one row; a passage of a new kind
has a rule of its own in `bnfx.gauges.rules`.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum, auto
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.modules import batchnorm, instancenorm

from bnfx.operators.calls import (
    argument,
    arguments,
    base_name,
    call_name,
    function_name,
    signature_of,
)


class Passage(Enum):
    """How a per-channel affine map x' = a (x + d) passes through an operator.

    `a` is the scale, `d` the displacement. An operator without a passage lets nothing through.
    """

    AFFINE = auto()  # a map for each channel in, another out
    BATCH_NORM = auto()  # likewise, and it may vanish
    NORM = auto()  # layer and group norm: nothing in, anything out of its own affine map
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
    NEGATE = auto()
    MULTIPLY = auto()
    DIVIDE = auto()
    MATMUL = auto()  # with a parameter it is a layer; else linear in its second operand
    ATTENTION = auto()  # likewise in its third
    SOFTMAX = auto()  # lets nothing through; its rows sum to one
    EXTREMUM = auto()  # of two tensors: one scale, a > 0, one displacement
    CLAMP = auto()  # bounds per channel carry any map; only by choice (thresholds)


class Role(Enum):
    """What an operator means to the rule of insertion (Ioffe & Szegedy 2015, section 3.2)."""

    AFFINE = auto()
    NORM = auto()
    NONLINEARITY = auto()
    SQUASHING = auto()  # at the end of a network it belongs to the head: sigmoid, tanh, exp
    MOMENT = auto()  # a nonlinearity; where it is averaged, a part of a normalisation
    MOVE = auto()  # shape-only, dropout, pooling: statistics per channel keep their meaning
    ADD = auto()
    SCALE = auto()  # a product: with a constant, statistics per channel keep their meaning
    OTHER = auto()


@dataclass(frozen=True)
class Operator:
    """One row; several names are words of one string."""

    #: Functions, tensor methods and attributes, and ATen overloads, without in-place marks.
    names: str
    #: Classes of torch.nn whose forward is one call of such a function.
    modules: str = ""
    #: ONNX operators of the same meaning.
    onnx: str = ""
    passage: Passage | None = None
    role: Role = Role.OTHER
    #: Of `Role.MOVE`: whether the channels stay on their axis.
    keeps_channels: bool = False
    #: Whether its result never is a view.
    fresh: bool = True
    #: Whether it gives the same result each time, and does nothing else.
    pure: bool = True
    #: Of a convolution: how many spatial axes it has.
    spatial: int | None = None
    #: Of an affine layer: whether its weight is (in, out / groups, ...), not (out, in / ...).
    transposed: bool = False
    #: Of an affine layer: the positions of its input, weight and bias among the arguments.
    operands: tuple[int, ...] = ()

    @property
    def kind(self) -> str:
        """Its name in reports."""
        return self.names.partition(" ")[0]


_affine = partial(Operator, passage=Passage.AFFINE, role=Role.AFFINE, operands=(0, 1, 2))
_product = partial(Operator, transposed=True)
_norm = partial(Operator, role=Role.NORM)
_nonlinear = partial(Operator, role=Role.NONLINEARITY)
_moment = partial(Operator, role=Role.MOMENT)
_squash = partial(Operator, role=Role.SQUASHING)
_move = partial(Operator, passage=Passage.MOVE, role=Role.MOVE, fresh=False)
_join = partial(Operator, role=Role.MOVE)
_pool = partial(_join, keeps_channels=True)
_same = partial(_pool, passage=Passage.IDENTITY, fresh=False)
_drop = partial(_same, pure=False)
_sum = partial(Operator, role=Role.ADD)
_scale = partial(Operator, role=Role.SCALE)
_shape = partial(Operator, passage=Passage.SHAPE)
_effect = partial(Operator, pure=False)

TABLE: tuple[Operator, ...] = (
    # Affine layers, and products that are one where the second factor is a parameter.
    _affine("conv1d", "Conv1d", "Conv", spatial=1),
    _affine("conv2d", "Conv2d", "Conv", spatial=2),
    _affine("conv3d", "Conv3d", "Conv", spatial=3),
    _affine("conv_transpose1d", "ConvTranspose1d", "ConvTranspose", spatial=1, transposed=True),
    _affine("conv_transpose2d", "ConvTranspose2d", "ConvTranspose", spatial=2, transposed=True),
    _affine("conv_transpose3d", "ConvTranspose3d", "ConvTranspose", spatial=3, transposed=True),
    _affine("linear", "Linear", "Gemm"),
    _product("addmm", "", "Gemm", Passage.MATMUL, operands=(1, 2, 0)),
    Operator("einsum", "", "Einsum", Passage.MATMUL, fresh=False),
    _product("matmul mm bmm imatmul", "", "MatMul", Passage.MATMUL, operands=(0, 1)),
    # Normalisations, and the statistics that one written by hand is made of. With running
    # statistics in eval mode, instance normalisation is batch normalisation.
    _norm(
        "batch_norm native_batch_norm cudnn_batch_norm miopen_batch_norm _native_batch_norm_legit "
        "_native_batch_norm_legit_no_training _native_batch_norm_legit_functional "
        "_batch_norm_with_update _batch_norm_no_update",
        "_BatchNorm",
        "BatchNormalization",
        Passage.BATCH_NORM,
    ),
    _norm("instance_norm", "_InstanceNorm", "InstanceNormalization", Passage.BATCH_NORM),
    _norm("layer_norm native_layer_norm", "LayerNorm", "LayerNormalization", Passage.NORM),
    _norm("group_norm native_group_norm", "GroupNorm", "GroupNormalization", Passage.NORM),
    _norm("rms_norm _fused_rms_norm", "RMSNorm", "RMSNormalization"),
    _norm("local_response_norm", "LocalResponseNorm CrossMapLRN2d", "LRN"),
    _norm("normalize", "", "LpNormalization"),
    _norm("var std var_mean std_mean"),
    _norm(
        "norm frobenius_norm vector_norm linalg_norm linalg_vector_norm", "", "ReduceL1 ReduceL2"
    ),
    # Nonlinearities.
    _nonlinear("relu", "ReLU", "Relu", Passage.RECTIFIER),
    _nonlinear("leaky_relu", "LeakyReLU", "LeakyRelu", Passage.RECTIFIER),
    _nonlinear("prelu _prelu_kernel", "PReLU", "PRelu", Passage.RECTIFIER),
    _nonlinear("relu6", "ReLU6", "", Passage.CLAMP),
    _nonlinear("clamp_min clamp_max", "", "", Passage.CLAMP),
    _squash("hardtanh", "Hardtanh", "", Passage.CLAMP),
    _squash("clamp clip", "", "Clip", Passage.CLAMP),
    _nonlinear("maximum", "", "Max", Passage.EXTREMUM),
    _nonlinear("minimum", "", "Min", Passage.EXTREMUM),
    _nonlinear("rrelu rrelu_with_noise", "RReLU", pure=False),
    _nonlinear("threshold _threshold", "Threshold", "ThresholdedRelu"),
    _nonlinear("elu", "ELU", "Elu"),
    _nonlinear("selu", "SELU", "Selu"),
    _nonlinear("celu", "CELU", "Celu"),
    _nonlinear("gelu", "GELU", "Gelu"),
    _nonlinear("silu", "SiLU", "Swish"),
    _nonlinear("mish", "Mish", "Mish"),
    _nonlinear("hardswish", "Hardswish", "HardSwish"),
    _nonlinear("softshrink", "Softshrink", "Shrink"),
    _nonlinear("hardshrink", "Hardshrink", "Shrink"),
    _nonlinear("tanhshrink", "Tanhshrink"),
    _nonlinear("glu", "GLU"),
    _nonlinear("sin", "", "Sin"),
    _nonlinear("cos", "", "Cos"),
    _moment("abs absolute", "", "Abs"),
    _moment("square"),
    _moment("pow ipow", "", "Pow"),
    _squash("sigmoid expit", "Sigmoid", "Sigmoid"),
    _squash("logsigmoid log_sigmoid", "LogSigmoid"),
    _squash("tanh", "Tanh", "Tanh"),
    _squash("hardsigmoid", "Hardsigmoid", "HardSigmoid"),
    _squash("softsign", "Softsign", "Softsign"),
    _squash("softplus", "Softplus", "Softplus"),
    _squash("erf", "", "Erf"),
    _squash("exp", "", "Exp"),
    Operator("softmax _softmax", "Softmax Softmax2d", "Softmax", Passage.SOFTMAX),
    Operator("log_softmax _log_softmax", "LogSoftmax", "LogSoftmax"),
    Operator("log", "", "Log"),
    Operator("sqrt", "", "Sqrt"),
    Operator("rsqrt"),
    Operator("reciprocal", "", "Reciprocal"),
    # Sums and products. A sum whose operand is subtracted from has the row of a sum.
    _sum("add iadd", "", "Add Sum", Passage.ADD),
    _sum("sub subtract isub", "", "Sub", Passage.SUBTRACT),
    _sum("rsub", "", "", Passage.SUBTRACT),
    _scale("mul multiply imul", "", "Mul", Passage.MULTIPLY),
    _scale("div divide truediv itruediv true_divide", "", "Div", Passage.DIVIDE),
    _scale("neg negative", "", "Neg", Passage.NEGATE),
    Operator(
        "scaled_dot_product_attention _scaled_dot_product_flash_attention_for_cpu",
        "",
        "Attention",
        Passage.ATTENTION,
        pure=False,
    ),  # it may drop
    # Pooling and what else works over space.
    _pool(
        "max_pool1d max_pool2d max_pool3d max_pool1d_with_indices max_pool2d_with_indices "
        "max_pool3d_with_indices",
        "MaxPool1d MaxPool2d MaxPool3d",
        "MaxPool",
        Passage.MAX_POOL,
    ),
    _pool(
        "adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d "
        "adaptive_max_pool1d_with_indices adaptive_max_pool2d_with_indices "
        "adaptive_max_pool3d_with_indices",
        "AdaptiveMaxPool1d AdaptiveMaxPool2d AdaptiveMaxPool3d",
        "GlobalMaxPool",
        Passage.MAX_POOL,
    ),
    _pool(
        "avg_pool1d avg_pool2d avg_pool3d",
        "AvgPool1d AvgPool2d AvgPool3d",
        "AveragePool",
        Passage.AVERAGE_POOL,
    ),
    _pool(
        "adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d _adaptive_avg_pool2d "
        "_adaptive_avg_pool3d",
        "AdaptiveAvgPool1d AdaptiveAvgPool2d AdaptiveAvgPool3d",
        "GlobalAveragePool",
        Passage.AVERAGE_POOL,
    ),
    _pool("lp_pool1d lp_pool2d lp_pool3d", "LPPool1d LPPool2d LPPool3d", "LpPool GlobalLpPool"),
    _pool(
        "fractional_max_pool2d fractional_max_pool3d fractional_max_pool2d_with_indices "
        "fractional_max_pool3d_with_indices",
        "FractionalMaxPool2d FractionalMaxPool3d",
        pure=False,
    ),
    _pool(
        "interpolate upsample upsample_nearest1d upsample_nearest2d upsample_nearest3d "
        "_upsample_nearest_exact1d _upsample_nearest_exact2d _upsample_nearest_exact3d "
        "upsample_linear1d upsample_bilinear2d upsample_trilinear3d upsample_bicubic2d "
        "upsample_bilinear upsample_nearest _upsample_bilinear2d_aa _upsample_bicubic2d_aa",
        "Upsample",
        "Resize Upsample",
        Passage.INTERPOLATE,
        fresh=False,
    ),
    _join("mean nanmean", "", "ReduceMean", Passage.MEAN),
    _join("sum nansum", "", "ReduceSum", Passage.SUM),
    _join(
        "pad constant_pad_nd _pad_circular _pad_enum reflection_pad1d reflection_pad2d "
        "reflection_pad3d replication_pad1d replication_pad2d replication_pad3d",
        "ZeroPad1d ZeroPad2d ZeroPad3d ConstantPad1d ConstantPad2d ConstantPad3d "
        "ReflectionPad1d ReflectionPad2d ReflectionPad3d ReplicationPad1d ReplicationPad2d "
        "ReplicationPad3d CircularPad1d CircularPad2d CircularPad3d",
        "Pad",
        Passage.PAD,
        fresh=False,
    ),
    # Data movement.
    _move(
        "view reshape flatten unflatten squeeze unsqueeze view_as reshape_as ravel _unsafe_view",
        "Flatten Unflatten",
        "Reshape Flatten Squeeze Unsqueeze",
    ),
    _move(
        "permute transpose t movedim moveaxis swapaxes swapdims adjoint numpy_T T mT H mH",
        "",
        "Transpose",
    ),
    _move(
        "chunk split split_with_sizes tensor_split hsplit vsplit dsplit unbind unsafe_chunk "
        "unsafe_split unsafe_split_with_sizes",
        "",
        "Split",
    ),
    _move("getitem narrow narrow_copy select slice", "", "Slice"),
    _move("index _unsafe_index index_select", "", "Gather"),
    _join("slice_scatter select_scatter copy", "", "", Passage.MOVE),
    _move("expand expand_as broadcast_to", "", "Expand"),
    _move("repeat tile", "", "Tile"),
    _move("roll flip fliplr flipud rot90"),
    _move("pixel_shuffle", "PixelShuffle", "DepthToSpace"),
    _move("pixel_unshuffle", "PixelUnshuffle", "SpaceToDepth"),
    _move("channel_shuffle native_channel_shuffle", "ChannelShuffle"),
    _move("unfold im2col", "Unfold"),
    _join("fold col2im", "Fold", "Col2Im"),
    _join("masked_fill"),
    _join("cat concat concatenate", "", "Concat", Passage.CONCAT),
    _join("stack", "", "", Passage.STACK),
    # The same elements.
    _same(
        "clone contiguous detach alias positive pos lift_fresh lift_fresh_copy",
        "Identity",
        "Identity",
    ),
    _same(
        "to type type_as float half double bfloat16 bool byte char short int long cfloat "
        "cdouble _to_copy",
        "",
        "Cast CastLike",
    ),
    _drop("dropout native_dropout", "Dropout", "Dropout"),
    _drop("dropout1d dropout2d dropout3d feature_dropout", "Dropout1d Dropout2d Dropout3d"),
    _drop("alpha_dropout feature_alpha_dropout", "AlphaDropout FeatureAlphaDropout"),
    # What depends on shapes alone.
    _shape("size dim numel stride ndimension sym_size sym_numel sym_stride", "", "Shape Size"),
    _shape("shape ndim dtype device is_floating_point"),
    _shape("zeros_like ones_like full_like new_zeros new_ones new_full", "", "ConstantOfShape"),
    _shape("rand_like randn_like randint_like empty_like new_empty", pure=False),
    _shape("_assert_tensor_metadata", pure=False),
    # What gives another result each time, or has an effect.
    _effect("rand randn randint randperm bernoulli multinomial normal poisson empty"),
    _effect("_assert _assert_async _assert_scalar _check setattr"),
    _effect("sym_constrain_range sym_constrain_range_for_size"),
)

#: Where functions come from that are what their names say; a user's may be called `add` too.
_NAMESPACES: tuple[Any, ...] = (
    torch,
    F,
    operator,
    torch._C._nn,
    torch.special,
    torch.linalg,
    torch.Tensor,
)
#: Of any rank, transposed or not.
_CONVOLUTIONS = (
    torch.convolution,
    torch._convolution,
    torch.ops.aten.convolution.default,
    torch.ops.aten._convolution.default,
)
#: What an affine layer reads, in the order of `Operator.operands`.
PARTS = ("input", "weight", "bias")
#: Python's own, which mean something else.
_FOREIGN = (operator.concat, operator.index)

_BY_NAME = {name: row for row in TABLE for name in row.names.split()}
_BY_CLASS: dict[type[nn.Module], Operator] = {
    getattr(nn, name, None) or getattr(batchnorm, name, None) or getattr(instancenorm, name): row
    for row in TABLE
    for name in row.modules.split()
}
_BY_FUNCTION = {
    function: row
    for name, row in _BY_NAME.items()
    for space in _NAMESPACES
    for spelling in (name, f"{name}_")
    if callable(function := vars(space).get(spelling)) and function not in _FOREIGN
}

#: Modules that are traced through: their forward is one call of a function of the table.
TRANSPARENT_MODULES = frozenset(_BY_CLASS) - {
    nn.CrossMapLRN2d,
    batchnorm._BatchNorm,
    instancenorm._InstanceNorm,
}


def operator_of(node: fx.Node, modules: Mapping[str, nn.Module] | None = None) -> Operator | None:
    """The row of a call, of a function or of one of `modules`; None where it has none."""
    if node.op == "call_module":
        module = (modules or {}).get(str(node.target))
        return None if module is None else operator_of_module(module)
    if node.op == "call_method":
        row = _BY_NAME.get(base_name(str(node.target)))
    elif node.op != "call_function":
        return None
    elif node.target is getattr:
        return _BY_NAME.get(str(node.args[1]))
    elif node.target in _CONVOLUTIONS:
        return _convolution_of(node)
    else:
        row = _row_of_function(node.target)
    if row is _HARDTANH and _bounds(node) == (0, 6):
        return _RELU6  # it is written so by nn.ReLU6 and by ATen
    return row


def _row_of_function(function: Any) -> Operator | None:
    if isinstance(function, torch._ops.OpOverload):
        known = function.namespace == "aten"
        return _BY_NAME.get(base_name(function_name(function))) if known else None
    return _BY_FUNCTION.get(function)


def layer_call(node: fx.Node) -> dict[str, Any]:
    """The arguments of an affine layer or product, by the names that a convolution gives them."""
    row, call = operator_of(node), arguments(node)
    assert row is not None
    names = signature_of(node.target)
    parts = zip(PARTS, row.operands, strict=False)
    return call | {part: call.get(names[position]) for part, position in parts}


def _convolution_of(node: fx.Node) -> Operator | None:
    """The row of a convolution of any rank, whose arguments tell which one it is."""
    call = arguments(node)
    sizes = [call[name] for name in ("stride", "padding", "dilation")]
    spatial = max((len(size) for size in sizes if isinstance(size, tuple | list)), default=0)
    return _BY_NAME.get(f"conv{'_transpose' if call['transposed'] else ''}{spatial}d")


def operator_of_module(module: nn.Module) -> Operator | None:
    """The row of a module's class, or of the nearest class above it that has one."""
    return next((row for kind in type(module).__mro__ if (row := _BY_CLASS.get(kind))), None)


def is_layer_function(function: Callable[..., Any]) -> bool:
    """Whether a function is an affine layer or a norm over the batch."""
    row = _row_of_function(function)
    return row is _BATCH_NORM or (row is not None and row.role is Role.AFFINE)


def is_batch_norm_function(function: Callable[..., Any]) -> bool:
    """Whether a function normalises over the batch, in eval mode or not."""
    return _row_of_function(function) is _BATCH_NORM


def affine_of(node: fx.Node, modules: Mapping[str, nn.Module] | None = None) -> Operator | None:
    """The row of an affine layer, called as a function or as one of `modules`; None for others."""
    if node.op == "call_module":
        module = (modules or {}).get(str(node.target))
        return None if module is None else affine_module(module)
    row = operator_of(node)
    return row if row is not None and row.role is Role.AFFINE else None


def affine_module(module: nn.Module) -> Operator | None:
    """The row of an affine module. A subclass with a forward of its own is something else."""
    return affine_class(type(module))


def affine_class(kind: type[nn.Module]) -> Operator | None:
    """The row of a class of affine modules, likewise."""
    known: Any = next((base for base in kind.__mro__ if base in _BY_CLASS), None)
    row = None if known is None else _BY_CLASS[known]
    if row is None or row.role is not Role.AFFINE:
        return None
    return row if kind.forward is known.forward else None


def product_of(node: fx.Node) -> Operator | None:
    """The row of a matrix product; it is an affine layer if its weight is a parameter of rank 2."""
    row = operator_of(node)
    return row if row is not None and row.operands and row.role is not Role.AFFINE else None


def passage_of(node: fx.Node) -> Passage | None:
    """How a gauge passes through the call of a function; None where nothing is known."""
    row = operator_of(node)
    return None if row is None else row.passage


def role_of(node: fx.Node, modules: Mapping[str, nn.Module]) -> Role:
    """What the operator of `node` means to the rule of insertion."""
    row = operator_of(node, modules)
    if row is None or (row.role is Role.AFFINE and affine_of(node, modules) is None):
        return Role.OTHER
    return row.role


def is_batch_norm(node: fx.Node) -> bool:
    """Whether the call is of a function that normalises over the batch, in eval mode or not."""
    return node.op == "call_function" and operator_of(node) is _BATCH_NORM


def is_instance_norm(node: fx.Node) -> bool:
    """Whether the call is of instance normalisation."""
    return node.op == "call_function" and operator_of(node) is _INSTANCE_NORM


def reads_elements(user: fx.Node, value: fx.Node) -> bool:
    """Whether `user` depends on the elements of `value`, not on its shape alone."""
    if call_name(user).endswith("_as") and len(user.all_input_nodes) > 1:  # view_as, type_as
        return argument(user, 0, "input") is value
    return passage_of(user) is not Passage.SHAPE


def _bounds(node: fx.Node) -> tuple[Any, Any]:
    return argument(node, 1, "min_val", -1.0), argument(node, 2, "max_val", 1.0)


_BATCH_NORM, _INSTANCE_NORM = _BY_NAME["batch_norm"], _BY_NAME["instance_norm"]
_HARDTANH, _RELU6 = _BY_NAME["hardtanh"], _BY_NAME["relu6"]
