"""What a model did when it ran once: every operator that it called, and what each one read.

`observe` runs a model on example inputs under a `torch.overrides.TorchFunctionMode`. The
record is a `torch.fx` graph that is read, never run. It exists for every model that runs at all, so
whatever decides the control flow (the data, keyword arguments, the shape) has decided it here.

This is evidence about one run. `torch.export` gives evidence that holds for all runs, but not for
every model, and takes a hundred times longer; where a whole graph is wanted, symbolic tracing gives
it (`bnfx.graphs.training`). To insert BatchNorm one run is enough: what is asked of it is which
operator an activation meets first, and the edit is made at the layer, not in this graph.
"""

from __future__ import annotations

import dataclasses
import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils.weak import WeakTensorKeyDictionary

from bnfx.errors import CaptureError
from bnfx.graphs.examples import Example
from bnfx.operators.table import is_layer_function

#: node.meta key: shape of the (first) tensor that the call returned.
SHAPE = "bnfx_shape"
#: node.meta key: paths of the modules whose forward was running, outermost first.
SCOPES = "bnfx_scopes"

#: What turns a tensor into a number, to decide something.
_ASKING = ("bool", "int", "float", "complex", "index", "item", "tolist")
_REFLECTED = ("add", "sub", "mul", "div", "truediv", "matmul", "pow", "iadd", "isub", "imul")


@dataclass(frozen=True)
class Observation:
    """One run of a model."""

    outputs: Any  #: what it returned
    graph: fx.Graph  #: The calls, in order. Parameters and buffers are `get_attr` nodes.
    runs: Mapping[str, int]  #: how often the forward of each module ran, by path
    asking: frozenset[str]  #: paths of modules whose forward asked for the value of a tensor


def observe(model: nn.Module, given: Example, *, training: bool) -> Observation:
    """Run `model`, a private copy, once in train or in eval mode, without gradients.

    It may write into the copy; the example and the global random state stay as they are.

    Raises:
        CaptureError: The model does not run on the example.
    """
    model.train(training)
    recorder = _Recorder(model)
    mine = given.copied()
    args, kwargs = mine.args, mine.kwargs
    for leaf in pytree.tree_leaves((args, kwargs)):
        if isinstance(leaf, Tensor):
            recorder.remember(leaf, recorder.graph.placeholder(f"input_{len(recorder.known)}"))
    try:
        with torch.no_grad(), undisturbed_random_state(model), recorder.following(model):
            out = model(*args, **kwargs)
    except Exception as error:  # a user's forward raises anything
        raise CaptureError(
            f"{type(model).__name__} does not run on the example inputs: "
            f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        ) from error
    leaves = tensors_in(out)
    recorder.graph.output([recorder.known[leaf] for leaf in leaves if leaf in recorder.known])
    return Observation(out, recorder.graph, recorder.runs, frozenset(recorder.asking))


@contextmanager
def undisturbed_random_state(model: nn.Module) -> Iterator[None]:
    """Put the global random generators back: Python's, numpy's and torch's on the model's devices.

    They are seeded inside, so that two runs under this make the same choices.
    """
    tensors = (*model.parameters(), *model.buffers())
    devices = sorted({t.device.index or 0 for t in tensors if t.device.type == "cuda"})
    python, legacy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=devices):
            random.seed(0)
            np.random.seed(0)
            torch.manual_seed(0)
            yield
    finally:
        random.setstate(python)
        np.random.set_state(legacy)


