"""Folding into a copy of the model that keeps its class: `fold_bn(form="module")`.

The parts of the copy that can be captured are solved as graphs are (`bnfx.gauges`), with what their
modules cannot express forbidden (`bnfx.gauges.slots`). Then the new parameters go into the copy's
own layers, and what vanished becomes an `nn.Identity`.
"""

from __future__ import annotations

import inspect
import itertools
import math
import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from bnfx.editing.driver import run
from bnfx.editing.inference_draft import InferenceDraft
from bnfx.errors import CaptureError, FoldError
from bnfx.gauges import written_out
from bnfx.gauges.rank import RankedIdentity
from bnfx.gauges.slots import Slots, scope_of
from bnfx.gauges.walk import FoldOptions
from bnfx.graphs.agreement import outputs
from bnfx.graphs.baked import computes, put
from bnfx.graphs.boxes import boxes
from bnfx.graphs.examples import Example, clone, in_float64, obstacle
from bnfx.graphs.inference import inference_graph
from bnfx.graphs.naming import owner_of
from bnfx.graphs.norms import holds_norm, is_norm
from bnfx.graphs.observed import tensors_in
from bnfx.graphs.parameters import attribute
from bnfx.graphs.parts import Part, Parts, join
from bnfx.numbers import relative_error
from bnfx.passes import FoldBatchNorm, MergeBranches, PadFirst
from bnfx.reports.report import FoldRecord, FoldReport, remember, report

#: How often a part is solved again without a layer that turned out not to take its new weights.
_ROUNDS = 8
_APART = "its calls would need weights of their own; use form='graph'"
_REPORT = "use form='graph', and please report the model"
_MERGES = "with form='graph' it becomes one convolution with the branches beside it"
_UNKNOWN = "no call was seen that computes y = s x + t with its statistics"
_NOT_CALLED = "the forward did not call it on the example"


def fold_modules(model: nn.Module, given: Example | None, options: FoldOptions) -> nn.Module:
    """A copy of `model`, of its class, with the BatchNorms folded that such a copy can do without.

    Raises:
        CaptureError: Without an example the whole forward must be traceable.
        FoldError: The copy does not compute what the model does.
    """
    spread = isinstance(model, nn.parallel.DistributedDataParallel)
    if said := obstacle(model, wrappers=spread):
        raise CaptureError(said)
    done = _folded(model, given, options, "")
    if given is not None and (why := _hands_out(model, done.root, given)):
        done = _folded(model, given, options, why)
    told = FoldReport(
        batch_norms=tuple(done.records),
        provenance=done.provenance,
        keys=done.keys,
        moved=tuple(sorted(done.moved)),
        graphs=done.pictures,
    )
    done.root.register_load_state_dict_pre_hook(_explain_keys)
    return remember(done.root, told)


def _folded(model: nn.Module, given: Example | None, options: FoldOptions, apart: str) -> _Done:
    """A copy, folded as a whole where that can be; `apart` says why only its parts are."""
    copied = clone(model)
    done = _Done(copied)
    looked = Parts(copied, given)
    parts = list(looked.found(apart))
    for part in parts:
        _fold_part(done, part, options)
    done.records += _unseen(done, looked)
    _require_same(model, done, parts)
    return done


def _hands_out(model: nn.Module, folded: nn.Module, given: Example) -> str:
    """Which switch, turned the other way, shows that values inside are not the model's; or ""."""
    if any(tensor.is_meta for tensor in model.parameters()):
        return ""
    for name, parameter in inspect.signature(model.forward).parameters.items():
        if not isinstance(parameter.default, bool) or name in given.kwargs:
            continue
        other = {**given.kwargs, name: not parameter.default}
        try:
            apart = _difference(model, folded, {}, Example(given.args, other))
        except CaptureError:  # it wants more then
            continue
        if not apart <= _limit(model):
            return f"with {name}={not parameter.default} it returns values from its inside"
    return ""


def fold_modules_and_graph(
    model: nn.Module, given: Example | None, options: FoldOptions
) -> tuple[nn.Module, fx.GraphModule]:
    """The same, and a graph in float64 of what it computes."""
    folded = fold_modules(model, given, options)
    wide = inference_graph(in_float64(folded), None if given is None else _widened(given))
    return folded, remember(wide.module, report(folded))


@dataclass
class _Done:
    """What was done so far."""

    root: nn.Module
    records: list[FoldRecord] = field(default_factory=list)
    provenance: dict[str, tuple[str, ...]] = field(default_factory=dict)
    #: Records of BatchNorms in modules that a graph calls as a whole; those may be parts, too.
    whole: dict[str, FoldRecord] = field(default_factory=dict)
    #: Keys of the state_dict that came or went, and why.
    keys: dict[str, str] = field(default_factory=dict)
    #: Modules and methods of modules that take or give other values.
    moved: set[str] = field(default_factory=set)
    #: New values by name, before they were rounded.
    exact: dict[str, Tensor] = field(default_factory=dict)
    pictures: Any = ((), ())


# -- one part --------------------------------------------------------------------------------------


