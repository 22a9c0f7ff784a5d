"""Which calls of a model's methods the operators of a graph stand in.

A class has methods beside `forward` (`forward_features`, `encode_image`). While a model is captured
each call of one opens a frame, and every node that is made inside carries it.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import fx, nn
from torch.fx import traceback

#: node.meta key: the calls of methods inside of which a node was made; no two have one name.
_FRAMES = "bnfx_frames"


def frames_of(node: fx.Node) -> frozenset[str]:
    """The calls of methods inside of which a node was made; no two have one name."""
    return frozenset(node.meta.get(_FRAMES, ()))


def note_frames(node: fx.Node) -> None:
    """Let a node that symbolic tracing has just made have the frames that are open."""
    if opened := _opened():
        node.meta[_FRAMES] = opened


def take_frames(graph: fx.Graph) -> None:
    """Let the nodes that torch.export made have the frames that it annotated them with.

    Nothing else of the annotations stays: it made them for its own tracing.
    """
    for node in graph.nodes:
        node.meta[_FRAMES] = node.meta.pop("custom", {}).get(_FRAMES, ())


@contextmanager
def methods_noted(model: nn.Module) -> Iterator[None]:
    """Inside, calls of public methods of the modules of `model`, a private copy, open frames.

    torch.export hands them to the nodes that it makes under `preserve_node_meta`.
    """
    wrapped = [
        (module, name, f"{path}.{name}".lstrip("."))
        for path, module in model.named_modules()
        for name in _methods(type(module))
        if name not in vars(module)
    ]
    for module, name, frame in wrapped:
        vars(module)[name] = _noted(getattr(module, name), frame)
    try:
        yield
    finally:
        for module, name, _ in wrapped:
            del vars(module)[name]


def _methods(kind: type[nn.Module]) -> Sequence[str]:
    """Names of the public methods that users gave a class, beside forward."""
    own = [k for k in kind.__mro__ if not f"{k.__module__}.".startswith(("torch.", "builtins."))]
    names = dict.fromkeys(
        name for k in own for name, value in vars(k).items() if inspect.isfunction(value)
    )
    return [
        name
        for name in names
        if not name.startswith("_") and name != "forward" and name not in vars(nn.Module)
    ]


def _noted(method: Callable[..., Any], name: str) -> Callable[..., Any]:
    calls = 0

    @functools.wraps(method)
    def noted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        with traceback.annotate({_FRAMES: (*_opened(), f"{name}#{calls}")}):
            return method(*args, **kwargs)

    return noted


def _opened() -> tuple[str, ...]:
    found: tuple[str, ...] = traceback.get_current_meta().get("custom", {}).get(_FRAMES, ())
    return found
