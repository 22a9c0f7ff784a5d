"""What a model does when it runs: evidence where no graph can be had.

A model whose forward cannot be traced is run once on the example, in eval mode, and the calls of
dropout and local response normalisation are noted, each with the module that made it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from bnfx.capture import Example
from bnfx.errors import CaptureError
from bnfx.operators import function_name

#: Operators that are noted.
NOTED = frozenset(
    (
        *("dropout", "dropout1d", "dropout2d", "dropout3d", "feature_dropout"),
        *("alpha_dropout", "feature_alpha_dropout"),
        *("local_response_norm", "scaled_dot_product_attention"),
    )
)
#: Operators behind which a softmax's result is still that.
SAME_VALUES = frozenset(
    (
        *("to", "type", "type_as", "float", "half", "bfloat16", "double", "contiguous", "clone"),
        *("view", "reshape", "flatten", "unflatten", "unsqueeze", "squeeze", "expand"),
    )
)


@dataclass(frozen=True)
class SeenCall:
    """A call that was seen.

    Attributes:
        function: Name of the operator.
        path: Module in whose forward it was called.
        after_softmax: Whether its input was the result of a softmax: attention, that is.
    """

    function: str
    path: str
    after_softmax: bool


def seen_calls(model: nn.Module, given: Example) -> tuple[SeenCall, ...]:
    """Run `model`, a private copy, in eval mode; the noted calls in the order of execution.

    Raises:
        CaptureError: The model fails on the example.
    """
    model.eval()
    stack = [""]
    with torch.no_grad(), _follow(model, stack), _Notes(stack) as notes:
        try:
            model(*given.args, **given.kwargs)
        except Exception as error:  # a user's forward raises anything
            raise CaptureError(
                f"{type(model).__name__} fails on the example inputs, in "
                f"{stack[-1] or 'its root'}: {type(error).__name__}: {error}"
            ) from error
    return tuple(notes.seen)


@contextmanager
def _follow(model: nn.Module, stack: list[str]) -> Iterator[None]:
    """Keep the path of the module that runs on top of `stack`."""

    def enter(path: str) -> Callable[..., None]:
        return lambda _module, _args: stack.append(path)

    def leave(_module: nn.Module, _args: Any, _output: Any) -> None:
        stack.pop()

    hooks = []
    for path, module in model.named_modules():
        hooks.append(module.register_forward_pre_hook(enter(path), prepend=True))
        hooks.append(module.register_forward_hook(leave))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class _Notes(TorchFunctionMode):
    """Notes calls; what runs inside a noted function is not looked at."""

    def __init__(self, stack: list[str]) -> None:
        super().__init__()
        self.stack = stack
        self.seen: list[SeenCall] = []
        self.softmaxes: list[Tensor] = []  # kept alive, so that `is` tells them apart

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        name = function_name(func)
        given = (*args, *(kwargs or {}).values())
        after = any(known is value for value in given[:1] for known in self.softmaxes)
        if name in NOTED:
            self.seen.append(SeenCall(name, self.stack[-1], after))
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and (
            name in ("softmax", "_softmax") or (after and name in SAME_VALUES)
        ):
            self.softmaxes.append(result)
        return result
