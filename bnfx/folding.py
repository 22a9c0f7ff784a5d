"""`fold_bn` and its dry run. The model given stays bit-identical; a new one is returned."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, TypeVar, cast, overload

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from bnfx.channels.telling import CHANNELS
from bnfx.editing.driver import repeat, run
from bnfx.editing.inference_draft import InferenceDraft
from bnfx.errors import FoldError, NotCapturedError
from bnfx.gauges import written_out
from bnfx.gauges.solution import demanded
from bnfx.gauges.walk import FoldOptions
from bnfx.graphs.boxes import boxes
from bnfx.graphs.examples import Example, example, skeleton
from bnfx.graphs.inference import Captured, inference_graph
from bnfx.graphs.naming import owner_of
from bnfx.graphs.parameters import Written
from bnfx.graphs.programs import closed, opened
from bnfx.module_folding import fold_modules, fold_modules_and_graph
from bnfx.passes import DropDead, EraseUnread, FoldBatchNorm, MergeBranches, MergeLinear, PadFirst
from bnfx.reports.report import (
    DropRecord,
    FoldRecord,
    FoldReport,
    MergeRecord,
    remember,
    remember_in_program,
    report,
    takes_arguments_of,
)

#: What may become of BatchNorms that cannot vanish.
Survivors = Literal["batch_norm", "error"]
_Folded = TypeVar("_Folded", bound="nn.Module | ExportedProgram")
#: More merging than this after folding has not been seen; it would only be left undone.
_STAGES = 5


@overload
def fold_bn(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    example_kwargs: Mapping[str, Any] | None = None,
    form: Literal["graph"] = "graph",
    block: int = 16,
    survivors: Survivors = "batch_norm",
    **options: bool,
) -> fx.GraphModule: ...
@overload
def fold_bn(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    example_kwargs: Mapping[str, Any] | None = None,
    form: Literal["module"],
    block: int = 16,
    survivors: Survivors = "batch_norm",
    **options: bool,
) -> nn.Module: ...
@overload
def fold_bn(
    model: ExportedProgram, *, block: int = 16, survivors: Survivors = "batch_norm", **options: bool
) -> ExportedProgram: ...


# What it returns is used outside of that mode, too; `options` above are the last but one.
@torch.inference_mode(mode=False)  # type: ignore[misc]
def fold_bn(
    model: nn.Module | ExportedProgram,
    example_inputs: Any = None,
    *,
    example_kwargs: Mapping[str, Any] | None = None,
    merge_branches: bool = True,
    thresholds: bool = False,
    border_maps: bool = False,
    merge_linear: bool = True,
    drop_dead: bool = False,
    block: int = 16,
    survivors: Survivors = "batch_norm",
    form: Literal["graph", "module"] = "graph",
) -> nn.Module | ExportedProgram:
    """An inference graph of `model` with every BatchNorm folded that an exact rewrite can remove.

    In eval mode a BatchNorm is, per channel, y = s x + t with s = gamma / sqrt(var + eps) and
    t = beta - mean s (Ioffe & Szegedy 2015, Algorithm 2). Every tensor of the graph may be carried
    as x' = a (x + d), with a scale a and a displacement d per channel; one linear system says which
    BatchNorms vanish. Weights become a_o W / a_i and biases a_o (b + d_o - W d_i), computed in
    float64 and rounded once to the stored dtype. A BatchNorm for which that is not proved stays as
    one BatchNorm, with the reason in `bnfx.report(result)`; nothing is added to the graph.

    Weights that folding leaves as they are share their storage with the model's, so that memory
    holds them once: training or loading into the result in place would change the model too. Copy
    the result first (`copy.deepcopy`) to do that.

    Args:
        model: Any module, in eval mode; a BatchNorm in train mode is left alone. Any device, any
            floating dtype. Or a `torch.export.ExportedProgram`, which brings its own inputs: its
            names, sizes, guards and signature stay, and `torch.export.save` keeps the report, too.
        example_inputs: Tuple of positional arguments, or a lone tensor. Needed where the forward
            cannot be traced symbolically; useful where the rank of a tensor decides.
        example_kwargs: Keyword arguments that go with them.
        merge_branches: Whether convolutions and identities of one input that are added become one
            convolution (RepVGG, MobileOne, FastViT).
        thresholds: Whether ReLU, ReLU6, Hardtanh and clamp may get a bound for each channel, which
            lets any map through. Fewer BatchNorms stay; a bound may cost more than a BatchNorm.
        border_maps: Whether a convolution that pads zeros may get a constant map added, which ties
            the result to the spatial size of the example. Needs example inputs.
        merge_linear: Whether layers in sequence with nothing but linear maps between them become
            one, average pools and sums of such sequences among them (Diverse Branch Block, ECBSR,
            SPAN), and an average pool goes before a convolution of size one: where that is exact,
            and takes fewer multiplications. Sums only with `merge_branches`.
        drop_dead: Whether channels that are exactly zero or constant, or that nobody reads, leave
            all layers that carry them: residual streams, concatenations, depthwise layers and
            gates too. Shapes in the state_dict change then; inputs and outputs stay.
            `bnfx.report(result).dropped` says where, how many and why. Example inputs let it see
            through more calls.
        block: Numbers of channels count in multiples of it for these two: 16 is what x86 computes
            at once. What drop_dead leaves is rounded up, with channels of zeros; 1 drops all.
        survivors: What becomes of BatchNorms that cannot vanish: "batch_norm" leaves them, "error"
            raises FoldError.
        form: "graph" for one inference graph, "module" for a copy of the model of its own class:
            folded BatchNorms are `nn.Identity`, layers of torch.nn carry new weights (a bias
            appears where one is needed), methods, attributes and optional arguments are as they
            were, and so are values that hooks see or that optional arguments may return. What such
            a copy cannot express (merged branches, bounds, maps, a copy of a layer for each call)
            stays, with the reason. It shares no weights with the model; with example inputs its
            outputs are compared with the model's in float64, and a model that cannot be captured as
            a whole is folded in the largest parts that can be. Methods of the model that its
            forward calls (`forward_features`, `forward_head`) take and give what they did. Parts of
            it, called by themselves, and their methods do so where that leaves no BatchNorm more;
            `bnfx.report(result).moved` names the others. What any other method gives, made of
            parts that are not named there, is as it was.

    Returns:
        A `torch.fx.GraphModule`, or a program for a program, with the parameters at their original
        names; a convolution that branches were merged into is `<layer>.merged`.

    Raises:
        CaptureError: The model cannot be captured; the message says what to do.
        FoldError: border_maps without example inputs, or for a program with open sizes; an option
            that is unknown; BatchNorms that stay with survivors="error", and `.report` of the error
            is the `FoldReport`.
    """
    options = FoldOptions(
        merge_branches=merge_branches,
        thresholds=thresholds,
        border_maps=border_maps,
        merge_linear=merge_linear,
        drop_dead=drop_dead,
        block=block,
    )
    _require_form(form, options)
    _require_survivors(survivors)
    if isinstance(model, ExportedProgram):
        if form == "module":
            raise FoldError("an exported program has no modules; leave out form='module'")
        return _accepted(_fold_program(model, options), survivors)
    given = _given(example_inputs, example_kwargs, options)
    if form == "module":
        return _accepted(fold_modules(model, given, _of_modules(options)), survivors)
    try:
        captured = inference_graph(model, given)
    except NotCapturedError as error:
        raise NotCapturedError(
            f"{error}. With form='module', fold_bn folds the parts of it that can be captured"
        ) from error
    return _accepted(fold_captured(captured, options), survivors)


def _require_survivors(survivors: str) -> None:
    if survivors not in ("batch_norm", "error"):
        raise FoldError(f"survivors={survivors!r} is unknown; choose from batch_norm, error")


def _accepted(folded: _Folded, survivors: str) -> _Folded:
    """`folded`, unless BatchNorms stay in it that must not."""
    done = report(folded)
    assert isinstance(done, FoldReport)
    if survivors == "error" and done.left:
        stay = (bn for bn in done.batch_norms if bn.verdict != "folded")
        told = "".join(f"\n  {bn.path}: {bn.reason}" for bn in stay)
        raise FoldError(
            f"{done.left} of {len(done.batch_norms)} BatchNorms stay, and survivors='error' allows "
            f"none:{told}\nDo what the reasons say, or leave them with survivors='batch_norm'",
            done,
        )
    return folded


def _require_form(form: str, options: FoldOptions) -> None:
    if form not in ("graph", "module"):
        raise FoldError(f"form={form!r} is unknown; choose from graph, module")
    if form == "module" and options.drop_dead:
        raise FoldError(
            "form='module' keeps the model's own code, in which widths may be written out; leave "
            "out drop_dead, or use form='graph'"
        )
    if form == "module" and (options.thresholds or options.border_maps):
        raise FoldError(
            "form='module' keeps the model's own code, which has no place for bounds and border "
            "maps; leave out thresholds and border_maps, or use form='graph'"
        )


def _of_modules(options: FoldOptions) -> FoldOptions:
    """What the model's own code can express."""
    return replace(options, merge_branches=False, merge_linear=False)


