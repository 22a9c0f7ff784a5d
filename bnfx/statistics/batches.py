"""What a data loader yields, as the arguments of a model."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sized
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from bnfx.errors import CalibrationError
from bnfx.graphs.examples import Example


class BatchReader:
    """Turns batches into arguments of a model's forward, on its device and in its dtype.

    A tensor is the first argument. Of a tuple or list, as many leading entries are taken as the
    forward requires (as many as `example` gives): labels behind them are left out. Of a dict, the
    keys that the forward takes; a dict of which it takes no key is the first argument itself.
    """

    def __init__(self, model: nn.Module, example: Example | None = None) -> None:
        self.signature = inspect.signature(model.forward)
        parameters = list(self.signature.parameters.values())
        positional = [
            p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
        ]
        required = sum(p.default is p.empty for p in positional)
        self.names = {p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
        self.takes_any_key = any(p.kind is p.VAR_KEYWORD for p in parameters)
        self.takes = len(example.args) if example is not None and example.args else max(1, required)
        floats = [p for p in (*model.parameters(), *model.buffers()) if p.is_floating_point()]
        self.device = floats[0].device if floats else torch.device("cpu")
        dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()}
        half = dtypes & {torch.float16, torch.bfloat16}
        self.dtype = next(iter(half)) if len(half) == 1 else next(iter(dtypes), None)

    def read(self, batch: Any) -> Example:
        """The arguments for one batch."""
        args, kwargs = self._split(batch)
        args, kwargs = pytree.tree_map(self._place, (args, kwargs))
        return Example(args, kwargs)

    def _split(self, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if isinstance(batch, Mapping):
            known = {str(key): value for key, value in batch.items() if key in self.names}
            if known:
                return (), known
            if self.takes_any_key:
                return (), {str(key): value for key, value in batch.items()}
            return (batch,), {}
        if isinstance(batch, tuple | list):
            if len(batch) == 1 and isinstance(batch[0], Mapping):
                return self._split(batch[0])
            return tuple(batch[: self.takes]), {}
        return (batch,), {}

    def _place(self, leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        return leaf.to(self.device, self.dtype if leaf.is_floating_point() else None)


def with_progress(batches: Iterable[Any], task: str, *, shown: bool = True) -> Iterator[Any]:
    """`batches`, with a progress bar on standard error if that is a terminal.

    Raises:
        CalibrationError: `batches` cannot be iterated over.
    """
    from rich.console import Console
    from rich.progress import track

    if not isinstance(batches, Iterable):
        raise CalibrationError(
            f"batches is a {type(batches).__name__}; give an iterable of batches, such as a "
            "DataLoader or a list of tensors"
        )
    if isinstance(batches, Tensor | Mapping):
        raise CalibrationError(
            f"batches is one {type(batches).__name__}; give an iterable of batches, such as a "
            "list that holds it"
        )
    console = Console(stderr=True)
    if not (shown and console.is_terminal):
        yield from batches
        return
    total = len(batches) if isinstance(batches, Sized) else None
    yield from track(batches, task, total=total, console=console, transient=True)


def refuse_nan(given: Example, where: str) -> None:
    """Raise CalibrationError if an input holds NaN or infinity."""
    for leaf in pytree.tree_leaves((given.args, dict(given.kwargs))):
        if isinstance(leaf, Tensor) and leaf.is_floating_point():
            bad = int((~torch.isfinite(leaf)).sum())
            if bad:
                raise CalibrationError(
                    f"{where}: {bad} of {leaf.numel()} input values are NaN or infinite; clean the "
                    "data, or the statistics of every channel would be lost"
                )
