"""The reference in three arithmetics: as it is, in the deployed precision, and in float64."""

from __future__ import annotations

import contextlib
import inspect
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from bnfx.errors import BnfxError, VerificationError
from bnfx.folding import exact_graph, exactly, fold_bn
from bnfx.gauges.walk import FoldOptions
from bnfx.graphs.examples import Example, clone, in_float64, in_precision, skeleton
from bnfx.graphs.export_guards import GUARDS
from bnfx.graphs.inference import Captured, exported, inference_graph
from bnfx.graphs.observed import leaves_in
from bnfx.numbers import UNIT, Array, relative_error
from bnfx.reports.report import FoldReport, report
from bnfx.verification.layers import composed, neighbours
from bnfx.verification.outputs import parting
from bnfx.verification.samples import RowTruths, Runs
from bnfx.verification.torch_layers import Traced, Widened, in_doubles, trace_layers

Precision = Literal["fp32", "tf32", "fp16", "bf16"]

DTYPES = {
    "fp32": torch.float32,
    "tf32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
}
_SOUND = {"fp32": 1e-2, "tf32": 0.1, "fp16": 0.1, "bf16": 0.3}
_UNITS = {"float16": UNIT["fp16"], "bfloat16": UNIT["bf16"]}
#: Units of rounding that a sum whose order is left to the threads may differ by.
_REPEATED = 64
_ORDER: tuple[Precision, ...] = ("fp32", "tf32", "fp16", "bf16")


@dataclass(frozen=True)
class Form:
    """One right form of the reference's layers."""

    #: How it came about.
    name: str
    #: The layers.
    traced: Traced
    #: Whether bnfx folded it, in float64 with one rounding at the end.
    rounded_once: bool


COMPOSED = "with each BatchNorm in the layer before it"


def _composed(name: str, traced: Traced) -> Form:
    layers = tuple(composed(traced.layers))
    return Form(name, replace(traced, layers=layers), rounded_once=False)