def _fold_program(program: ExportedProgram, options: FoldOptions) -> ExportedProgram:
    source = opened(program)
    captured = source.captured
    sizes = [_sizes(inputs) for inputs in (captured.inputs, *(captured.others or ()))]
    if options.border_maps and any(size != sizes[0] for size in sizes):
        raise FoldError(
            "border_maps=True needs fixed sizes, and this program leaves some open; export it with "
            "fixed sizes behind the batch"
        )
    edited = fold_captured(captured, options)
    done = report(edited)
    assert isinstance(done, FoldReport)
    return remember_in_program(closed(source, edited), done)


def _sizes(inputs: Sequence[Any] | None) -> list[Any]:
    """Sizes of the inputs behind the batch."""
    leaves = pytree.tree_leaves(list(inputs or ()))
    return [leaf.shape[1:] for leaf in leaves if isinstance(leaf, Tensor)]


def fold_captured(captured: Captured, options: FoldOptions) -> fx.GraphModule:
    """`fold_bn` of a graph that is there already; it is changed itself."""
    graph, written = _folded(captured, options)
    written.round(graph)
    return graph


def _given(inputs: Any, kwargs: Mapping[str, Any] | None, options: FoldOptions) -> Example | None:
    given = example(inputs, kwargs)
    if options.border_maps and given is None:
        raise FoldError("border_maps=True needs example_inputs: a map has the size of its input")
    return given


