"""Weights that are computed from other parameters, computed once.

In eval mode what `torch.nn.utils.parametrize`, `weight_norm`, `spectral_norm` and `prune` make of
their parameters is always the same. On a private copy of a model it becomes the parameter that it
stands for, so that capture sees the plain layer (`bake_modules`). What a forward itself computes
for a layer, `F.conv2d(x, self.weight * self.mask)`, becomes one in the graph (`bake_weights`).
"""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize, prune
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from bnfx.graphs.constants import Values
from bnfx.graphs.examples import in_float64
from bnfx.graphs.naming import path_of
from bnfx.graphs.parameters import attribute, constants, free_name, set_tensor, sweep
from bnfx.operators.table import (
    TRANSPARENT_MODULES,
    Passage,
    affine_of,
    layer_call,
    passage_of,
    product_of,
)

#: The hooks of torch.nn.utils that compute a weight before the forward, and where they name it.
_COMPUTING: dict[type, str] = {
    WeightNorm: "name",
    SpectralNorm: "name",
    prune.BasePruningMethod: "_tensor_name",
}


def bake_modules(copied: nn.Module) -> nn.Module:
    """`copied`, in which computed weights are parameters; its tensors may be those of a source."""
    for module in list(copied.modules()):
        if isinstance(module, nn.RNNBase):  # it keeps its weights in a list of its own, too
            continue
        if parametrize.is_parametrized(module):
            _bake_parametrized(module)
        if module._forward_pre_hooks and type(module) in TRANSPARENT_MODULES:
            _bake_hooked(module)
    return copied


def _bake_parametrized(module: nn.Module) -> None:
    lists = dict(module.get_submodule("parametrizations").named_children())
    if any(part.training for computing in lists.values() for part in computing.modules()):
        return
    made = {name: _value(computing) for name, computing in lists.items()}
    if any(value is None for value in made.values()):
        return
    # not parametrize.remove_parametrizations: the source has the same class, which that would edit
    module.__class__ = type(module).__mro__[1]
    del module._modules["parametrizations"]
    for name, value in made.items():
        assert value is not None
        buffer = not any(True for _ in lists[name].parameters())
        set_tensor(module, name, value, trained=_trained(lists[name]), buffer=buffer)