class _Recorder(TorchFunctionMode):
    """Writes down every call of a torch function that returns or changes a tensor."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.graph = fx.Graph()
        self.known = WeakTensorKeyDictionary()
        self.runs: Counter[str] = Counter()
        self.asking: set[str] = set()
        self._scopes: list[str] = []
        self._names = {
            id(t): name for name, t in (*model.named_parameters(), *model.named_buffers())
        }

    @contextmanager
    def following(self, model: nn.Module) -> Iterator[None]:
        """Record while this is open, and which modules are running."""
        with ExitStack() as hooks:
            for path, module in model.named_modules():
                hooks.enter_context(_hook(module, self._enter(path), self._leave(path)))
            with self:
                yield

    def remember(self, tensor: Tensor, node: fx.Node) -> None:
        """From now on `tensor` is what `node` returned."""
        self.known[tensor] = node
        node.meta[SHAPE] = tuple(tensor.shape)
        node.meta[SCOPES] = tuple(self._scopes)

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: object,  # the signature is torch's
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Call `func`, and write it down."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if _name(func) in _ASKING and not isinstance(result, Tensor):
            self.asking.update(self._scopes)
        changed = tensors_in(args[:1]) if _name(func) == "setitem" else tensors_in(result)
        if changed:
            self._write(func, args, kwargs, changed)
        return result

    def _write(
        self,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        changed: list[Tensor],
    ) -> None:
        plain_args = tuple(self._plain(arg) for arg in args)
        plain_kwargs = {key: self._plain(value) for key, value in kwargs.items()}
        if is_layer_function(func):
            node = self.graph.call_function(func, plain_args, plain_kwargs)
        else:
            name = _name(func)
            node = self.graph.create_node("call_method", name, plain_args, plain_kwargs, name)
        for tensor in reversed(changed):
            self.remember(tensor, node)

    def _plain(self, value: Any) -> Any:
        """An argument as a graph can hold it: nodes, containers, simple constants, else None."""
        if isinstance(value, Tensor):
            return self._node(value)
        if isinstance(value, list | tuple):
            return [self._plain(v) for v in value]
        if isinstance(value, dict):
            return {str(key): self._plain(v) for key, v in value.items()}
        return value if isinstance(value, bool | int | float | str) else None

    def _node(self, tensor: Tensor) -> fx.Node:
        if tensor not in self.known:
            name = self._names.get(id(tensor))
            node = (
                self.graph.create_node("get_attr", name)
                if name is not None
                else self.graph.placeholder(f"unseen_{len(self.graph.nodes)}")
            )
            self.remember(tensor, node)
        node = self.known[tensor]
        assert isinstance(node, fx.Node)
        return node

    def _enter(self, path: str) -> Callable[..., None]:
        def enter(*_: object) -> None:
            self._scopes.append(path)

        return enter

    def _leave(self, path: str) -> Callable[..., None]:
        def leave(_module: nn.Module, _args: object, out: object) -> None:
            self._scopes.pop()
            self.runs[path] += out is not None  # there is none where the forward has failed

        return leave


@contextmanager
def _hook(
    module: nn.Module, enter: Callable[..., None], leave: Callable[..., None]
) -> Iterator[None]:
    before = module.register_forward_pre_hook(enter, prepend=True)
    after = module.register_forward_hook(leave, always_call=True)
    try:
        yield
    finally:
        before.remove()
        after.remove()


def _name(func: Callable[..., Any]) -> str:
    """`Tensor.__iadd__` -> "iadd", `Tensor.relu_` -> "relu", the getter of `Tensor.mT` -> "mT"."""
    name = str(getattr(func, "__name__", func))
    if name == "__get__":
        return str(getattr(getattr(func, "__self__", None), "__name__", name))
    name = name.strip("_") if name.startswith("__") else name.rstrip("_")
    return name[1:] if name[:1] == "r" and name[1:] in _REFLECTED else name


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors in a result, whatever containers or dataclasses hold them."""
    return [leaf for leaf in leaves_in(value) if isinstance(leaf, Tensor)]


def leaves_in(value: Any) -> Iterator[Any]:
    """What is in a result, whatever containers or dataclasses hold it."""
    for leaf in pytree.tree_leaves(value):
        if dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
            for field in dataclasses.fields(leaf):
                yield from leaves_in(getattr(leaf, field.name))
        elif isinstance(leaf, Mapping):
            yield from leaves_in(list(leaf.values()))
        else:
            yield leaf
