"""Random small networks as source code: what a person might write, and what a fold must survive.

A network is drawn statement by statement. Each statement runs at once on real tensors, so that the
next one knows the shapes, and one that torch refuses is taken back. The only source of chance is
the `random.Random` given: a seed reproduces a network, and hypothesis, which has a `Random` of its
own, shrinks one. What comes out prints as a Python module that builds it.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

T = TypeVar("T")

_REFUSALS = (RuntimeError, ValueError, LookupError, TypeError, AttributeError)
#: A variable of a forward.
NAME = re.compile(r"\b(?:v\d+|x|y)\b")


class NormRelu(nn.BatchNorm2d):
    """A BatchNorm whose forward does more than its name says."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(super().forward(x))


class DoubledConv(nn.Conv2d):
    """A convolution with a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class MaskedConv(nn.Conv2d):
    """A convolution that computes its weight."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight * (self.weight.abs() > 0.1)
        return F.conv2d(x, weight - weight.mean(), self.bias, self.stride, self.padding)


def pruned(module: nn.Module) -> nn.Module:
    """`module` with a mask on its weight."""
    with torch.no_grad():  # or no copy of it could be made
        prune.l1_unstructured(module, "weight", 0.4)
    return module


def watched(module: nn.Module) -> nn.Module:
    """`module` with a hook that only looks."""
    module.register_forward_hook(looks)
    return module


def looks(_module: nn.Module, _inputs: Any, _output: Any) -> None:
    """Nothing is changed."""


def draw_statistics(norm: nn.Module, gammas: str, seed: int) -> nn.Module:
    """`norm` with random running statistics, beta, and gammas of the kind named."""
    generator = torch.Generator().manual_seed(seed)

    def normal(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator)

    with torch.no_grad():
        state: dict[str, Tensor] = {**dict(norm.named_parameters()), **dict(norm.named_buffers())}
        for name in ("running_mean", "bias"):
            if name in state:
                state[name].copy_(normal(state[name]))
        if "running_var" in state:
            uniform = torch.rand(state["running_var"].shape, generator=generator)
            state["running_var"].copy_(uniform + 0.5)
        if "weight" in state:
            gamma = normal(state["weight"]).abs() + 0.1
            sign = torch.sign(normal(gamma)) if gammas in ("mixed", "extreme") else 1.0
            if gammas == "zero":
                gamma[seed % len(gamma)] = 0.0
            if gammas == "tiny":
                gamma[:: 1 + seed % 2] *= 1e-5
            if gammas == "extreme":
                gamma[:: 1 + seed % 2] *= 1e3
            state["weight"].copy_(sign * gamma)
    return norm


#: What the source of a network may name.
NAMESPACE: dict[str, Any] = {
    "torch": torch,
    "nn": nn,
    "F": F,
    "parametrizations": parametrizations,
    "pruned": pruned,
    "utils": nn.utils,
    "NormRelu": NormRelu,
    "DoubledConv": DoubledConv,
    "MaskedConv": MaskedConv,
    "watched": watched,
    "draw_statistics": draw_statistics,
}

_TEMPLATE = """\
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn import utils
from torch.nn.utils import parametrizations

from tests.support.graphs import (
    DoubledConv,
    MaskedConv,
    NormRelu,
    draw_statistics,
    pruned,
    watched,
)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed({seed})
{layers}

    def forward(self, {arguments}):
{lines}
        return {result}


def build():
    net = Net().double().eval()
{after}
    return net


inputs = [torch.randn(shape, dtype=torch.float64) for shape in {shapes}]
"""


def _block(lines: Iterable[str], depth: int) -> str:
    indented = [" " * 4 * depth + line for line in lines]
    return "\n".join(indented) or " " * 4 * depth + "pass"


@dataclass(frozen=True)
class Sample:
    """A network as text, and the shapes of its inputs.

    Attributes:
        seed: Of its weights.
        layers: Statements of `__init__`.
        lines: Statements of `forward`.
        result: What `forward` returns.
        after: Statements on `net` once it is in eval mode.
        shapes: Shapes of the inputs.
        batched: Whether axis 0 of every input is a batch.
    """

    seed: int
    layers: tuple[str, ...]
    lines: tuple[str, ...]
    result: str
    after: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    batched: bool

    def __repr__(self) -> str:
        return "\n" + self.source()

    def source(self) -> str:
        """A Python module with `build()` and `inputs`."""
        return _TEMPLATE.format(
            seed=self.seed,
            layers=_block(self.layers, 2),
            arguments=", ".join("xy"[: len(self.shapes)]),
            lines=_block(self.lines, 2),
            result=self.result,
            after=_block(self.after, 1),
            shapes=self.shapes,
        )

    def build(self) -> nn.Module:
        """The network, in float64 and eval mode."""
        namespace: dict[str, Any] = {}
        exec(compile(self.source(), "<random network>", "exec"), namespace)
        net = namespace["build"]()
        assert isinstance(net, nn.Module)
        return net

    def inputs(self, batch: int | None = None) -> tuple[Tensor, ...]:
        """Inputs in float64, with another batch size on demand."""
        generator = torch.Generator().manual_seed(self.seed)
        shapes = [s if batch is None else (batch, *s[1:]) for s in self.shapes]
        return tuple(torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)


