"""`insert_bn` and its dry run. The model given stays bit-identical; a new one is returned."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bnfx.editing.affine_calls import Evidence
from bnfx.editing.draft import Draft
from bnfx.editing.driver import run
from bnfx.editing.preservation import require_reached, require_same_outputs
from bnfx.errors import CaptureError, InsertError
from bnfx.graphs.examples import Example, example, modes_kept, obstacle
from bnfx.graphs.origins import Origin
from bnfx.graphs.parameters import attribute
from bnfx.optimizers import patch_optimizer, require_patchable
from bnfx.passes import InsertBatchNorm, InsertFilter, InsertForm, InsertPlacement
from bnfx.reports.report import Change, InsertRecord, InsertReport, remember
from bnfx.statistics.calibration import calibrate

Init = Literal["fresh", "identity", "calibrate"]


@torch.inference_mode(mode=False)  # what it returns is trained
def insert_bn(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    example_kwargs: Mapping[str, Any] | None = None,
    init: Init = "fresh",
    calibration_data: Iterable[Any] | None = None,
    placement: InsertPlacement = "pre_activation",
    include: InsertFilter = None,
    exclude: InsertFilter = None,
    optimizer: torch.optim.Optimizer | None = None,
    form: InsertForm = "module",
) -> nn.Module:
    """A copy of `model` with a BatchNorm behind every affine layer that feeds a nonlinearity.

    The rule is that of Ioffe & Szegedy 2015 (arXiv 1502.03167), section 3.2. The BatchNorm of
    `<layer>` is a plain `nn.BatchNorm1d/2d/3d` inside of it, `<layer>.bn`, or a sibling,
    `<layer>_bn`; its bias becomes beta. All other parameters and buffers keep their
    `state_dict` keys, and the result loads checkpoints of the model from before (the BatchNorms are
    identities then). For linear layers on (N, ..., C) the leading axes are flattened around a
    BatchNorm1d, so that statistics are per feature. Frozen layers stay frozen, and so do gamma and
    beta behind them.

    Args:
        model: Any module; any device, any floating dtype.
        example_inputs: Tuple of positional arguments, or a lone tensor. Without them only what can
            be traced symbolically is seen; with them the model is run on them once in eval mode
            and once in train mode, and what it did then decides. Optional arguments of the forward
            that are not given keep their default, and are no arguments of the result where the
            whole forward could be traced.
        example_kwargs: Keyword arguments that go with them.
        init: "fresh": gamma 1, beta the layer's old bias, mean 0, var 1; to train from scratch.
            "identity": gamma sqrt(1 + eps), so that outputs in eval mode stay as they were.
            "calibrate": mean and variance of `calibration_data`, gamma sqrt(var + eps), beta
            mean + bias. Outputs in eval mode stay, and in train mode the network starts close to
            what it was; the noise of the batch statistics is new there.
        calibration_data: Iterable of batches (tensors, tuples with the inputs first, dicts), read
            once; some hundred samples suffice.
        placement: "pre_activation", as in the paper, or "post_activation".
        include: Glob or globs over module paths, or a predicate on the `InsertRecord`: the layers
            to consider.
        exclude: Likewise, the layers to leave alone.
        optimizer: An optimizer of `model`, which becomes one of the result: parameters are
            exchanged with their state kept, dead biases taken out, gamma and beta added without
            weight decay.
        form: "module": the result, and everything in it, keeps its class, its methods, attributes
            and optional arguments; a layer runs its own forward and then the BatchNorm that it
            holds. Where a layer is called several times, the forward around it gets new code, with
            a BatchNorm for each call, if it takes no optional arguments. "graph": one graph.

    Returns:
        A module of the class of `model`, or with form="graph" a `torch.fx.GraphModule`, in the mode
        of `model`. `bnfx.report(result)` tells what was done.

    Raises:
        CaptureError: The model cannot be copied, does not run on the example, or with form="graph"
            cannot be traced as a whole.
        CalibrationError: The calibration data is empty, too short, not finite or does not fit.
        InsertError: No affine layer; unbatched example inputs; contradictory arguments; eval
            outputs moved with init="identity" or "calibrate".
    """
    _require_options(init, calibration_data, placement, form)
    _require_model(model)
    if optimizer is not None:
        require_patchable(optimizer, model)
    given = example(example_inputs, example_kwargs)
    kind: Literal["fresh", "identity"] = "fresh" if init == "fresh" else "identity"
    draft = Draft(model, given)
    if form == "graph":
        _require_whole(draft)
    must_run = insert_into(draft, InsertBatchNorm(kind, placement, include, exclude, form))
    first = given
    if calibration_data is not None and draft.origins:
        first = _calibrate(draft, calibration_data)
    if first is not None and draft.origins:
        if init == "fresh":
            require_reached(draft.root, must_run, first, draft.twins)
        else:
            biases = {norm: _bias(model, origin) for norm, origin in draft.origins.items()}
            require_same_outputs(
                model, draft.root, biases, first, reached=must_run, twins=draft.twins
            )
    if optimizer is not None:
        norms = {norm: origin.layer for norm, origin in draft.origins.items()}
        patch_optimizer(optimizer, model, draft.root, norms)
    return remember(draft.root, insert_report(draft.changes))


def plan_insert(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    example_kwargs: Mapping[str, Any] | None = None,
    init: Init = "fresh",
    calibration_data: Iterable[Any] | None = None,
    placement: InsertPlacement = "pre_activation",
    include: InsertFilter = None,
    exclude: InsertFilter = None,
    optimizer: torch.optim.Optimizer | None = None,
    form: InsertForm = "module",
) -> InsertReport:
    """What `insert_bn` would do with the same arguments; nothing is changed, no data is read."""
    _require_options(init, calibration_data, placement, form)
    _require_model(model)
    if optimizer is not None:
        require_patchable(optimizer, model)
    draft = Draft(model, example(example_inputs, example_kwargs))
    if form == "graph":
        _require_whole(draft)
    insert_into(draft, InsertBatchNorm("identity", placement, include, exclude, form))
    return insert_report(draft.changes)


def insert_into(draft: Draft, insertion: InsertBatchNorm) -> list[str]:
    """Insert into a draft. The BatchNorms that its example must reach in eval mode."""
    seen = Evidence(draft.seen).calls if draft.seen is not None else ()
    called = {call.path for call in seen}
    run(draft, insertion)
    mine = (change for change in draft.changes if change.by == insertion.name)
    return [norm for change in mine if change.path in called for norm in change.into]


def insert_report(changes: Iterable[Change]) -> InsertReport:
    """The records of an insertion as its report."""
    return InsertReport(
        tuple(
            InsertRecord(
                path=change.path,
                kind=change.kind,
                channels=change.channels,
                action="inserted" if change.action == "changed" else "skipped",
                bn_path=next(iter(change.into), None),
                reason=change.reason,
            )
            for change in changes
            if change.by == InsertBatchNorm.name
        )
    )


def _calibrate(draft: Draft, batches: Iterable[Any]) -> Example:
    norms: dict[str, _BatchNorm] = {}
    for path in draft.origins:
        norm = draft.root.get_submodule(path)
        assert isinstance(norm, _BatchNorm)
        norms[path] = norm
    with modes_kept(draft.root):
        return calibrate(draft.root.eval(), norms, batches, draft.given)


def _bias(model: nn.Module, origin: Origin) -> Tensor | None:
    """What the BatchNorm of `origin` must add to keep the outputs: the bias that it replaced."""
    if origin.bias is None:
        return None
    bias = attribute(model, origin.bias)
    assert isinstance(bias, Tensor)
    return bias.detach()


def _require_options(init: str, data: object, placement: str, form: str) -> None:
    choices = {
        "init": (init, ("fresh", "identity", "calibrate")),
        "placement": (placement, ("pre_activation", "post_activation")),
        "form": (form, ("module", "graph")),
    }
    for name, (value, known) in choices.items():
        if value not in known:
            raise InsertError(f"{name}={value!r} is unknown; choose from {', '.join(known)}")
    if init == "calibrate" and data is None:
        raise InsertError(
            "init='calibrate' takes its statistics from calibration_data; give an iterable of "
            "batches, or use init='identity', which needs none"
        )
    if init != "calibrate" and data is not None:
        raise InsertError(
            f"calibration_data is not read with init={init!r}; use init='calibrate' or leave it out"
        )


def _require_whole(draft: Draft) -> None:
    """Raise unless one graph can hold the model."""
    if draft.whole is None:
        raise CaptureError(
            f"the forward of {type(draft.source).__name__} cannot be traced as a whole, so that "
            "form='graph' has no graph to give; use form='module', which works inside it"
        )


def _require_model(model: nn.Module) -> None:
    if said := obstacle(model):
        raise InsertError(said)