def _fold_part(done: _Done, part: Part, options: FoldOptions) -> None:
    """Solve one part, and write what was found into its modules."""
    root = done.root.get_submodule(part.path)
    draft = InferenceDraft(part.captured)
    written_out.mark(draft.module)
    stuck: dict[str, str] = {}
    for _ in range(_ROUNDS):
        attempt = draft.copy()
        attempt.exact = True
        slots = Slots(root, attempt.graph, attempt.values, part.outside, part.closed, stuck)
        places = {node.name: scope_of(node) for node in attempt.graph.nodes}
        run(attempt, FoldBatchNorm(options, slots))
        odd = {owner_of(name): _APART for name in attempt.written.dtypes if not slots.takes(name)}
        graph = attempt.finish()
        if not odd:
            odd |= slots.not_put({n: _new(graph, n) for n in attempt.written.dtypes})
        odd |= slots.written_over(draft.graph, attempt.fresh)
        if not odd:
            break
        stuck |= odd
    else:
        raise FoldError(
            f"no weights were found that all calls of {sorted(stuck)} share; use form='graph', and "
            "please report the model"
        )
    written = attempt.written
    for node in attempt.fresh:
        vars(slots.modules[scope_of(node)])["inplace"] = False
    changes = attempt.in_order()
    for name, dtype in written.dtypes.items():
        _write(done, join(part.path, name), _new(graph, name), dtype)
    for path, count in slots.carriers.items():  # the same keys whatever the statistics are
        layer = slots.modules[path]
        weight, bias = layer._parameters.get("weight"), layer._parameters.get("bias")
        if weight is not None and bias is None and slots.takes(f"{path}.bias"):
            zero = torch.zeros(count, dtype=torch.float64, device=weight.device)
            _write(done, join(part.path, f"{path}.bias"), zero, weight.dtype)
    for change in changes:
        if change.action == "changed":
            place = places[change.at]
            rank = slots.ranks.get(place)
            rest = slots.instead(place) if rank is None else RankedIdentity(rank)
            assert rest is not None
            _give_way(done, join(part.path, place), rest, change.into)
    done.moved |= {join(part.path, name) for name in slots.moved}
    _tell(done, part, attempt, merged=_merged(draft))
    if not part.path:
        done.pictures = (draft.drawn, boxes(graph))


def _new(graph: nn.Module, name: str) -> Tensor:
    value = attribute(graph, name)
    assert isinstance(value, Tensor)
    return value.detach()


def _write(done: _Done, name: str, value: Tensor, dtype: torch.dtype) -> None:
    """Put new values where the old ones are; a bias that comes is noted."""
    path, _, leaf = name.rpartition(".")
    owner = done.root.get_submodule(path)
    if computes(owner, leaf):
        put(owner, leaf, value.to(dtype))
        return
    old: Tensor | None = {**owner._parameters, **owner._buffers}.get(leaf)
    shape = value.shape if old is None else old.shape
    done.exact[name] = value.reshape(shape)
    rounded = value.reshape(shape).to(dtype, copy=True)
    if old is not None:
        old.data = rounded
        return
    weight = owner._parameters.get("weight")
    trained = True if weight is None else weight.requires_grad
    owner.register_parameter(leaf, nn.Parameter(rounded, requires_grad=trained))
    done.keys[name] = f"{path} has a {leaf} now, which carries what was folded into it"


def _give_way(done: _Done, path: str, rest: nn.Module, into: tuple[str, ...]) -> None:
    """Let the module at `path` become `rest`, under all names and for all that hold it."""
    module = done.root.get_submodule(path)
    if type(module) is type(rest) and not module.state_dict():
        return  # at another call
    stays = rest.state_dict().keys()
    where = f"into {', '.join(into)}" if into else "away"
    for key in module.state_dict():
        if key not in stays:
            done.keys[join(path, key)] = f"{path} was folded {where}"
    training = module.training
    module.__class__ = type(rest)
    module.__dict__.clear()
    module.__dict__.update(rest.__dict__)
    module.training = training


def _merged(draft: InferenceDraft) -> set[str]:
    """Names of the norms that the graph form takes into a convolution beside them."""
    leaves = (leaf for site in MergeBranches().match(draft) for leaf in site.merged)
    framed = (node for frame in PadFirst().match(draft) for node in frame.chain.nodes)
    norms = {norm.name for leaf in leaves for norm in leaf.norms}
    return norms | {node.name for node in framed if is_norm(node)}


def _tell(done: _Done, part: Part, draft: InferenceDraft, merged: set[str]) -> None:
    """Add the records of a part, in names of the whole."""
    found = [
        FoldRecord(
            path=join(part.path, change.path),
            verdict="folded" if change.action == "changed" else "kept",
            into=tuple(join(part.path, name) for name in change.into),
            reason=f"{change.reason}; {_MERGES}"
            if change.action == "kept" and change.at in merged
            else change.reason,
        )
        for change in draft.in_order()
    ]
    inner = ["/" in change.at for change in draft.in_order()]  # of what the graph calls as a whole
    done.records += itertools.compress(found, map(operator.not_, inner))
    done.whole |= {record.path: record for record in itertools.compress(found, inner)}
    done.provenance |= {
        join(part.path, name): tuple(join(part.path, source) for source in sources)
        for name, sources in draft.written.provenance.items()
    }