@takes_arguments_of(cast("Callable[..., object]", fold_bn))  # all kinds that it is overloaded for
def plan_fold(*args: Any, **kwargs: Any) -> FoldReport:
    """What `fold_bn` would do with the same arguments, errors too; nothing is changed."""
    done = report(fold_bn(*args, **kwargs))
    assert isinstance(done, FoldReport)
    return done


@dataclass(frozen=True)
class Folded:
    """One folding in two forms: as `fold_bn` returns it, and before anything was rounded."""

    rounded: nn.Module
    exact: fx.GraphModule


@torch.inference_mode(mode=False)
def fold_exactly(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    example_kwargs: Mapping[str, Any] | None = None,
    form: Literal["graph", "module"] = "graph",
    block: int = 16,
    survivors: Survivors = "batch_norm",
    **options: bool,
) -> Folded:
    """Fold once: `fold_bn`'s result, and the same graph with its new parameters in float64.

    The gauges of both are those for the dtype in which `model` is stored; parameters and buffers of
    the exact graph are all in float64. With form="module" it is the graph of what is returned, with
    parameters as they were rounded. Arguments and errors are those of `fold_bn`.
    """
    chosen = FoldOptions(block=block, **options)
    _require_form(form, chosen)
    _require_survivors(survivors)
    if form == "module":
        given = _given(example_inputs, example_kwargs, chosen)
        both = Folded(*fold_modules_and_graph(model, given, _of_modules(chosen)))
        _accepted(both.rounded, survivors)
        return both
    captured = inference_graph(model, _given(example_inputs, example_kwargs, chosen))
    graph, written = _folded(captured, chosen, exact=True)
    exact = _doubled(graph)
    written.round(graph)
    return Folded(_accepted(graph, survivors), exact)


def exactly(captured: Captured, options: FoldOptions) -> fx.GraphModule:
    """The exact graph of a capture, which is changed itself."""
    return _doubled(_folded(captured, options, exact=True)[0])


def _doubled(graph: fx.GraphModule) -> fx.GraphModule:
    exact = skeleton(graph).double()
    assert isinstance(exact, fx.GraphModule)
    return exact


@takes_arguments_of(fold_bn)
def exact_graph(*args: Any, **kwargs: Any) -> fx.GraphModule:
    """`fold_bn`'s result before it is rounded: parameters and buffers in float64."""
    return fold_exactly(*args, **kwargs).exact


