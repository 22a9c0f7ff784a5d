"""The table of roles: what an operator means to the rule of insertion."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from enum import Enum, auto

import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from bnfx.operators.calls import function_name, words
from bnfx.operators.layers import AFFINE, affine_of


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
