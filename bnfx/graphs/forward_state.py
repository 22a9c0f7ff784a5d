"""What a forward reads and leaves behind besides its arguments: no graph has a place for that."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn

if TYPE_CHECKING:
    from bnfx.graphs.tracing import Tracer

#: A state of a module: its own attributes, and its tables of buffers and parameters.
_State = tuple[dict[str, Any], ...]


def stateless(tracer: Tracer, model: nn.Module) -> fx.Graph:
    """A trace of a forward that keeps nothing from one call for the next.

    A graph has no place for that: it would compute what the first call does, for ever. What is
    kept and never read (the last attention weights, say) does no harm.
    """
    if "forward" in vars(model):
        raise fx.proxy.TraceError("it is an attribute of the object, not of its class")
    with attributes_kept(model) as before:
        graph = tracer.trace(model)
        changed = {
            (f"{path}.{key}" if path else key): (old[key], now[key])
            for path, module in model.named_modules()
            for now, old in zip(_tables(module), before.get(module, ()), strict=False)
            for key in old
            if key in now and now[key] is not old[key]
        }
        read = {str(node.target) for node in graph.nodes if node.op == "get_attr"}
        kept = next((name for name in changed if name in read), None)
        numbers = [
            name
            for name, (old, now) in changed.items()
            if isinstance(old, int | float) and isinstance(now, int | float) and old != now
        ]
        if numbers and kept is None:
            again = type(tracer)(tracer.opaque, tracer.given).trace(model)
            kept = None if str(again) == str(graph) else numbers[0]
    if kept is not None:
        raise fx.proxy.TraceError(
            f"it assigns to {kept!r}, which its next call reads; make that a buffer written in "
            "place, or pass it in and out"
        )
    return graph


@contextmanager
def attributes_kept(model: nn.Module) -> Iterator[dict[nn.Module, _State]]:
    """Put back, at the end, what a forward assigns to attributes; their values at the start.

    Run on proxies or on fake tensors, it would leave these behind in the model. Attributes that
    are new stay, unless they are proxies: torch.fx keeps constants in some.
    """
    before = {m: tuple(dict(table) for table in _tables(m)) for m in model.modules()}
    try:
        yield before
    finally:
        for module, tables in before.items():
            for now, old in zip(_tables(module), tables, strict=True):
                new = [key for key in now if key not in old and isinstance(now[key], fx.Proxy)]
                for key in new:
                    del now[key]
                now.update({key: old[key] for key in old if now.get(key) is not old[key]})


def _tables(module: nn.Module) -> _State:
    return vars(module), module._buffers, module._parameters


@contextmanager
def nothing_drawn() -> Iterator[None]:
    """Refuse tracing that draws random numbers: the graph would hold them for constants.

    The global generators are as before then.
    """
    before = torch.get_rng_state(), random.getstate()
    try:
        yield
        if not torch.equal(torch.get_rng_state(), before[0]) or random.getstate() != before[1]:
            raise fx.proxy.TraceError("it draws random numbers, which a graph would hold fixed")
    except Exception:
        torch.set_rng_state(before[0])
        random.setstate(before[1])
        raise


def autocast_state() -> list[tuple[bool, torch.dtype]]:
    """Whether autocast is on, and to what, by kind of device."""
    kinds = ("cpu", "cuda")
    return [(torch.is_autocast_enabled(k), torch.get_autocast_dtype(k)) for k in kinds]