def _unseen(done: _Done, parts: Parts) -> Iterator[FoldRecord]:
    """Records of the BatchNorms of which no part tells."""
    told, causes = {record.path for record in done.records}, parts.causes
    for path, module in done.root.named_modules():
        if not holds_norm(module) or path in told:
            continue
        if path in done.whole:
            yield done.whole[path]
            continue
        outer = max((p for p in causes if p != path and _lies_in(path, p)), key=len, default=None)
        if path in causes:
            why = f"{type(module).__name__} has a forward of its own that cannot be captured"
        elif not parts.runs(path):
            why = _NOT_CALLED
        elif outer is None:
            why = _UNKNOWN
        else:
            kind = type(done.root.get_submodule(outer)).__name__
            why = f"what is around it, {kind} {outer!r}, cannot be captured: {causes[outer]}"
        yield FoldRecord(path, "kept", (), why)


def _lies_in(path: str, outer: str) -> bool:
    return not outer or path.startswith(f"{outer}.")


# -- checks ----------------------------------------------------------------------------------------


def _require_same(model: nn.Module, done: _Done, parts: Sequence[Part]) -> None:
    """Raise unless every part gives on its example, in float64, what it gave before.

    The new parameters are taken as they were before they were rounded: where detections are sorted
    by scores that are nearly equal, say, a rounding would turn their order round.
    """
    if any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())):
        return  # there are no values
    limit = _limit(model)
    for part in parts:
        if part.given is None:
            continue
        before, after = (top.get_submodule(part.path) for top in (model, done.root))
        exact = {
            name.removeprefix(f"{part.path}."): value
            for name, value in done.exact.items()
            if not part.path or name.startswith(f"{part.path}.")
        }
        error = _difference(before, after, exact, part.given)
        if not error <= limit:
            where = f", in {part.path!r}" if part.path else ""
            raise FoldError(
                f"{type(model).__name__}, folded in its own class, differs from the model by "
                f"{error:.3g} relative on the example{where}; {_REPORT}"
            )


def _limit(model: nn.Module) -> float:
    """How far outputs may move, relative to them: far more than rounded weights move them."""
    kinds = {t.dtype for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()}
    return math.sqrt(max((torch.finfo(kind).eps for kind in kinds), default=0.0))


def _difference(
    before: nn.Module, after: nn.Module, exact: Mapping[str, Tensor], given: Example
) -> float:
    """How far apart their outputs are, in float64 if the code of the two takes that."""
    wide = _widened(given)
    try:
        truth = tensors_in(outputs(in_float64(before), wide))
        widened = in_float64(after)
        for name, value in exact.items():
            stored = attribute(widened, name)
            assert isinstance(stored, Tensor)
            stored.data = value.to(stored.device)
        ours = tensors_in(outputs(widened, wide))
    except CaptureError:  # its own code asks for a fixed dtype
        truth = tensors_in(outputs(clone(before), given))
        ours = tensors_in(outputs(clone(after), given))
    if len(ours) != len(truth):
        return math.inf
    pairs = [
        [t.detach().double().cpu().numpy() for t in pair]
        for pair in zip(ours, truth, strict=True)
        if pair[0].shape == pair[1].shape and pair[1].is_floating_point()
    ]  # a length may depend on the data
    error = relative_error([a for a, _ in pairs], [b for _, b in pairs])
    ordered = [[np.sort(side, axis=None) for side in pair] for pair in pairs]
    return min(error, relative_error([a for a, _ in ordered], [b for _, b in ordered]))


def _widened(given: Example) -> Example:
    def wide(leaf: Any) -> Any:
        floating = isinstance(leaf, Tensor) and leaf.is_floating_point()
        return leaf.double() if floating else leaf

    mine = given.copied()
    args, kwargs = pytree.tree_map(wide, (mine.args, dict(mine.kwargs)))
    return Example(args, kwargs)


def _explain_keys(
    module: nn.Module, state_dict: Mapping[str, Any], prefix: str, *rest: Any
) -> None:
    """Say in the error of a checkpoint that does not fit what folding did to the keys."""
    _metadata, strict, _missing, _unexpected, errors = rest
    done = vars(module).get("_bnfx_report")
    if not strict or not isinstance(done, FoldReport):
        return
    own = module.state_dict().keys()
    odd = [
        (key, why)
        for key, why in done.keys.items()
        if (key in own) != (f"{prefix}{key}" in state_dict)
    ]
    if odd:
        shown = "; ".join(f"{key!r}: {why}" for key, why in odd[:4])
        more = f"; and {len(odd) - 4} more" if len(odd) > 4 else ""
        errors.append(
            f"the BatchNorms of this {type(module).__name__} are folded ({shown}{more}). Load the "
            "checkpoint into the model first, and fold it then"
        )
