"""Statements of random networks without parameters, blocks of several, and the table of all."""

from __future__ import annotations

from collections.abc import Callable

from tests.support import graph_layers as layers
from tests.support.graphs import Writer


def forms(text: str, **names: object) -> list[str]:
    """Expressions of `text`, one a line or several with semicolons between, names filled in."""
    parts = text.format(**names).replace("\n", ";").split(";")
    return [part.strip() for part in parts if part.strip()]


_RELUS = "F.relu({v}); torch.relu({v}); {v}.relu(); {v}.clamp(min=0)"

_ACTIVATIONS = """
    F.leaky_relu({v}, 0.2); F.relu6({v}); F.gelu({v}); F.silu({v}); F.hardswish({v}); F.elu({v})
    torch.sigmoid({v}); torch.tanh({v}); F.hardtanh({v}); F.hardsigmoid({v}); F.softplus({v})
    {v}.softmax(-1); F.softmax({v}, 1); {v}.abs(); torch.clamp({v}, -0.5, 0.7); {v} * ({v} > 0)
    F.threshold({v}, 0.1, 0.0); torch.maximum({v}, torch.zeros_like({v})); F.normalize({v}, dim=1)
    torch.where({v} > 0, {v}, 0.1 * {v}); F.softshrink({v}, 0.2); {v} * F.relu({v})
"""

_ACTIVATION_MODULES = """
    nn.ReLU(); nn.ReLU(inplace=True); nn.PReLU(); nn.PReLU({c}); nn.LeakyReLU(0.1); nn.ReLU6()
    nn.SiLU(inplace=True); nn.GELU(); nn.LeakyReLU(-0.5); nn.Hardtanh(-1.0, 2.0)
"""


def activation(w: Writer, v: str) -> str:
    """An activation, in one of its spellings."""
    channels = w.values[v].shape[1] if w.values[v].dim() > 1 else 1
    if w.chance(35):
        return w.call(w.layer(w.pick(forms(_ACTIVATION_MODULES, c=channels))), v)
    return w.add(w.pick(forms(_RELUS if w.chance(40) else _RELUS + _ACTIVATIONS, v=v)))


_POOLS = """
    F.max_pool{d}d({v}, 2); F.max_pool{d}d({v}, 3, 1, 1); F.max_pool{d}d({v}, 3, 2, 1, 1, True)
    F.avg_pool{d}d({v}, 2); F.avg_pool{d}d({v}, 3, 1, 1); F.avg_pool{d}d({v}, 3, 1, 1, False, False)
    F.avg_pool{d}d({v}, 3, 2, 1, True, True); F.avg_pool{d}d({v}, 3, 2, 0, True, False)
    F.adaptive_avg_pool{d}d({v}, 2); F.adaptive_avg_pool{d}d({v}, 1)
    F.adaptive_max_pool{d}d({v}, 2); {v}.mean({space}); {v}.mean({space}, keepdim=True)
    {v}.amax({space}, keepdim=True); F.interpolate({v}, scale_factor=2); {v}.sum(-1)
    {v}.mean(1, keepdim=True); {v}.amin(1)
"""

_POOLS_2D = """
    F.interpolate({v}, scale_factor=2, mode='bilinear', align_corners=False)
    F.interpolate({v}, size=(3, 3), mode='bicubic', align_corners=True)
    F.interpolate({v}, size=(3, 3), mode='area'); F.lp_pool2d({v}, 2, 2)
    F.interpolate({v}, size=(3, 3), mode='bilinear', antialias=True)
    F.avg_pool2d({v}, 2, divisor_override=3)
"""


def pool(w: Writer, v: str) -> str:
    """Pooling and interpolation."""
    spatial = w.values[v].dim() - 2
    if not 1 <= spatial <= 3:
        return w.add(f"{v}.mean(-1, keepdim=True)")
    space = tuple(range(2, spatial + 2))
    text = _POOLS + _POOLS_2D if spatial == 2 else _POOLS
    return w.add(w.pick(forms(text, v=v, d=spatial, space=space)))


