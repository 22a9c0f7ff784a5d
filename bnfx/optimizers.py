"""Optimizers and BatchNorm: no weight decay on gamma and beta, and patching after insertion."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from bnfx.errors import BnfxError, InsertError

_NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


def param_groups(model: nn.Module, *, weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups for an optimizer: weight decay on weights alone.

    Gamma and beta of normalisations, biases, and every other parameter with at most one axis get
    none. Frozen parameters (requires_grad=False) are left out, and each parameter stands once.

    Args:
        model: The model to train.
        weight_decay: For the weights, at least 0.

    Returns:
        Up to two groups, {"params": [...], "weight_decay": ...}, empty ones left out.

    Raises:
        BnfxError: Negative weight decay, or no parameter to train.
    """
    if not weight_decay >= 0:
        raise BnfxError(f"weight_decay={weight_decay} is negative; give 0 or more")
    spared = {
        id(p) for m in model.modules() if isinstance(m, _NORMS) for p in m.parameters(recurse=False)
    }
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            bias = name.rpartition(".")[2] == "bias"
            decays = parameter.dim() > 1 and id(parameter) not in spared and not bias
            groups[decays].append(parameter)
    if not any(groups.values()):
        raise BnfxError(f"{type(model).__name__} has no parameter that requires a gradient")
    return [
        {"params": parameters, "weight_decay": weight_decay if decays else 0.0}
        for decays, parameters in groups.items()
        if parameters
    ]


def require_patchable(optimizer: torch.optim.Optimizer, source: nn.Module) -> None:
    """Raise InsertError unless `optimizer` trains parameters of `source`."""
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if not any(id(p) in held for p in source.parameters()):
        raise InsertError(
            f"the optimizer holds no parameter of this {type(source).__name__}; pass the optimizer "
            "that trains it, or leave optimizer out"
        )


def patch_optimizer(
    optimizer: torch.optim.Optimizer,
    source: nn.Module,
    inserted: nn.Module,
    norms: Mapping[str, str],
) -> None:
    """Make an optimizer of `source` one of `inserted`, in place.

    Parameters are exchanged for those of the same name, with their state; biases that are gone are
    taken out; gamma and beta come in new groups without weight decay, with all other options of the
    group that holds their layer. (Make learning-rate schedulers anew: they count groups.)

    Args:
        optimizer: An optimizer that trains parameters of `source`.
        source: The model before the insertion.
        inserted: The model after it.
        norms: Path of each inserted BatchNorm -> path of its layer.
    """
    new = dict(inserted.named_parameters(remove_duplicate=False))
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in source.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    homes = _homes(optimizer, names)
    added: dict[int, list[tuple[str, nn.Parameter]]] = {}
    for path, layer in norms.items():
        norm = inserted.get_submodule(path)
        home = next((g for name, g in homes.items() if _below(name, layer)), None)
        if home is not None:
            pairs = [(f"{path}.{name}", p) for name, p in norm.named_parameters()]
            added.setdefault(home, []).extend(pairs)
    for group in optimizer.param_groups:
        _exchange(optimizer, group, names, new)
    for home, pairs in added.items():
        _add_group(optimizer, optimizer.param_groups[home], pairs)


def _homes(
    optimizer: torch.optim.Optimizer, names: Mapping[nn.Parameter, Sequence[str]]
) -> dict[str, int]:
    """Index of the group that holds each parameter, by the parameter's names."""
    return {
        name: i
        for i, group in enumerate(optimizer.param_groups)
        for parameter in group["params"]
        for name in names.get(parameter, ())
    }


def _below(name: str, layer: str) -> bool:
    return name == layer or name.startswith(f"{layer}.")


def _exchange(
    optimizer: torch.optim.Optimizer,
    group: dict[str, Any],
    names: Mapping[nn.Parameter, Sequence[str]],
    new: Mapping[str, nn.Parameter],
) -> None:
    labels = group.get("param_names", [None] * len(group["params"]))
    kept: list[tuple[nn.Parameter, Any]] = []
    for old, label in zip(group["params"], labels, strict=True):
        theirs = names.get(old)
        if theirs is None:  # a parameter of something else
            kept.append((old, label))
            continue
        state = optimizer.state.pop(old, None)
        ours = next((new[name] for name in theirs if name in new), None)
        if ours is None:  # a bias that beta replaced
            continue
        kept.append((ours, label))
        if state is not None:
            optimizer.state[ours] = state
    group["params"] = [parameter for parameter, _ in kept]
    if "param_names" in group:
        group["param_names"] = [label for _, label in kept]


def _add_group(
    optimizer: torch.optim.Optimizer,
    like: dict[str, Any],
    pairs: Sequence[tuple[str, nn.Parameter]],
) -> None:
    options = {k: v for k, v in like.items() if k not in ("params", "param_names")}
    if "weight_decay" in options:
        options["weight_decay"] = 0.0
    named = "param_names" in like
    params: list[Any] = list(pairs) if named else [parameter for _, parameter in pairs]
    optimizer.add_param_group({**options, "params": params})
