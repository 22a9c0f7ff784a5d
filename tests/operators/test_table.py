"""Laws of the table of operators: however an operator is spelled, it has one row."""

from __future__ import annotations

import builtins
import functools
import inspect
import operator
import re
from collections.abc import Callable, Iterator
from typing import Any

import onnx
import onnx.reference
import pytest
import torch
import torch.nn.functional as F
import torch.overrides
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from bnfx.errors import CaptureError
from bnfx.graphs.examples import Example
from bnfx.graphs.observed import observe
from bnfx.operators.table import (
    TABLE,
    Operator,
    Passage,
    Role,
    operator_of,
    operator_of_module,
)

NAMES = [(row, name) for row in TABLE for name in row.names.split()]
SPACES: tuple[Any, ...] = (F, torch, torch._C._nn, operator, torch.special, torch.linalg)

#: Values of what the classes of torch.nn take without a default.
_MADE_OF = {
    "num_channels": 4,
    "num_groups": 2,
    "unflattened_size": (2, 2),
    "dim": 1,
    "output_size": 4,
    "upscale_factor": 2,
    "downscale_factor": 2,
    "threshold": 0.5,
    "value": 0.1,
    "padding": 1,
    "num_features": 4,
    "normalized_shape": 8,
    "output_ratio": 0.5,
    "in_channels": 4,
    "out_channels": 4,
    "in_features": 8,
    "groups": 2,
    "norm_type": 2.0,
}
_SHAPES = ((3, 4, 8, 8), (3, 4, 8), (3, 4, 8, 8, 8), (3, 16, 9), (4, 8))
#: Classes that come later, are deprecated, or hold others that are to be given.
_LEFT_OUT = ("Lazy", "Container", "NLLLoss2d", "Transformer", "DataParallel")


def modules() -> Iterator[nn.Module]:
    """One module of every class of torch.nn that can be made from a few numbers."""
    for name, kind in sorted(vars(nn).items()):
        if not inspect.isclass(kind) or not issubclass(kind, nn.Module):
            continue
        if any(word in name for word in _LEFT_OUT):
            continue
        wanted = list(inspect.signature(kind.__init__).parameters.values())[1:]
        given = {
            p.name: _MADE_OF.get(p.name, 2)
            for p in wanted
            if (p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD)
            or p.name in ("dim", "scale_factor", "output_ratio")
        }
        try:
            yield kind(**given).eval()
        except (TypeError, ValueError, AttributeError, AssertionError):
            continue


def the_call(module: nn.Module) -> fx.Node | None:
    """The one call that gives a tensor in a module's forward; None for several, or none."""
    spatial = re.search(r"(\d)d$", type(module).__name__)
    ranks = range(2, 6) if spatial is None else [int(spatial[1]) + 2]
    for shape in [s for s in _SHAPES if len(s) in ranks]:
        try:
            graph = observe(module, Example((torch.randn(shape),), {}), training=False).graph
        except CaptureError:
            continue
        calls = [node for node in graph.nodes if node.op.startswith("call")]
        return calls[0] if len(calls) == 1 else None
    return None


def test_a_module_is_what_its_function_is() -> None:
    looked = set()
    for module in modules():
        node = the_call(module)
        if node is not None:
            looked |= {kind.__name__ for kind in type(module).__mro__}
            name = type(module).__name__
            assert operator_of(node) is operator_of_module(module), f"{name} calls {node.target}"
    # CrossMapLRN2d and Identity call no function.
    named = {name for row in TABLE for name in row.modules.split()}
    assert named - looked == {"CrossMapLRN2d", "Identity"}


def spelled(name: str) -> list[tuple[str, Any]]:
    """Every place in torch where an operator of this name is: where, and the target of a call."""
    found: list[tuple[str, Any]] = [
        (space.__name__, vars(space)[name]) for space in SPACES if callable(vars(space).get(name))
    ]
    packet = getattr(torch.ops.aten, name, None)
    if packet is not None:
        found += [(f"aten.{o}", getattr(packet, o)) for o in packet.overloads()]
    return found