_MOVEMENTS = """
    {v}.flatten(1); {v}.transpose(1, -1); {v}.roll(1, -1); {v}.roll(1, 1); {v}.flip(1); {v}.flip(-1)
    {v}.reshape({v}.shape[0], -1); {v}.unsqueeze(1); {v}.squeeze(); {v}.mT; {v}.contiguous()
    {v}[:, 1:]; {v}[..., :2]; {v}[:, [1, 0, 1]]; {v}[:, -1:]; {v}[:, ::2]; {v}.narrow(1, 1, {half})
    {v}.select(1, 1); {v}.unbind(1)[1]; {v}.index_select(1, torch.tensor([1, 0])); {v}.detach()
    torch.cat([{v}, {v}.flip(1)], 1); torch.cat([{v}[:, {half}:], {v}[:, :{half}]], 1)
    torch.cat({v}.chunk(2, 1)[::-1], 1); {v}.split({half}, 1)[-1]; torch.stack([{v}, {v}], 1)
    {v}.repeat_interleave(2, 1); {v}.tile(2); {v}.clone(); {v}.double(); {v}.to(torch.float64)
    F.dropout({v}, 0.5, self.training); {v}.float().double(); torch.diff({v}, dim=1); {v}.cumsum(1)
    {v}.sort(-1)[0]; F.pad({v}, (1, 1)); F.pad({v}, (0, 0, 1, 0)); {v}.flatten(0, -2)
    {v}.expand(2, *{v}.shape)[1]; {v}.unflatten(1, (2, -1)).flatten(1, 2); {v}.swapaxes(0, 1)
    {v}.view({v}.shape); {v}.flatten(1).reshape({v}.size()); {v}.type_as(x); {v}.to(x.dtype)
    F.pad({v}, (-1, 0)); F.pad({v}, (0, 0)); F.pad({v}, (-1, 1)); F.pad({v}, (0, 0, 0, -1))
"""

_MOVEMENTS_3 = """
    {v}.flatten(2); {v}.flatten(1, 2); {v}.flatten(2).transpose(1, 2); {v}.movedim(1, 2)
    {v}.flatten(2).unflatten(2, {v}.shape[2:])
"""

_MOVEMENTS_4 = """
    {v}.permute(0, 2, 3, 1); {v}.permute(0, 3, 1, 2); F.pad({v}, (1, 0, 2, 1)); {v}.permute(0, 2, 1, 3)
    F.pixel_shuffle({v}, 2); F.pixel_unshuffle({v}, 2); F.channel_shuffle({v}, 2); F.unfold({v}, 2)
    F.unfold({v}, 3, padding=1); {v}.unflatten(1, (2, {half})).transpose(1, 2).flatten(1, 2)
    {v}.reshape(-1, {shape[1]}, {shape[2]} * {shape[3]}); {v}.reshape(-1, {shape[1]} * {shape[2]}, {shape[3]})
    {v}.unflatten(2, (2, -1)).unflatten(4, (2, -1)).permute(0, 2, 4, 3, 5, 1)
    {v}.unflatten(2, (2, -1)).permute(0, 2, 1, 3, 4).flatten(0, 1)
"""  # noqa: E501  # one expression


