"""The largest parts of a model that can be captured, with what each is given on the example."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from torch import nn

from bnfx.errors import CaptureError
from bnfx.graphs.agreement import outputs
from bnfx.graphs.examples import Example, has_hooks, untouched
from bnfx.graphs.inference import Captured, inference_graph
from bnfx.graphs.norms import holds_norm, is_stock_norm
from bnfx.graphs.observed import SCOPES, Observation, observe
from bnfx.graphs.parameters import attribute


@dataclass(frozen=True)
class Part:
    """A part of the model that could be captured."""

    path: str
    captured: Captured
    #: Paths, in the part, that code outside of it calls or reads.
    outside: frozenset[str]
    #: Whether values that leave a module with a forward of its own stay.
    closed: bool
    #: What it is given when the model runs on the example.
    given: Example | None


class Parts:
    """The largest parts of a model that can be captured, and why others cannot."""

    def __init__(self, root: nn.Module, given: Example | None) -> None:
        self.root, self.given = root, given
        self.closed = _may_hand_out_more(root, given)
        #: Path of each module that could not be captured -> why.
        self.causes: dict[str, str] = {}

    def found(self, apart: str = "") -> Iterator[Part]:
        """Them, outer ones first; where `apart` says why, not the whole, but what is inside."""
        if apart:
            yield from self._inside("", apart)
            return
        try:
            yield from self._captured("", self.given, frozenset())
        except CaptureError as error:
            if self.given is None:
                raise
            yield from self._inside("", str(error))

    def _look(self, path: str, given: Example | None) -> Iterator[Part]:
        module = self.root.get_submodule(path)
        if is_stock_norm(module) or not any(holds_norm(inner) for inner in module.modules()):
            return
        if given is None and self.given is not None:
            return  # the forward did not call it
        try:
            yield from self._captured(path, given, self._used_elsewhere(path))
        except CaptureError as error:
            yield from self._inside(path, str(error))

    def _captured(
        self, path: str, given: Example | None, outside: frozenset[str]
    ) -> Iterator[Part]:
        module = self.root.get_submodule(path)
        asking = self._run is not None and path in self._run.asking
        captured = inference_graph(module, given, exporting=not asking)
        closed = self.closed or _may_hand_out_more(module, given)
        yield Part(path, captured, outside, closed, given)
        slots = dict(module.named_modules(remove_duplicate=False))
        calls = captured.module.graph.find_nodes(op="call_module")
        for inner in dict.fromkeys(str(node.target) for node in calls):
            if inner not in slots:  # the exporter's checks of its inputs
                continue
            if has_hooks(slots[inner]):
                yield from self._each([join(path, inner)])
            else:
                yield from self._inside(join(path, inner), "its forward cannot be traced")

    def _inside(self, path: str, cause: str) -> Iterator[Part]:
        self.causes[path] = cause
        children = self.root.get_submodule(path).named_children()
        yield from self._each([join(path, name) for name, _ in children])

    def _each(self, paths: Sequence[str]) -> Iterator[Part]:
        given = _examples(self.root, self.given, paths)
        for path in paths:
            yield from self._look(path, given.get(path))

    def _used_elsewhere(self, path: str) -> frozenset[str]:
        """Paths of modules and parameters of a part that a run uses while the part does not run."""
        part = self.root.get_submodule(path)
        modules = dict(self.root.named_modules(remove_duplicate=False))
        inner = {id(module) for module in part.modules()} - {id(part)}
        tensors = {id(t) for t in (*part.parameters(), *part.buffers())}
        used: set[int] = set()
        for node in self._run.graph.nodes if self._run is not None else ():
            running = [modules[scope] for scope in node.meta.get(SCOPES, ())]
            if any(module is part for module in running):
                continue
            used |= {id(module) for module in running} & inner
            read = (n for n in node.all_input_nodes if n.op == "get_attr")
            used |= {id(attribute(self.root, str(n.target))) for n in read} & tensors
        names = (
            *part.named_modules(remove_duplicate=False),
            *part.named_parameters(remove_duplicate=False),
            *part.named_buffers(remove_duplicate=False),
        )
        return frozenset(name for name, value in names if id(value) in used)

    def runs(self, path: str) -> bool:
        """Whether the forward calls the module at `path`, as far as the example tells."""
        return self._run is None or self._run.runs[path] > 0

    @functools.cached_property
    def _run(self) -> Observation | None:
        if self.given is None:
            return None
        with untouched(self.root):
            return observe(self.root, self.given, training=False)


def _examples(
    root: nn.Module, given: Example | None, paths: Sequence[str]
) -> Mapping[str, Example]:
    """What the modules at `paths` are given first when the model runs on the example."""
    if given is None:
        return {}
    seen: dict[str, Example] = {}

    def note(path: str) -> Callable[..., None]:
        def first(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if path not in seen:
                seen[path] = Example(args, kwargs).copied()

        return first

    with untouched(root), ExitStack() as hooks:
        for path in paths:
            module = root.get_submodule(path)
            handle = module.register_forward_pre_hook(note(path), with_kwargs=True)
            hooks.callback(handle.remove)
        outputs(root, given)
    return seen


def _may_hand_out_more(module: nn.Module, given: Example | None) -> bool:
    """Whether the forward has arguments that the example does not give: they may ask for more."""
    try:
        parameters = inspect.signature(module.forward).parameters
        bound = inspect.signature(module.forward).bind_partial(
            *(given.args if given is not None else ()),
            **(given.kwargs if given is not None else {}),
        )
    except (TypeError, ValueError):  # the latter from a forward that is no Python
        return True
    required = (
        name
        for name, p in parameters.items()
        if given is None
        and p.default is p.empty
        and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    )
    return bool(parameters.keys() - bound.arguments.keys() - set(required))


def join(path: str, name: str) -> str:
    """`name` below `path`; either may be empty."""
    return ".".join(filter(None, (path, name)))