def row_of(target: Any) -> Operator | None:
    """The row of a call of `target`: a function, an overload, or a method by its name."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    if isinstance(target, str):
        return operator_of(graph.call_method(target, (x,)))
    return operator_of(graph.call_function(target, (x,)))


@pytest.mark.parametrize(("row", "name"), NAMES, ids=[name for _, name in NAMES])
def test_every_name_exists_and_every_spelling_has_its_row(row: Operator, name: str) -> None:
    targets = spelled(name)
    attribute = hasattr(Tensor, name) or hasattr(builtins, name)
    assert targets or attribute, "no such function, method, attribute or overload"
    foreign = (operator.concat, operator.index)
    for where, target in targets:
        if target not in foreign:
            assert row_of(target) is row, where
    assert row_of(name) is row
    if hasattr(Tensor, f"__{name}__"):
        assert row_of(f"__{name}__") is row
    for where, target in spelled(f"{name}_"):
        assert row_of(target) is row, f"in place, {where}"
    if hasattr(Tensor, f"{name}_"):
        assert row_of(f"{name}_") is row
    augmented = vars(operator).get(f"i{name}")
    if augmented not in (None, operator.is_, operator.iconcat):
        assert row_of(augmented) is row


def test_no_name_is_in_two_rows() -> None:
    for column in ("names", "modules"):
        words = [word for row in TABLE for word in getattr(row, column).split()]
        assert sorted(words) == sorted(set(words)), column


_ROLES = {
    Passage.AFFINE: {Role.AFFINE},
    Passage.BATCH_NORM: {Role.NORM},
    Passage.NORM: {Role.NORM},
    Passage.RECTIFIER: {Role.NONLINEARITY},
    Passage.EXTREMUM: {Role.NONLINEARITY},
    Passage.CLAMP: {Role.NONLINEARITY, Role.SQUASHING},
    Passage.ADD: {Role.ADD},
    Passage.SUBTRACT: {Role.ADD},
    Passage.NEGATE: {Role.SCALE},
    Passage.MULTIPLY: {Role.SCALE},
    Passage.DIVIDE: {Role.SCALE},
    Passage.SHAPE: {Role.OTHER},
    Passage.MATMUL: {Role.OTHER},
    Passage.SOFTMAX: {Role.OTHER},
    Passage.ATTENTION: {Role.OTHER},
}


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.kind)
def test_folding_and_insertion_mean_the_same(row: Operator) -> None:
    if row.passage is not None:  # what moves, joins or averages channels keeps their statistics
        assert row.role in _ROLES.get(row.passage, {Role.MOVE})
    if row.keeps_channels:
        assert row.role is Role.MOVE


# -- what the functions do -------------------------------------------------------------------------

_X = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(0))
_V, _M = torch.rand(4) + 0.5, torch.randn(6, 6)
_IMAGES = {1: _X[:, :, 0], 2: _X, 3: _X[:, :, None].repeat(1, 1, 6, 1, 1)}
_WAYS: tuple[tuple[Any, ...], ...] = (
    *((), (2,), (1,), (_X,), (1.5, 2.5), (0, 1), ([2, 2],), (2, 1), (1, 2, 1), ([0, 2, 3, 1],)),
    *((0, torch.tensor([1])), ([2, 4, 6, 6],), ([1, 1, 1, 1],), ([torch.tensor([1])],), (_V,)),
    *((4, [2, 2]), ([4], _V, _V), (2, _V, _V), ([2, 1], _V), (1, [1, 3]), (_X > 0, 0.0), ([6],)),
    *((None, 2.0), ([1, 1],), (_X, _X), (None, 0.5), (0.5, False), ((12, 12), (2, 2))),
)


def _ways(name: str) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Arguments that might fit the function of this name."""
    digit = next((int(c) for c in name if c in "123"), 0)
    x = _IMAGES[digit or 2]
    if "conv" in name:
        weight = torch.randn(4, 4, *[3] * digit)
        yield (x, weight, _V), {}
    if name in ("cat", "concat", "concatenate", "stack"):
        yield ([_X, _X],), {}
    if name == "instance_norm":
        yield (x, _V, _V, _V, _V, False), {}
    if "batch_norm" in name or name == "instance_norm":
        yield (x, _V, _V), {"weight": _V, "bias": _V}
        yield (x, _V, _V, _V, _V, False, 0.1, 1e-5), {}
    if name in ("linear", "matmul", "mm", "addmm", "bmm"):
        yield (_M, _M), {}
        yield (_M, _M, _M), {}
        yield (_X[0], _X[0]), {}
    if name in ("t", "numpy_T", "adjoint"):
        yield (_M,), {}
    if name in ("fold", "col2im"):
        yield (torch.randn(2, 16, 9), (4, 4), (2, 2)), {}
    if name == "prelu":
        yield (_X, _V), {}
    for way in _WAYS:
        yield (x, *way), {}