def movement(w: Writer, v: str) -> str:
    """Operators that only move data, or look as if they did."""
    shape = tuple(w.values[v].shape)
    half = max(shape[1] // 2, 1) if len(shape) > 1 else 1
    text = _MOVEMENTS + (_MOVEMENTS_3 if len(shape) > 2 else "")
    text += _MOVEMENTS_4 if len(shape) == 4 else ""
    return w.add(w.pick(forms(text, v=v, half=half, shape=shape)))


_MERGES = """
    {v} + {o}; {v} - {o}; torch.add({v}, {o}, alpha=0.5); 0.5 * {v} + {o}; {v} + 0 + {o}
    torch.cat([{v}, {o}], 1); torch.cat([{v}, {o}], -1); torch.stack([{v}, {o}]).sum(0)
    {v} * {o}; {v} * torch.sigmoid({o}); {v} / (1 + {o}.abs()); {v} + {o}.mean(-1, keepdim=True)
    torch.maximum({v}, {o}); torch.minimum({v}, {o}) - {v}; {v} + {o}.flip(1); sum([{v}, {o}])
    torch.sub({v}, {o}, alpha=2); {v} * {o}.amax(-1, keepdim=True); torch.lerp({v}, {o}, 0.3)
    {v}.softmax(-1) @ {o}.mT; F.scaled_dot_product_attention({v}, {v}, {o})
    {v} @ {o}.softmax(-1).mT; torch.where({o} > 0, {v}, {o}); {v}.masked_fill({o} > 0, 0.0)
    torch.outer({v}[0], {o}[0])
"""


def merge(w: Writer, v: str) -> str:
    """Two values become one."""
    other = w.pick(w.alike(v)[1:] or [v])
    return w.add(w.pick(forms(_MERGES, v=v, o=other)))


_SCALARS = """
    {v} * 2; {v} + 1; 1 - {v}; {v} / 3; -{v}; {v} * 0.5 + 0.25; {v}.mul(-1); {v} ** 2
    torch.rsub({v}, 2); torch.neg({v}); {v}.negative(); torch.rsub({v}, 1, alpha=2)
"""


def scalar(w: Writer, v: str) -> str:
    """Arithmetic with numbers."""
    return w.add(w.pick(forms(_SCALARS, v=v)))


def again(w: Writer, v: str) -> str:
    """A layer that was called before, called on something else, under its name or another."""
    layer = w.pick(w.calls)
    if w.chance(30):
        twin = w.layer(layer)
        return w.call(twin, v)
    return w.call(layer, v)


def tied(w: Writer, v: str) -> str:
    """The same kind of layer with one Parameter, or the statistics, of another."""
    first = w.call(w.layer(f"nn.Linear({w.values[v].shape[-1]}, {w.values[v].shape[-1]})"), v)
    second = w.layer(f"nn.Linear({w.values[v].shape[-1]}, {w.values[v].shape[-1]})")
    w.init(f"{second}.{w.pick(('weight', 'bias'))} = {w.calls[-1]}.{w.pick(('weight', 'bias'))}")
    return w.call(second, first)


_PEEKS = """
    {v} * {l}.weight.norm(); {v} + {l}.bias.sum(); {v} + {l}.running_mean.mean()
    {v} + {l}.running_mean; F.linear({v}, {l}.weight.t()); {v} * {l}.running_var.max()
    {v} + {l}.weight.mean()
"""


def peek(w: Writer, v: str) -> str:
    """Parameters and buffers of a layer read where one doesn't expect it."""
    return w.add(w.pick(forms(_PEEKS, v=v, l=w.pick(w.calls))))


def alias(w: Writer, v: str) -> str:
    """Writes in place: to a value, to a view of it, or to the value behind a view."""
    form = w.pick(range(8))
    if form < 3:
        text = (f"{v}.add_(1)", f"{v}.mul_(0.5)", f"{v} += 1")[form]
        w.change(text, v)
        return v
    if form == 3:
        w.change(f"{v}[:, :1].mul_(2)", v)
        return v
    if form == 4:
        w.change(f"{v}[:, 0] = 0.5", v)
        return v
    view = w.add(w.pick((f"{v}.view(-1)", f"{v}.transpose(1, -1)", f"{v}[:, :1]", f"{v}.detach()")))
    if form == 5:
        w.change(f"{v} += 1", v)
    if form == 6:
        w.change(f"{view}.relu_()", view)
    if form == 7:
        w.change(f"F.relu_({v})", v)
    w.unread += [name for name in (v, view) if name not in w.unread]
    return view


def residual(w: Writer, v: str) -> str:
    """A residual block, activation before or after, branch scaled or not."""
    u = layers.batch_norm(w, v) if w.chance(60) else v
    u = w.add(f"F.relu({u})") if w.chance(70) else u
    u = layers.plain_conv(w, u)
    u = layers.batch_norm(w, u) if w.chance(40) else u
    if w.chance(30):
        u = layers.layer_scale(w, u)
    return w.add(w.pick((f"{v} + {u}", f"{u} + {v}", f"{v} - {u}", f"F.relu({v} + {u})")))


def branches(w: Writer, v: str) -> str:
    """Parallel linear branches that are added, as RepVGG has them."""
    found = [
        layers.batch_norm(w, layers.plain_conv(w, v)) if w.chance(80) else layers.plain_conv(w, v)
        for _ in range(w.pick((2, 3)))
    ]
    found += [layers.batch_norm(w, v)] if w.chance(50) else [v] if w.chance(30) else []
    return w.add(w.pick((" + ".join(found), f"F.relu({' + '.join(found)})", " + 0 + ".join(found))))


def sequence(w: Writer, v: str) -> str:
    """Linear maps behind each other, beside the identity at times, as re-parameterised blocks."""
    spatial = w.values[v].dim() - 2
    if not 1 <= spatial <= 3:
        return layers.linear(w, layers.linear(w, v))
    channels, (size, pad) = w.values[v].shape[1], w.pick(((1, 0), (3, 1), (3, 0)))
    wide = 2 * channels if channels < 5 else channels
    u = w.call(w.layer(f"nn.Conv{spatial}d({channels}, {wide}, 1, bias={w.chance(30)})"), v)
    if w.chance(30):
        u = w.add(f"F.avg_pool{spatial}d({u}, 3, 1, 1)")
    u = layers.batch_norm(w, u) if w.chance(30) else u
    u = w.call(w.layer(f"nn.Conv{spatial}d({wide}, {channels}, {size}, padding={pad})"), u)
    return w.add(f"{u} + {v}") if size == 2 * pad + 1 and w.chance(50) else u


def dense(w: Writer, v: str) -> str:
    """A DenseNet's layer: what was computed is kept beside what is new."""
    u = w.add(f"F.relu({layers.batch_norm(w, v)})") if w.chance(70) else layers.batch_norm(w, v)
    u = layers.plain_conv(w, u)
    joined = w.add(f"torch.cat([{v}, {u}], 1)")
    return layers.batch_norm(w, joined)


def gate(w: Writer, v: str) -> str:
    """Squeeze and excite."""
    spatial = tuple(range(2, w.values[v].dim()))
    pooled = w.add(f"{v}.mean({spatial}, keepdim=True)")
    u = w.add(f"torch.sigmoid({layers.plain_conv(w, pooled)})")
    return w.add(w.pick((f"{v} * {u}", f"{u} * {v}", f"{v} * {u} + {v}")))


def conv_norm(w: Writer, v: str) -> str:
    """What everyone folds."""
    kind = w.pick((layers.conv, layers.conv, layers.transposed, layers.functional_conv))
    return layers.batch_norm(w, kind(w, v))


def norm_conv(w: Writer, v: str) -> str:
    """What few fold, with or without something between."""
    u = layers.batch_norm(w, v)
    between = w.pick((None, None, movement, pool, activation))
    u = between(w, u) if between is not None else u
    return w.pick((layers.conv, layers.linear, layers.transposed, layers.functional_conv))(w, u)


#: Weight and statement; the simplest first, towards which hypothesis shrinks.
MOVES: tuple[tuple[int, Callable[[Writer, str], object]], ...] = (
    (6, layers.batch_norm),
    (6, conv_norm),
    (3, activation),
    (4, norm_conv),
    (3, residual),
    (3, pool),
    (4, movement),
    (4, merge),
    (2, branches),
    (2, sequence),
    (2, dense),
    (1, gate),
    (2, layers.conv),
    (1, layers.plain_conv),
    (1, layers.transposed),
    (2, layers.linear),
    (1, layers.functional_conv),
    (2, layers.matmul),
    (2, layers.odd_affine),
    (2, layers.functional_norm),
    (1, layers.other_norm),
    (2, layers.norm_on_last_axis),
    (2, layers.layer_scale),
    (1, scalar),
    (2, again),
    (1, tied),
    (1, peek),
    (2, alias),
)