@dataclass
class Writer:
    """Writes a network line by line and runs each line as it goes."""

    rng: random.Random
    layers: list[str] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    after: list[str] = field(default_factory=list)
    values: dict[str, Tensor] = field(default_factory=dict)
    unread: list[str] = field(default_factory=list)
    calls: list[str] = field(default_factory=list)  # layers that were called, as "self.l3"
    root: nn.Module = field(default_factory=nn.Module)
    count: int = 0

    def pick(self, options: Sequence[T]) -> T:
        """One of `options`; the first is the simplest."""
        return options[self.rng.randrange(len(options))]

    def chance(self, percent: int) -> bool:
        """Whether something of this probability happens; hypothesis shrinks towards no."""
        return self.rng.randrange(100) >= 100 - percent

    def layer(self, expression: str) -> str:
        """A new attribute of the network, as "self.l3"."""
        self.count += 1
        name = f"self.l{self.count}"
        self.init(f"{name} = {expression}")
        return name

    def init(self, line: str) -> None:
        """A statement of `__init__`."""
        exec(line, NAMESPACE | {"self": self.root})
        self.root.double().eval()
        self.layers.append(line)

    def call(self, layer: str, value: str) -> str:
        """The variable that holds `layer(value)`."""
        self.calls.append(layer)
        return self.add(f"{layer}({value})")

    def add(self, expression: str) -> str:
        """A new variable of the forward."""
        self.count += 1
        name = f"v{self.count}"
        self.line(f"{name} = {expression}")
        return name

    def line(self, text: str) -> None:
        """A statement of the forward, which is run here and now."""
        scope = NAMESPACE | {"self": self.root} | self.values
        with torch.no_grad():
            exec(text, scope)
        names = set(NAME.findall(text))
        read = [name for name in self.unread if name not in names]
        new = [n for n in scope if n not in self.values and NAME.fullmatch(n)]
        if any(not _small(scope[name]) for name in names):
            raise ValueError(f"{text}: too large, or not a float64 tensor")
        self.unread[:] = read + sorted(new)
        self.values.update({name: scope[name] for name in names})
        self.lines.append(text)

    def change(self, text: str, value: str) -> None:
        """A statement that writes to `value`, which stays to be read."""
        self.line(text)
        self.unread.append(value)

    def alike(self, name: str) -> list[str]:
        """Variables of the same shape, `name` itself first, then the latest."""
        shape = self.values[name].shape
        others = [n for n in reversed(self.values) if n != name and self.values[n].shape == shape]
        return [name, *others]

    def tried(self, move: Callable[[Writer, str], object], value: str) -> bool:
        """Carry out a move as a whole, or take it back where torch refuses it."""
        lists = (self.layers, self.lines, self.after, self.unread, self.calls)
        lengths, values = [list(each) for each in lists], dict(self.values)
        try:
            move(self, value)
        except _REFUSALS:
            for each, before in zip(lists, lengths, strict=True):
                each[:] = before
            self.values = values
            return False
        return True


def _small(value: object) -> bool:
    return (
        isinstance(value, Tensor)
        and value.dtype is torch.float64
        and 0 < value.numel() <= 20_000
        and bool(value.isfinite().all())
    )


#: Shapes of inputs, and whether axis 0 is a batch. Width often equals the number of channels.
SHAPES: tuple[tuple[tuple[int, ...], bool], ...] = (
    ((2, 4, 6, 6), True),
    ((2, 4, 5, 4), True),
    ((4, 4, 4, 4), True),
    ((3, 6, 7), True),
    ((4, 4, 4), True),
    ((3, 4), True),
    ((4, 4), True),
    ((2, 3, 5, 4), True),
    ((2, 2, 4, 4, 4), True),
    ((4, 6, 6), False),
    ((4, 5), False),
)


def random_network(
    rng: random.Random, moves: Sequence[tuple[int, Callable[[Writer, str], object]]]
) -> Sample:
    """A network of a few statements, drawn from `moves` by weight."""
    w = Writer(rng)
    shape, batched = w.pick(SHAPES)
    shapes = (shape, shape) if w.chance(10) else (shape,)
    for name, each in zip("xy", shapes, strict=False):
        w.values[name] = torch.randn(each, dtype=torch.float64)
        w.unread.append(name)
    if w.chance(30):  # symbolic tracing stops here, so that the graph comes from torch.export
        w.lines += [f"if x.dim() != {len(shape)}:", "    raise ValueError(x.shape)"]
    table = [move for weight, move in moves for _ in range(weight)]
    for _ in range(w.pick((2, 3, 4, 5, 6, 8, 10))):
        latest = list(w.values)[-1]
        value = w.pick([latest, latest, *reversed(w.values)]) if w.chance(30) else latest
        w.tried(w.pick(table), value)
    return Sample(
        seed=rng.randrange(1000),
        layers=tuple(w.layers),
        lines=tuple(w.lines),
        result=_result(w),
        after=tuple(w.after),
        shapes=shapes,
        batched=batched,
    )


def _result(w: Writer) -> str:
    """All that nobody read, so that nothing is dead; at times something more."""
    names = [name for name in w.unread if name not in "xy"] or [list(w.values)[-1]]
    if w.chance(15):
        names.append(w.pick(list(reversed(w.values))))
    if len(names) == 1:
        return names[0]
    if w.chance(10):
        return "{" + ", ".join(f"{name!r}: {name}" for name in dict.fromkeys(names)) + "}"
    return ", ".join(names)