def _folded(
    captured: Captured, options: FoldOptions, *, exact: bool = False
) -> tuple[fx.GraphModule, Written]:
    """The graph, folded, with its report, and what of it is to be rounded."""
    draft = InferenceDraft(captured, exact=exact or options.drop_dead)
    marked = written_out.mark(draft.module)
    draft, before = _edited(draft, options)
    draft.settle([*written_out.gone_whole(marked, draft.changes, draft.written.provenance)])
    folds, drops = _folds(draft), _drops(draft)
    merges = tuple(MergeRecord(c.values, c.into[0], c.reason) for c in draft.merges)
    graph, written = draft.finish(), draft.written
    for done in (draft, before):
        if done is not None:
            done.let_go(graph)
    pictures = (draft.drawn, boxes(graph))
    told = FoldReport(
        folds,
        written.provenance,
        draft.unavoidable,
        graphs=pictures,
        merges=merges,
        dropped=drops,
        options=asdict(options),
    )
    return remember(graph, told), written


def _edited(
    draft: InferenceDraft, options: FoldOptions
) -> tuple[InferenceDraft, InferenceDraft | None]:
    """The draft with every pass run over it, and an earlier one that still holds weights.

    A BatchNorm that vanished may have parted branches that can be merged now, or may have been all
    that kept another: a tensor carries one axis at a time, and what is constant behind a gamma of
    zero is known only then. Where that is found, the folding before is done again with its weights
    kept in float64: nothing is rounded twice.
    """
    fold = FoldBatchNorm(options)
    linear = MergeLinear(options.block, branches=options.merge_branches)
    drop = DropDead(options.block, _proved_ranks(draft) if options.drop_dead else frozenset())
    run(draft, EraseUnread())
    if options.merge_linear:
        run(draft, PadFirst())
    for stage in range(_STAGES):
        if options.merge_branches:
            run(draft, repeat(MergeBranches()))
        if options.merge_linear and stage:
            run(draft, repeat(linear))
        if options.drop_dead:
            run(draft, drop)
        before = draft.copy() if fold.concerns(draft) and not draft.exact else None
        run(draft, fold)
        if options.drop_dead:  # a row whose BatchNorm scales it by zero reads nothing now
            run(draft, drop)
        beside = options.merge_branches and bool(MergeBranches().match(draft))
        in_turn = options.merge_linear and bool(linear.sites(draft))  # sites would hold weights
        if not (beside or in_turn or _folds_more(draft, fold)):
            break
        if before is not None:
            draft.let_go(before.module)
            draft, before.exact = before, True
            run(draft, fold)
    return draft, before


def _folds(draft: InferenceDraft) -> tuple[FoldRecord, ...]:
    """What became of BatchNorms."""
    carriers = _carriers(draft)
    return tuple(
        FoldRecord(
            c.path, "folded" if c.action == "changed" else "kept", carriers(c.into), c.reason
        )
        for c in draft.in_order()
        if c.kind != CHANNELS
    )


def _drops(draft: InferenceDraft) -> tuple[DropRecord, ...]:
    """What became of dead channels."""
    return tuple(
        DropRecord(
            path=c.path,
            verdict="dropped" if c.action == "changed" else "kept",
            channels=c.channels,
            left=c.left,
            layers=c.into or (c.path,),
            reason=c.reason,
        )
        for c in draft.in_order()
        if c.kind == CHANNELS
    )


def _folds_more(draft: InferenceDraft, fold: FoldBatchNorm) -> bool:
    """Whether some BatchNorms vanished, and others can only now."""
    norms = {c.action for c in draft.changes.values() if c.kind == "batch_norm"}
    return norms == {"changed", "kept"} and fold.finds_any(draft)


def _carriers(draft: InferenceDraft) -> Callable[[Sequence[str]], tuple[str, ...]]:
    """From the names of layers to those of the layers that hold them now."""
    left = {owner_of(str(node.target)) for node in draft.graph.find_nodes(op="get_attr")}
    later = {layer: change.into for change in draft.merges for layer in change.values}

    def now(names: Sequence[str]) -> tuple[str, ...]:
        found: list[str] = []
        for name in names:
            gone = name not in left and name in later
            found += now([n for n in later[name] if n != name]) if gone else [name]
        return tuple(dict.fromkeys(found))

    return now


def _proved_ranks(draft: InferenceDraft) -> frozenset[str]:
    """Names of the nodes whose assumed rank a BatchNorm demands; folded, it can't be asked."""
    assumed = draft.runs[0].assumed.items()
    return frozenset(node.name for node, rank in assumed if demanded(node, rank))