_REFUSALS: tuple[type[Exception], ...] = (
    RuntimeError,
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
)
_REFUSALS += (ArithmeticError, AssertionError)  # the latter without CUDA


@functools.cache
def sample(name: str) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]] | None:
    """A call that runs of the function of F, torch or Tensor that has this name."""
    method = getattr(Tensor, name, None)
    for function in (vars(F).get(name), vars(torch).get(name), method):
        if not callable(function):
            continue
        for args, kwargs in _ways(name):
            try:
                function(*args, **kwargs)
            except _REFUSALS:
                continue
            return function, args, kwargs
    return None


#: Names that only ATen has; those of effects; and those whose arguments are no tensors.
_PUBLIC = [
    (row, name)
    for row, name in NAMES
    if not name.startswith(("_", "native_", "cudnn_", "miopen_", "sym_"))
    and row.passage is not None
]
each_function = pytest.mark.parametrize(("row", "name"), _PUBLIC, ids=[n for _, n in _PUBLIC])


class _Dispatched(TorchDispatchMode):
    """The ATen overloads that a call comes to."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's
        self.calls: list[tuple[Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls.append((func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))


#: With the arguments of the samples these are views of one part.
_PARTS = ("index", "einsum", "tensor_split", "hsplit", "vsplit", "dsplit")


@pytest.mark.filterwarnings("ignore")
@each_function
def test_what_a_function_comes_to_in_aten_has_its_row(row: Operator, name: str) -> None:
    call = sample(name)
    if call is None:
        return
    function, args, kwargs = call
    with torch.no_grad(), _Dispatched() as mode:
        function(*args, **kwargs)
    if len(mode.calls) != 1 or name in _PARTS:
        return
    target, given, named = mode.calls[0]
    graph = fx.Graph()
    plain = pytree.tree_map(lambda v: graph.placeholder("x") if isinstance(v, Tensor) else v, given)
    assert operator_of(graph.call_function(target, plain, named)) is row, target


#: They come to an operator of the table, and mean something else: a sum of products, the start of a
#: new tensor, an array.
_ELSE = {"einsum", "isreal", "new", "new_tensor", "numpy", "has_torch_function", "sym_sum", "chalf"}
_SLOW = {"lobpcg"}


@pytest.mark.filterwarnings("ignore")
def test_no_function_of_torch_is_forgotten() -> None:
    """What comes to one overload of the table is in the table."""
    spaces = torch.overrides.get_overridable_functions()
    every = {f.__name__ for space in (torch, F, Tensor) for f in spaces[space]}
    known = {name for _, name in NAMES}
    forgotten = {}
    for name in sorted(every - known - _ELSE - _SLOW):
        call = None if name.startswith("_") or name.endswith("_") else sample(name)
        if call is not None:
            function, args, kwargs = call
            with torch.no_grad(), _Dispatched() as mode:
                function(*args, **kwargs)
            if len(mode.calls) == 1 and row_of(mode.calls[0][0]) is not None:
                forgotten[name] = mode.calls[0][0]
    assert not forgotten


#: What drops or draws, by how it is called.
_DRAWS = ("dropout", "rrelu", "fractional", "rand", "attention", "empty", "bernoulli")


@pytest.mark.filterwarnings("ignore")
@each_function
def test_fresh_results_share_nothing_and_pure_ones_are_the_same_twice(
    row: Operator, name: str
) -> None:
    call = sample(name)
    if call is None:
        return
    function, args, kwargs = call
    first, again = function(*args, **kwargs), function(*args, **kwargs)
    given = {t.untyped_storage().data_ptr() for t in _tensors((args, kwargs))}
    if row.fresh:
        assert not any(t.untyped_storage().data_ptr() in given for t in _tensors(first))
    if row.pure:
        pairs = zip(_tensors(first), _tensors(again), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
    else:
        assert any(word in name for word in _DRAWS)


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


_OPERATORS = {schema.name for schema in onnx.defs.get_all_schemas() if not schema.domain}


def test_onnx_names_exist_and_have_one_meaning() -> None:
    """Convolutions of any rank are one operator there, products with and without an addend too."""
    shared = {"Conv", "ConvTranspose", "Gemm", "Shrink"}
    words = [word for row in TABLE for word in row.onnx.split()]
    assert set(words) <= _OPERATORS
    assert {word for word in words if words.count(word) > 1} == shared


#: Attributes of ONNX operators, and further arguments of functions, where the defaults differ.
_ATTRIBUTES = {
    "HardSigmoid": {"alpha": 1 / 6},
    "softshrink": {"bias": 0.5},
    "ThresholdedRelu": {"alpha": 0.5},
}
_ARGUMENTS = {"threshold": (0.5, 0.0), "clamp": (None, 2.0), "prelu": (torch.tensor([0.3]),)}
_TWO = {"Add", "Sub", "Mul", "Div", "Max", "Min", "Pow", "Sum"}
_ELEMENTWISE = [
    (row.kind, name)
    for row in TABLE
    for name in row.onnx.split()
    if row.role in (Role.NONLINEARITY, Role.SQUASHING, Role.MOMENT, Role.ADD, Role.SCALE)
]


@pytest.mark.parametrize(("kind", "name"), _ELEMENTWISE)
def test_onnx_computes_what_the_function_computes(kind: str, name: str) -> None:
    x = torch.rand(3, 4, generator=torch.Generator().manual_seed(1)) * 4 - 2
    tensors = [x.abs(), x.abs() + 0.5] if name in _TWO else [x]
    more = _ARGUMENTS.get(kind, ())
    given: list[Any] = [
        *tensors,
        *({"Clip": [None, torch.tensor(2.0)], "PRelu": more}.get(name, [])),
    ]
    arrays = {f"x{i}": v.numpy() for i, v in enumerate(given) if v is not None}
    names = [f"x{i}" if v is not None else "" for i, v in enumerate(given)]
    attributes: dict[str, Any] = _ATTRIBUTES.get(kind, _ATTRIBUTES.get(name, {}))
    node = onnx.helper.make_node(name, names, ["y"], **attributes)
    shaped = [onnx.helper.make_tensor_value_info(n, 1, None) for n in arrays]
    y = onnx.helper.make_tensor_value_info("y", 1, None)
    graph = onnx.helper.make_graph([node], "g", shaped, [y])
    (theirs,) = onnx.reference.ReferenceEvaluator(onnx.helper.make_model(graph)).run(None, arrays)
    function = getattr(F, kind, None) or getattr(torch, kind)
    torch.testing.assert_close(torch.from_numpy(theirs), function(*tensors, *more))
