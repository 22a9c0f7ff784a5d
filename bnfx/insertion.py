"""`insert_bn` and its dry run. The model given stays bit-identical; a new one is returned."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn

from bnfx.capture import Example, clone, example
from bnfx.errors import InsertError
from bnfx.module_graph import module_graph
from bnfx.passes import InsertBatchNorm, InsertFilter
from bnfx.reports import InsertReport, remember, report


def insert_bn(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    example_kwargs: Mapping[str, Any] | None = None,
    init: Literal["fresh", "identity", "calibrate"] = "fresh",
    calibration_data: Iterable[Any] | None = None,
    placement: Literal["pre_activation", "post_activation"] = "pre_activation",
    include: InsertFilter = None,
    exclude: InsertFilter = None,
    optimizer: torch.optim.Optimizer | None = None,
) -> fx.GraphModule:
    """A copy of `model` with a BatchNorm behind every affine layer that feeds a nonlinearity.

    The rule is that of Ioffe & Szegedy 2015 (arXiv 1502.03167), section 3.2. A layer `<layer>` gets
    a sibling `<layer>_bn`, a plain `nn.BatchNorm1d/2d/3d`; its bias becomes beta. All other
    parameters and buffers keep their `state_dict` keys. For linear layers on (N, ..., C) the
    leading axes are flattened around a BatchNorm1d, so that statistics are per feature.

    Args:
        model: Any module whose forward can be traced symbolically; any device, any floating dtype.
        example_inputs: Tuple of positional arguments, or a lone tensor. Optional arguments of the
            forward that are not given keep their default and are no arguments of the result.
        example_kwargs: Keyword arguments that go with them.
        init: "fresh": gamma 1, beta the layer's old bias, mean 0, var 1; to train from scratch.
            "identity": gamma sqrt(1 + eps), so that outputs in eval mode stay as they were.
        calibration_data: For init="calibrate", which is not built yet.
        placement: "pre_activation", as in the paper; the other is not built yet.
        include: Glob or globs over module paths, or a predicate on the `InsertRecord`: the layers
            to consider.
        exclude: Likewise, the layers to leave alone.
        optimizer: Patching an existing optimizer is not built yet.

    Returns:
        A `torch.fx.GraphModule` in the mode of `model`; `bnfx.report(result)` tells what was done.

    Raises:
        CaptureError: The forward cannot be traced symbolically.
        InsertError: The model has no affine layer; an option that is not built yet; eval outputs
            moved with init="identity".
    """
    _refuse_unbuilt(init, calibration_data, placement, optimizer)
    given = example(example_inputs, example_kwargs)
    captured = module_graph(model, given)
    insertion = InsertBatchNorm("identity" if init == "identity" else "fresh", include, exclude)
    found = insertion.match(captured)
    if not found:
        raise InsertError(
            f"{type(model).__name__} has no affine layer (linear, convolution or transposed "
            "convolution), so there is nothing to normalise"
        )
    inserted, done = insertion.rewrite(captured, found)
    if init == "identity" and given is not None:
        _check_identity(model, inserted, given)
    return remember(inserted, done)


def plan_insert(model: nn.Module, example_inputs: Any = None, **options: Any) -> InsertReport:
    """What `insert_bn` would do with the same arguments; nothing is changed."""
    done = report(insert_bn(model, example_inputs, **options))
    assert isinstance(done, InsertReport)
    return done


def _refuse_unbuilt(init: str, data: object, placement: str, optimizer: object) -> None:
    choices = {"init": (init, ("fresh", "identity")), "placement": (placement, ("pre_activation",))}
    for name, (value, built) in choices.items():
        if value not in built:
            raise InsertError(f"{name}={value!r} is not available; choose from {', '.join(built)}")
    for name, given in (("calibration_data", data), ("optimizer", optimizer)):
        if given is not None:
            raise InsertError(f"{name} is not available in this version; leave it out")


def _check_identity(model: nn.Module, inserted: fx.GraphModule, given: Example) -> None:
    """Raise if the eval outputs of a copy moved by more than rounding."""
    before, after = (clone(m).eval() for m in (model, inserted))
    with torch.no_grad():
        truth = before(*given.args, **given.kwargs)
        ours = after(*given.args, **given.kwargs)
    for a, b in zip(_tensors(truth), _tensors(ours), strict=True):
        limit = 1e3 * torch.finfo(a.dtype).eps * float(a.abs().max())
        moved = float((a - b).abs().max())
        if not moved <= limit:
            raise InsertError(
                f"inserting identities into {type(model).__name__} moved an output by {moved:.3g}; "
                "this must not happen: please report the model"
            )


def _tensors(outputs: Any) -> list[Tensor]:
    leaves = torch.utils._pytree.tree_leaves(outputs)
    return [x for x in leaves if isinstance(x, Tensor) and x.is_floating_point() and x.numel()]