class TorchReference:
    """A module, and copies of it in the arithmetics that it is run in."""

    #: Whether a wrong weight is a failure.
    decides = True
    #: Largest error in the deployed precision of a network that is one function in it and float64.
    #: Of hundreds of layers it is 1e-4 in float32; above 1e-2 a network is chaotic.
    sound = property(lambda self: _SOUND[self.precision])

    def __init__(
        self,
        model: nn.Module,
        precision: Precision,
        outputs: int | None = None,
        folded: fx.GraphModule | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        """Of `outputs` outputs in the file; `folded` is the model's exact folding where known.

        `options` are those of `fold_bn` that the file names: another form to compare it with.
        """
        self._outputs, self._known, self._options = outputs, folded, dict(options or {})
        self.name = type(model).__name__
        self.precision = effective_precision(model, precision)
        self.dtype = DTYPES[self.precision]
        self.weights = _dtype_of(model)
        self._own = clone(model)
        same = self.precision in ("fp32", "tf32") and _all_of(model, torch.float32)
        same = same or _all_of(model, self.dtype)
        # Beside float32, float64 parts round less: such a model is its own budget.
        same = same or (self.precision == "fp32" and self.weights == "float32")
        self._rounded = self._own if same else clone(model).to(self.dtype)
        self._same = same and self.precision != "tf32"
        self._wide: nn.Module | None = None
        self._captured: Captured | BnfxError | None = None
        self.failures: list[str] = []

    def leaves(self, sample: Example) -> list[Tensor]:
        """The tensors of an input in the order of the exporter's inputs."""
        bound = _bound(self._own, sample)
        return [leaf for leaf in pytree.tree_leaves(bound) if isinstance(leaf, Tensor)]

    def run(self, samples: Sequence[Example], known: RowTruths | None = None) -> Runs:
        """All three on every input.

        Args:
            samples: The inputs.
            known: What it gives in float64, as far as earlier runs tell.

        Raises:
            VerificationError: The reference itself fails on an input.
        """
        called = [self._call(self._own, sample, None) for sample in samples]
        own = [arrays(outs) for outs in called]
        rounded = own
        if not self._same:
            rounded = [arrays(self._in_precision(sample)) for sample in samples]
        exact = []
        for i, sample in enumerate(samples):
            truth = known.of(i, own[i]) if known is not None else None
            exact.append(arrays(self._in_float64(sample)) if truth is None else truth)
        dtypes = tuple(str(t.dtype).removeprefix("torch.") for t in (called or [[]])[0])
        return Runs(own, rounded, exact, dtypes)

    def truncated(self, samples: Sequence[Example], runs: Runs) -> list[list[Array]]:
        """Outputs in TF32 whose factors are cut off, as tensor cores may do, and not rounded.

        Args:
            samples: The inputs.
            runs: What `run` gave for them, which stays where TF32 was not asked for.
        """
        if self.precision != "tf32":
            return runs.rounded
        return [arrays(self._in_tf32(sample, to_tf32_truncated)) for sample in samples]

    def require_one_answer(self, sample: Example, runs: Runs) -> None:
        """Refuse a reference that computes something else each time: it would set no limit.

        Args:
            sample: An input.
            runs: What `run` gave for it.

        Raises:
            VerificationError: The same input gives other outputs.
        """
        require_same(self.name, runs, arrays(self._call(self._own, sample, None)))

    def parting(self, sample: Example) -> str:
        """The first module that computes something else in float64; "" where none is seen to."""
        ours = self._shown(self._own, sample, None)
        with Widened():
            exact = self._shown(self._exact(), sample, torch.float64)
        for path in (path for path in ours if path in exact):
            if parting([ours[path]], [exact[path]], self.sound):
                module = self._own.get_submodule(path)
                return f"{type(module).__name__} {path!r}"
        return ""

    def _shown(
        self, module: nn.Module, sample: Example, dtype: torch.dtype | None
    ) -> dict[str, Array]:
        """What each module without parts gives in its first run, by path."""
        found: dict[str, Array] = {}

        def look(path: str, _module: nn.Module, _args: Any, out: Any) -> None:
            if isinstance(out, Tensor) and path not in found:
                (found[path],) = arrays([out])

        with contextlib.ExitStack() as stack:
            for path, part in module.named_modules():
                if path and not any(True for _ in part.children()):
                    handle = part.register_forward_hook(partial(look, path))
                    stack.callback(handle.remove)
            self._call(module, sample, dtype)
        return found

    def _in_precision(self, sample: Example) -> list[Tensor]:
        if self.precision == "tf32":
            return self._in_tf32(sample, to_tf32)
        try:
            return self._call(self._rounded, sample, self.dtype)
        except VerificationError:
            with StoredAs(self.dtype):
                return self._call(clone(self._rounded).float(), sample, torch.float32)

    def _in_tf32(self, sample: Example, narrow: Callable[[Tensor], Tensor]) -> list[Tensor]:
        with Tf32(narrow):
            return self._call(self._rounded, sample, self.dtype)

    def _in_float64(self, sample: Example) -> list[Tensor]:
        with Widened():
            return self._call(self._exact(), sample, torch.float64)

    def _exact(self) -> nn.Module:
        """The copy in float64, twice the size of the model: it is there between use and release."""
        if self._wide is None:
            self._wide = in_float64(self._own)
        return self._wide

    def release(self) -> None:
        """Give back the memory of the copy in float64."""
        self._wide = None

    def _call(self, module: nn.Module, sample: Example, dtype: torch.dtype | None) -> list[Tensor]:
        args, kwargs = pytree.tree_map(
            lambda leaf: cast(leaf, dtype), (sample.args, dict(sample.kwargs))
        )
        try:
            with torch.no_grad(), strict_float32():
                leaves = list(leaves_in(module(*args, **kwargs)))
        except (RuntimeError, TypeError, ValueError, IndexError, KeyError) as error:
            raise VerificationError(
                f"the reference {self.name} fails on an input"
                f"{'' if dtype is None else f' in {dtype}'}: {error}. Give args and inputs that it "
                "runs on"
            ) from error
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        if len(tensors) != self._outputs:  # a size that a forward returns is an output of the file
            numbers = [leaf for leaf in leaves if isinstance(leaf, Tensor | int | float)]
            if len(numbers) == self._outputs:
                tensors = [torch.as_tensor(leaf) for leaf in numbers]
        return [leaf.detach().cpu() for leaf in tensors]

    def forms(self, sample: Example) -> Iterator[Form]:
        """The layers as folding can leave them, the likeliest form first, computed in float64.

        Folding decides by dtype, and by what it knows of the inputs: so it is done again as the
        exported model was folded, by the rules of its own dtype, and for a copy in float64; then
        without the example, and with other options. No weight is rounded. Others fold each
        BatchNorm into the layer before it, or not at all. Exporters look into modules that folding
        leaves whole, and compute weights that a module computes: each form is also looked into.

        Raises:
            BnfxError: The reference cannot be captured in any way.
        """
        given, made = widened(sample), False
        self.failures = []
        ways = (partial(self._folded, *way, given) for way in self._ways(sample))
        as_it_is = partial(self._as_it_is, "as it is", sample, given)
        for way in itertools.chain([next(ways), as_it_is], ways):
            try:
                for form in way():
                    made = True
                    yield form
            except (BnfxError, RuntimeError, TypeError, ValueError, AssertionError) as error:
                # A form that cannot be made is one that the file need not be compared with.
                self.failures.append(f"{way.args[0]}: {str(error).partition(chr(10))[0]}")
        if not made:
            raise VerificationError("; ".join(self.failures))

    def _folded(
        self, name: str, fold: Callable[[], fx.GraphModule], given: Example
    ) -> Iterator[Form]:
        graph = fold()
        done = report(graph)
        assert isinstance(done, FoldReport)
        for how, traced in self._sights(graph, given, frozenset(done.provenance)):
            yield Form(name + how, traced, rounded_once=not how)
            if neighbours(traced.layers):
                yield _composed(f"{name}{how}, the rest {COMPOSED}", traced)

    def _as_it_is(self, name: str, sample: Example, given: Example) -> Iterator[Form]:
        for how, plain in self._sights(self._capture(sample).module, given, frozenset()):
            yield _composed(COMPOSED + how, plain)
            yield Form(name + how, plain, rounded_once=False)

    def _sights(
        self, graph: fx.GraphModule, given: Example, changed: frozenset[str]
    ) -> Iterator[tuple[str, Traced]]:
        """What the graph computes, and how it was looked at: first as an exporter sees it."""
        if any(n.op == "call_module" and n.target != GUARDS for n in graph.graph.nodes):
            try:
                inside = self._traced(exported(graph, given).module, given, changed)
            except Exception as error:  # noqa: BLE001  # the exporter and the user's forward raise anything
                said = str(error).partition(chr(10))[0]
                self.failures.append(f"looked into what stays whole: {said}")
            else:
                yield ", looked into", inside
        yield "", self._traced(graph, given, changed)

    def _ways(self, sample: Example) -> Iterator[tuple[str, Callable[[], fx.GraphModule]]]:
        """Names and calls of folding, each made when those before have been carried out.

        The file was most likely folded by the rules of the dtype that the weights are stored in.
        """

        def own() -> fx.GraphModule:
            if self._known is None:
                return exactly(self._capture(sample), FoldOptions(**self._options))
            known = skeleton(self._known)  # as it is the caller's
            assert isinstance(known, fx.GraphModule)
            return known

        def usual() -> fx.GraphModule:
            return exactly(self._capture(sample), FoldOptions())

        def exact(**options: bool) -> fx.GraphModule:
            found = self._capture(sample)
            inputs, others = pytree.tree_map(
                lambda leaf: cast(leaf, torch.float64), (found.inputs, found.others)
            )
            wide = Captured(in_doubles(found.module), inputs, others)
            graph = exactly(wide, FoldOptions(**options))
            if not options:
                done = report(graph)
                assert isinstance(done, FoldReport)
                usually.append(done)
            return graph

        usually: list[FoldReport] = []
        yield "folded by the rules of its own dtype", own
        if self._options:
            yield "folded by default", usual
        yield "folded in float64", exact
        yield "folded without example inputs", partial(exact_graph, self._own)
        # Where nothing is merged, not to merge gives the same once more.
        unmerged = usually and not any(".merged" in name for name in usually[0].provenance)
        for options in _options():
            if not (unmerged and any(name.startswith("merge") for name in options)):
                yield f"folded with {options}", partial(exact, **options)

    def _capture(self, sample: Example) -> Captured:
        """The graph of the model, a copy to edit: it is captured once."""
        if self._captured is None:
            try:
                self._captured = inference_graph(self._own, sample)
            except BnfxError as error:
                self._captured = error
        if isinstance(self._captured, BnfxError):
            raise self._captured
        return self._captured.copied()

    def unfolded(self, sample: Example) -> Traced:
        """The layers as they are, computed in float64, captured as cheaply as possible.

        Raises:
            BnfxError: The reference cannot be captured.
        """
        graph: fx.GraphModule | None = None
        if self._captured is None:
            with contextlib.suppress(BnfxError):
                graph = inference_graph(self._own, None).module
        graph = graph or self._capture(sample).module
        return self._traced(graph, widened(sample), frozenset())

    def _traced(self, graph: fx.GraphModule, given: Example, changed: frozenset[str]) -> Traced:
        slots = sum(node.op == "placeholder" for node in graph.graph.nodes)
        bound = list(_bound(self._own, given).values())
        flat = pytree.tree_leaves(bound)
        values = flat if len(flat) == slots else bound
        if len(values) != slots:
            raise VerificationError(
                f"the graph of {self.name} takes {slots} inputs, the example has {len(bound)}"
            )
        try:
            return trace_layers(in_doubles(graph), tuple(values), changed)
        except (RuntimeError, TypeError, ValueError, AssertionError) as error:
            raise VerificationError(f"the folded {self.name} fails in float64: {error}") from error


def _options() -> Iterator[dict[str, Any]]:
    """Every choice of the options of `fold_bn` but the default; few changes first.

    Channels that are dropped change the shapes: with other options too only where the file says so.
    """
    switches = {
        name: parameter.default
        for name, parameter in inspect.signature(fold_bn).parameters.items()
        if isinstance(parameter.default, bool)
    }
    alone = [name for name in switches if name != "drop_dead"]
    yield from ({"drop_dead": True}, {"drop_dead": True, "block": 1})
    for count in range(1, len(alone) + 1):
        for names in itertools.combinations(alone, count):
            yield {name: not switches[name] for name in names}


def effective_precision(model: nn.Module, precision: Precision) -> Precision:
    """The coarser one of the precision asked for and that of the model itself."""
    found = {p.dtype for p in model.parameters()} | {b.dtype for b in model.buffers()}
    own: Precision = (
        "bf16" if torch.bfloat16 in found else "fp16" if torch.float16 in found else "fp32"
    )
    return max(own, precision, key=_ORDER.index)


def require_same(name: str, runs: Runs, again: Sequence[Array]) -> None:
    """Refuse a reference whose first run, `runs`, and a second one on the same input differ.

    Raises:
        VerificationError: They do.
    """
    for k, (one, other) in enumerate(zip(runs.own[0], again, strict=True)):
        limit = _REPEATED * _UNITS.get(runs.dtypes[k], UNIT["fp32"])
        if one.shape != other.shape or not _same(one, other, limit):
            raise VerificationError(
                f"output {k} of the reference {name} is another one each time that it runs on the "
                "same input (random numbers, or state that a run changes), so there is nothing to "
                "compare with; make it deterministic"
            )


def _same(one: Array, other: Array, limit: float) -> bool:
    if not np.issubdtype(one.dtype, np.inexact):
        return bool(np.array_equal(one, other))
    finite = np.isfinite(one)
    return bool((finite == np.isfinite(other)).all()) and relative_error([other], [one]) <= limit


def _dtype_of(model: nn.Module) -> str:
    """Name of the coarsest floating dtype of the parameters."""
    floats = [p.dtype for p in model.parameters() if p.is_floating_point()]
    coarsest = min(floats, key=lambda dtype: -torch.finfo(dtype).eps, default=torch.float32)
    return str(coarsest).removeprefix("torch.")


def _all_of(model: nn.Module, dtype: torch.dtype) -> bool:
    state = (*model.parameters(), *model.buffers())
    return all(t.dtype is dtype for t in state if t.is_floating_point())


def _bound(model: nn.Module, sample: Example) -> dict[str, Any]:
    """Arguments by name in the order of the forward's signature, as the exporter takes them."""
    signature = inspect.signature(model.forward)
    try:
        return dict(signature.bind(*sample.args, **sample.kwargs).arguments)
    except TypeError as error:
        raise VerificationError(
            f"the example does not fit {type(model).__name__}.forward: {error}"
        ) from error


def cast(leaf: Any, dtype: torch.dtype | None) -> Any:
    """A copy of a tensor, since a forward may work in place, in the precision of `dtype`."""
    if not isinstance(leaf, Tensor):
        return leaf
    leaf = leaf.detach().clone()
    return in_precision(leaf, dtype) if dtype is not None else leaf


def widened(sample: Example) -> Example:
    """The same input in float64."""
    args, kwargs = pytree.tree_map(
        lambda leaf: cast(leaf, torch.float64), (sample.args, dict(sample.kwargs))
    )
    return Example(args, kwargs)


def arrays(tensors: Iterable[Tensor]) -> list[Array]:
    """As numpy arrays: bfloat16, which numpy lacks, as float32, complex numbers as files hold them.

    There they are pairs of real and imaginary part along a last axis.
    """
    plain = (torch.view_as_real(t.resolve_conj()) if t.is_complex() else t for t in tensors)
    return [(t.float() if t.dtype is torch.bfloat16 else t).detach().cpu().numpy() for t in plain]


#: Functions whose factors CUDA rounds to TF32.
_PRODUCTS = {
    *("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"),
    *("linear", "matmul", "__matmul__", "__rmatmul__", "mm", "bmm", "addmm", "baddbmm"),
    *("einsum", "scaled_dot_product_attention", "multi_head_attention_forward"),
}


def to_tf32(value: Tensor) -> Tensor:
    """A float32 tensor with its mantissas rounded to the 10 bits of TF32."""
    bits = value.contiguous().view(torch.int32)
    rounded = (bits + 0x0FFF + ((bits >> 13) & 1)) & ~0x1FFF
    return torch.where(torch.isfinite(value), rounded.view(torch.float32), value)


def to_tf32_truncated(value: Tensor) -> Tensor:
    """A float32 tensor with its mantissas cut off behind the 10 bits of TF32."""
    return (value.contiguous().view(torch.int32) & ~0x1FFF).view(torch.float32)


class Tf32(TorchFunctionMode):
    """Factors of convolutions and matrix products are rounded to TF32, sums stay in float32."""

    def __init__(self, narrow: Callable[[Tensor], Tensor] = to_tf32) -> None:
        super().__init__()
        self.narrow = narrow

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run `func`, on rounded factors where it multiplies."""
        if getattr(func, "__name__", "") not in _PRODUCTS:
            return func(*args, **(kwargs or {}))
        rounded = [self._rounded(arg) for arg in args]
        return func(*rounded, **{k: self._rounded(v) for k, v in (kwargs or {}).items()})

    def _rounded(self, value: Any) -> Any:
        wide = isinstance(value, Tensor) and value.dtype is torch.float32
        return self.narrow(value.detach()) if wide else value


@contextlib.contextmanager
def strict_float32() -> Iterator[None]:
    """Products in float32 proper, whatever the user allows: a budget must not have TF32's size.

    PyTorch lets convolutions on a GPU use TF32 unless told otherwise, and all products on request;
    on a CPU bfloat16 on request.
    """
    backends: Any = torch.backends  # which declares less than it has
    single = [backends.cudnn.conv, backends.cudnn.rnn, backends.cuda.matmul]
    single += [backends.mkldnn.conv, backends.mkldnn.rnn, backends.mkldnn.matmul]
    before = [backend.fp32_precision for backend in single]
    # The older words, which a forward may read. They refuse to be read where the user mixes them
    # with the newer ones, and then hold what they are set to.
    convolutions = _or_none(lambda: backends.cudnn.allow_tf32)
    products = _or_none(torch.get_float32_matmul_precision)

    def use(each: Sequence[str]) -> None:
        for backend, precision in zip(single, each, strict=True):
            if backend.fp32_precision != precision:
                backend.fp32_precision = precision

    backends.cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")
    use(["ieee" if precision != "none" else "none" for precision in before])
    try:
        yield
    finally:
        if convolutions is not None:
            backends.cudnn.allow_tf32 = convolutions
        if products is not None:
            torch.set_float32_matmul_precision(products)
        use(before)


def _or_none(read: Callable[[], Any]) -> Any:
    try:
        return read()
    except RuntimeError:
        return None


class StoredAs(TorchFunctionMode):
    """Every floating result is rounded to a narrow dtype and goes on in float32.

    For operators that torch lacks in that dtype on the CPU.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run `func` in float32 and round its result."""
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.dtype is torch.float32:
            return result.to(self.dtype).float()
        return result
