"""Windows that convolutions and pools move over space: their strides, dilations and pads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from torch import fx

from bnfx.onnx_files.node_call import Call, NoFunction


@dataclass(frozen=True)
class Window:
    """One window, each with a number for each axis of space."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    #: Pads as the node gives them; zeros where they follow from `automatic`.
    before: tuple[int, ...]
    behind: tuple[int, ...]
    #: NOTSET, VALID, SAME_UPPER or SAME_LOWER.
    automatic: str

    @staticmethod
    def of(call: Call, kernel: tuple[int, ...]) -> Window:
        """The window of a node."""
        rank = len(kernel)
        automatic = str(call.attribute("auto_pad", "NOTSET")) or "NOTSET"
        pads = tuple(call.attribute("pads") or ()) if automatic == "NOTSET" else ()
        pads = pads or (0,) * (2 * rank)
        return Window(
            kernel=kernel,
            stride=tuple(call.attribute("strides") or (1,) * rank),
            dilation=tuple(call.attribute("dilations") or (1,) * rank),
            before=pads[:rank],
            behind=pads[rank:],
            automatic=automatic,
        )

    @property
    def extent(self) -> tuple[int, ...]:
        """From the first to the last element that it covers."""
        return tuple((k - 1) * d + 1 for k, d in zip(self.kernel, self.dilation, strict=True))


def pads_of(call: Call, window: Window) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Pads before and behind each axis.

    With SAME an axis of n elements gives ceil(n / stride) results (ONNX, operator Conv), so that
    they depend on n unless the stride is 1.
    """
    if window.automatic in ("NOTSET", "VALID"):
        return window.before, window.behind
    sizes: Sequence[int | None] = [None] * len(window.kernel)
    if any(s != 1 for s in window.stride):
        sizes = call.shape()[2:]
    total = []
    for n, stride, extent in zip(sizes, window.stride, window.extent, strict=True):
        if stride == 1:
            total.append(extent - 1)
        elif n is None:
            raise NoFunction
        else:
            total.append(max(0, (-(-n // stride) - 1) * stride + extent - n))
    small = tuple(n // 2 for n in total)
    large = tuple(n - s for n, s in zip(total, small, strict=True))
    return (small, large) if window.automatic == "SAME_UPPER" else (large, small)


def padded(
    call: Call, source: fx.Node, window: Window, fill: float | None
) -> tuple[fx.Node, tuple[int, ...]]:
    """What the window moves over, and the padding that is left to torch's function.

    Args:
        call: The node.
        source: Its input.
        window: Its window.
        fill: What uneven pads are filled with; None for the elements at the edge.
    """
    before, behind = pads_of(call, window)
    if before == behind and min(before) >= 0:
        return source, before
    widths = [w for pair in reversed(list(zip(before, behind, strict=True))) for w in pair]
    if fill is None:
        return call.part(F.pad, source, tuple(widths), mode="replicate"), (0,) * len(before)
    return call.part(F.pad, source, tuple(widths), value=fill), (0,) * len(before)