def _value(computing: nn.Module) -> Tensor | None:
    """What a parametrization always gives; None where it draws, remembers or fails."""
    mine = copy.deepcopy(computing)  # it may write
    before = torch.get_rng_state()
    try:
        with torch.no_grad():
            first, again = mine(), mine()
    except Exception:  # noqa: BLE001  # it is a user's, and raises anything
        return None
    drawn = not torch.equal(before, torch.get_rng_state())
    torch.set_rng_state(before)
    kept = zip(mine.state_dict().values(), computing.state_dict().values(), strict=True)
    if drawn or not isinstance(first, Tensor) or not isinstance(again, Tensor):
        return None
    fits = _same(first, again) and all(_same(a, b) for a, b in kept)
    return first.detach().clone() if fits else None


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal; on meta there are no values."""
    return a.is_meta or torch.equal(a, b)


def _trained(module: nn.Module) -> bool:
    return any(p.requires_grad for p in module.parameters())


def _bake_hooked(module: nn.Module) -> None:
    hooks = list(module._forward_pre_hooks.values())
    names = [_computed_by(hook) for hook in hooks]
    if module.training or module._forward_hooks or not all(names):
        return
    trained = _trained(module)
    with torch.no_grad():
        for hook in hooks:
            hook(module, None)
    for name in dict.fromkeys(names):
        value = getattr(module, name).detach().clone()
        set_tensor(module, name, value, trained=trained)
    module._forward_pre_hooks.clear()


def _computed_by(hook: object) -> str:
    """The name of the parameter that a hook computes; "" for the hook of a user."""
    leaf = next((leaf for kind, leaf in _COMPUTING.items() if isinstance(hook, kind)), None)
    return "" if leaf is None else str(getattr(hook, leaf))


def computes(module: nn.Module, leaf: str) -> bool:
    """Whether a module computes its tensor `leaf` from other parameters, by torch.nn.utils."""
    return parametrize.is_parametrized(module, leaf) or leaf in map(
        _computed_by, module._forward_pre_hooks.values()
    )


def has_own_hooks(module: nn.Module) -> bool:
    """Whether code of the user runs around its forward: other than what computes a weight."""
    return bool(module._forward_hooks) or not all(
        map(_computed_by, module._forward_pre_hooks.values())
    )


def put(module: nn.Module, leaf: str, value: Tensor) -> None:
    """Let a tensor that `module` computes become `value`, as far as it can be that.

    Raises:
        Exception: Anything that a parametrization raises which cannot be inverted.
    """
    with torch.no_grad():
        if parametrize.is_parametrized(module, leaf):
            setattr(module, leaf, value)
            return
        for hook in module._forward_pre_hooks.values():
            if _computed_by(hook) != leaf:
                continue
            if isinstance(hook, WeightNorm):
                dim = -1 if hook.dim is None else hook.dim
                module.get_parameter(f"{leaf}_g").data = torch.norm_except_dim(value, 2, dim)
                module.get_parameter(f"{leaf}_v").data = value
            elif isinstance(hook, prune.BasePruningMethod):
                module.get_parameter(f"{leaf}_orig").data = value
            hook(module, None)


def why_not_put(module: nn.Module, leaf: str, value: Tensor) -> str:
    """Why a tensor that `module` computes cannot become `value`, in float64; "" if it can."""
    mine = in_float64(module)
    try:
        put(mine, leaf, value.double())
        fits = torch.allclose(getattr(mine, leaf), value.double(), rtol=1e-10, atol=0)
    except Exception:  # noqa: BLE001  # it is a user's, and raises anything
        fits = False
    if fits:
        return ""
    if parametrize.is_parametrized(module, leaf):
        remove = f"torch.nn.utils.parametrize.remove_parametrizations(layer, {leaf!r})"
    elif f"{leaf}_orig" in module._parameters and f"{leaf}_mask" in module._buffers:
        remove = f"torch.nn.utils.prune.remove(layer, {leaf!r})"
    else:
        remove = f"torch.nn.utils.remove_spectral_norm(layer, {leaf!r})"
    return f"its {leaf} is computed, and cannot become every value; call {remove} first"


def bake_weights(captured: fx.GraphModule) -> None:
    """Make what layers read, and what is computed from parameters alone, a parameter."""
    graph = captured.graph
    values = Values(graph, constants(captured))
    for layer in list(graph.nodes):
        for part, node in _computed(layer, values):
            value, sources = values.of(node), values.sources(node)
            assert value is not None
            tensors = [attribute(captured, name) for name in sources]
            trained = any(isinstance(t, Tensor) and t.requires_grad for t in tensors)
            with graph.inserting_before(node):
                baked = graph.create_node("get_attr", "", name=f"{layer.name}_{part}")
            node.replace_all_uses_with(baked)
            sweep([node])
            path = path_of(layer)
            wanted = f"{path}_{part}" if path == layer.name else f"{path}.{part}"
            baked.target = name = _name(captured, wanted, sources)
            set_tensor(captured, name, value.detach().clone(), trained=trained)


def _computed(layer: fx.Node, values: Values) -> list[tuple[str, fx.Node]]:
    """The parts of an affine layer or product that are constant and not just parameters, moved."""
    if affine_of(layer) is not None:
        call = layer_call(layer)
        parts = [(name, call[name]) for name in ("weight", "bias")]
    elif product_of(layer) is not None and not values.is_constant(layer):
        parts = [("weight", node) for node in layer.all_input_nodes]
    else:
        return []
    return [
        (name, node)
        for name, node in parts
        if isinstance(node, fx.Node) and values.sources(node) and _is_computed(node)
        if _is_settled(node, values)
    ]


def _is_computed(node: fx.Node) -> bool:
    if node.op == "get_attr":
        return False
    if passage_of(node) not in (Passage.MOVE, Passage.IDENTITY):
        return True
    return any(_is_computed(n) for n in node.all_input_nodes)


def _is_settled(node: fx.Node, values: Values) -> bool:
    """Whether nothing in it has the dtype of an input, which no parameter could have."""
    return values.is_constant(node) and all(_is_settled(n, values) for n in node.all_input_nodes)


def _name(module: fx.GraphModule, wanted: str, sources: Iterable[str]) -> str:
    """`wanted`, also where that was a source that nothing reads any more; or a free name."""
    read = {str(node.target) for node in module.graph.find_nodes(op="get_attr")}
    whole = (f"{node.target}." for node in module.graph.find_nodes(op="call_module"))
    unread = wanted not in read and not any(map(wanted.startswith, whole))
    return wanted if wanted in sources and unread else free_name(module, wanted)
