"""The recurrent layers of ONNX in float64: LSTM, GRU and RNN with all that they can be told."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from bnfx.verification.file_calls import Call, Computed

#: Activations of recurrent layers: how many constants each takes, their defaults, the function.
_ACTIVATIONS: Mapping[str, tuple[tuple[float, ...], Callable[..., Tensor]]] = {
    "relu": ((), torch.relu),
    "tanh": ((), torch.tanh),
    "sigmoid": ((), torch.sigmoid),
    "softsign": ((), F.softsign),
    "softplus": ((), lambda x: torch.logaddexp(x, torch.zeros_like(x))),
    "affine": ((1.0, 0.0), lambda x, a, b: a * x + b),
    "leakyrelu": ((0.01,), lambda x, a: torch.where(x < 0, a * x, x)),
    "thresholdedrelu": ((1.0,), lambda x, a: torch.where(x > a, x, 0.0)),
    "scaledtanh": ((1.0, 1.0), lambda x, a, b: a * torch.tanh(b * x)),
    "hardsigmoid": ((0.2, 0.5), lambda x, a, b: (a * x + b).clamp(0, 1)),
    "elu": ((1.0,), lambda x, a: torch.where(x < 0, a * torch.expm1(x), x)),
}
Activation = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class _Cell:
    """One direction of a recurrent layer."""

    call: Call
    functions: Sequence[Activation]
    weight: Tensor
    #: Of the state; that of the input is in what it is given.
    bias: Tensor
    peepholes: Tensor


def _lstm(cell: _Cell, gates: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, ...]:
    """Gates in the order input, output, forget, cell (ONNX, operator LSTM)."""
    f, g, hidden = cell.functions
    i, o, forget, new = (gates + h @ cell.weight.T + cell.bias).chunk(4, -1)
    p_i, p_o, p_f = cell.peepholes.chunk(3)
    i = f(i + p_i * c)
    forget = 1 - i if cell.call["input_forget"] else f(forget + p_f * c)
    c = forget * c + i * g(new)
    return f(o + p_o * c) * hidden(c), c


def _gru(cell: _Cell, gates: Tensor, h: Tensor) -> tuple[Tensor, ...]:
    """Gates in the order update, reset, hidden (ONNX, operator GRU)."""
    f, g = cell.functions
    both = 2 * h.shape[-1]
    weight, bias = cell.weight.T, cell.bias
    update, reset = f(gates[:, :both] + h @ weight[:, :both] + bias[:both]).chunk(2, -1)
    if cell.call["linear_before_reset"]:
        kept = reset * (h @ weight[:, both:] + bias[both:])
    else:
        kept = (reset * h) @ weight[:, both:] + bias[both:]
    return ((1 - update) * g(gates[:, both:] + kept) + update * h,)


def _rnn(cell: _Cell, gates: Tensor, h: Tensor) -> tuple[Tensor, ...]:
    return (cell.functions[0](gates + h @ cell.weight.T + cell.bias),)


def _activations(call: Call, default: Sequence[str], directions: int) -> list[list[Activation]]:
    """The functions of each direction; the gates that they are given are clipped first.

    What an LSTM's third is given, the cell, is no gate: so onnxruntime reads the operator's text.
    """
    names = call["activations"] or list(default) * directions
    alphas, betas = (iter(call[f"activation_{name}"] or ()) for name in ("alpha", "beta"))
    made = []
    for i, name in enumerate(names):
        defaults, function = _ACTIVATIONS[name.lower()]
        own = [next(given, d) for given, d in zip((alphas, betas), defaults, strict=False)]
        gate = i % len(default) < 2
        made.append(_clipped(function, own, call["clip"] or math.inf if gate else math.inf))
    return [made[i : i + len(default)] for i in range(0, len(made), len(default))]


def _clipped(function: Callable[..., Tensor], own: Sequence[float], clip: float) -> Activation:
    return lambda x: function(x.clamp(-clip, clip), *own)


def _recurrent(
    step: Callable[..., tuple[Tensor, ...]], default: Sequence[str], states: int
) -> Callable[..., Computed]:
    """A recurrent layer: directions, sequences of several lengths, initial states."""

    def computed(call: Call, x: Tensor, w: Tensor, r: Tensor, *more: Tensor | None) -> Computed:
        bias, lengths, h, c, peepholes = [*more, None, None, None, None, None][:5]
        batch_first = call["layout"] == 1
        x = x.transpose(0, 1) if batch_first else x
        initial = [s if s is None or not batch_first else s.transpose(0, 1) for s in (h, c)]
        (steps, batch), (directions, rows, _) = x.shape[:2], w.shape
        size = r.shape[-1]
        long = torch.full((batch,), steps) if lengths is None else lengths.long()
        functions = _activations(call, default, directions)
        results = []
        for d in range(directions):
            both = x.new_zeros(2 * rows) if bias is None else bias[d]
            holes = x.new_zeros(3 * size) if peepholes is None else peepholes[d]
            cell = _Cell(call, functions[d], r[d], both[rows:], holes)
            order = _order(long, steps, backward=call["direction"] == "reverse" or d == 1)
            gates = x.gather(0, order.expand_as(x)) @ w[d].T + both[:rows]
            state = [x.new_zeros(batch, size) if s is None else s[d] for s in initial[:states]]
            outs = []
            for t in range(steps):
                goes_on = (t < long)[:, None]
                new = step(cell, gates[t], *state)
                state = [torch.where(goes_on, a, b) for a, b in zip(new, state, strict=True)]
                outs.append(torch.where(goes_on, new[0], 0.0))
            y = torch.stack(outs)
            results.append([torch.zeros_like(y).scatter(0, order.expand_as(y), y), *state])
        every, *last = (torch.stack(parts) for parts in zip(*results, strict=True))
        if batch_first:
            return (every.permute(2, 1, 0, 3), *(s.transpose(0, 1) for s in last))
        return (every.transpose(0, 1), *last)

    return computed


def _order(long: Tensor, steps: int, *, backward: bool) -> Tensor:
    """Place that each step takes of each sequence; backwards from its own end."""
    t = torch.arange(steps)[:, None].expand(steps, len(long))
    return (torch.where(t < long, long - 1 - t, t) if backward else t)[..., None]


lstm = _recurrent(_lstm, ("Sigmoid", "Tanh", "Tanh"), 2)
gru = _recurrent(_gru, ("Sigmoid", "Tanh"), 1)
rnn = _recurrent(_rnn, ("Tanh",), 1)
