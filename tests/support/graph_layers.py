"""Statements of random networks that hold parameters: affine layers and normalisations."""

from __future__ import annotations

from tests.support.graphs import Writer

GAMMAS = ("plain", "plain", "plain", "mixed", "mixed", "zero", "tiny", "extreme")


def _widths(w: Writer, channels: int) -> tuple[int, int]:
    """Output channels and groups that go with `channels`."""
    out = w.pick((channels, channels, 4, 2 * channels if channels < 5 else 2))
    fitting = [g for g in (1, 1, 1, 2, channels) if channels % g == 0 and out % g == 0]
    return out, w.pick(fitting)


def conv(w: Writer, v: str) -> str:
    """A convolution of any kind; on two or three axes at times without a batch."""
    rank = w.values[v].dim()
    spatial = rank - 1 if rank in (2, 3) and w.chance(50 if rank == 2 else 15) else rank - 2
    if not 1 <= spatial <= 3:
        return linear(w, v)
    channels = w.values[v].shape[-1 - spatial]
    out, groups = _widths(w, channels)
    padding = w.pick(("0", "1", "1", "'same'", "1"))
    same = padding == "'same'"  # not with an even kernel, which makes torch warn
    stride, kernel = (1, w.pick((3, 1))) if same else (w.pick((1, 1, 2)), w.pick((3, 1, 2)))
    mode = w.pick(("zeros", "zeros", "reflect", "replicate", "circular"))
    mode = "zeros" if mode == "reflect" and spatial == 3 else mode
    layer = w.layer(
        f"nn.Conv{spatial}d({channels}, {out}, {kernel}, stride={stride}, "
        f"padding={padding}, dilation={w.pick((1, 1, 1, 2))}, groups={groups}, "
        f"bias={not w.chance(35)}, padding_mode={mode!r})"
    )
    return w.call(layer, v)


def plain_conv(w: Writer, v: str) -> str:
    """A convolution that keeps the shape, or a linear layer: good for residuals."""
    spatial = w.values[v].dim() - 2
    if not 1 <= spatial <= 3:
        return linear(w, v)
    channels, (k, p) = w.values[v].shape[1], w.pick(((1, 0), (3, 1)))
    return w.call(
        w.layer(f"nn.Conv{spatial}d({channels}, {channels}, {k}, padding={p})"),
        v,
    )


def transposed(w: Writer, v: str) -> str:
    """A transposed convolution, grouped or depthwise at times."""
    spatial = w.values[v].dim() - 2
    if not 1 <= spatial <= 3:
        return linear(w, v)
    channels = w.values[v].shape[1]
    out, groups = _widths(w, channels)
    stride, kernel = w.pick((1, 2)), w.pick((2, 3, 1))
    return w.call(
        w.layer(
            f"nn.ConvTranspose{spatial}d({channels}, {out}, {kernel}, stride={stride}, "
            f"padding={w.pick((0, 0, 1))}, output_padding={w.pick((0, stride - 1))}, "
            f"groups={groups}, bias={not w.chance(35)})"
        ),
        v,
    )


def linear(w: Writer, v: str) -> str:
    """A linear layer on the last axis of a tensor of any rank."""
    size = w.values[v].shape[-1]
    out = w.pick((size, 4, 3))
    return w.call(w.layer(f"nn.Linear({size}, {out}, bias={not w.chance(30)})"), v)


def functional_conv(w: Writer, v: str) -> str:
    """F.conv with bare parameters, the bias at times as an addition, the padding as an operator."""
    spatial = w.values[v].dim() - 2
    if not 1 <= spatial <= 3:
        return matmul(w, v)
    channels = w.values[v].shape[1]
    kernel = ", ".join(["3"] * spatial)
    weight = w.layer(f"nn.Parameter(torch.randn(4, {channels}, {kernel}) / 4)")
    bias = w.layer("nn.Parameter(torch.randn(4))")
    pads = w.pick(("1, 1", "2, 0", "0, 2"))
    pads = ", ".join([pads] + ["1, 1"] * (spatial - 1))
    mode = w.pick(("constant", "constant", "replicate", "circular", "constant', value=0.5, mode='"))
    padded = w.add(
        f"F.pad({v}, ({pads}), mode='{mode}')"
        if "value" not in mode
        else (f"F.pad({v}, ({pads}), value=0.5)")
    )
    if w.chance(50):
        return w.add(f"F.conv{spatial}d({padded}, {weight}, {bias})")
    ones = ", 1" * spatial
    return w.add(f"F.conv{spatial}d({padded}, {weight}) + {bias}.view(-1{ones})")


def matmul(w: Writer, v: str) -> str:
    """A product with a parameter, in the spellings that are not F.linear."""
    *_, rows, size = w.values[v].shape
    weight = w.layer(f"nn.Parameter(torch.randn({size}, 4) / 2)")
    bias = w.layer("nn.Parameter(torch.randn(4))")
    left = w.layer(f"nn.Parameter(torch.randn({w.pick((rows, 3))}, {rows}) / 2)")
    pair = w.layer(f"nn.Parameter(torch.randn({rows}, {size}, 3) / 2)")
    return w.add(
        w.pick(
            (
                f"{v} @ {weight}",
                f"torch.matmul({v}, {weight}) + {bias}",
                f"torch.addmm({bias}, {v}, {weight})",
                f"torch.einsum('...i,io->...o', {v}, {weight})",
                f"F.linear({v}, {weight}.t(), {bias})",
                f"{left} @ {v}",
                f"torch.mm({v}, {weight})",
                f"torch.mm({left}, {v})",
                f"torch.addmm({bias}, {v}, {weight}, beta=0.5, alpha=-2)",
                f"torch.einsum('bci,io->bco', {v}, {weight})",
                f"torch.einsum('bci,oc->boi', {v}, {left})",
                f"torch.einsum('bci,cio->bo', {v}, {pair})",
                f"torch.einsum('bci,cio->bco', {v}, {pair})",
                f"{v} @ ({weight} * {bias})",
            )
        )
    )


_COMPUTED = (
    "parametrizations.weight_norm({conv})",
    "parametrizations.spectral_norm({conv})",
    "parametrizations.orthogonal({conv})",
    "pruned({conv})",
    "utils.spectral_norm({conv})",
    "watched({conv})",
    "watched(utils.spectral_norm({conv}))",
)


def odd_affine(w: Writer, v: str) -> str:
    """Layers that look like a convolution and are something else, or compute their weight."""
    spatial, channels = w.values[v].dim() - 2, w.values[v].shape[1]
    if w.chance(60):
        conv = f"nn.Conv{spatial}d({channels}, 4, {w.pick((1, 3))}, padding={w.pick((0, 1))})"
        conv = conv if spatial else f"nn.Linear({channels}, 4)"
        return w.call(w.layer(w.pick(_COMPUTED).format(conv=conv)), v)
    expression = w.pick(
        (
            f"DoubledConv({channels}, 4, 3, padding=1)",
            f"MaskedConv({channels}, 4, 3, padding=1)",
            f"nn.Sequential(nn.Conv2d({channels}, 4, 1), nn.Identity())",
        )
    )
    return w.call(w.layer(expression), v)


def batch_norm(w: Writer, v: str) -> str:
    """BatchNorm in all its variants."""
    shape = w.values[v].shape
    kind = {2: "1d", 3: "1d", 4: "2d", 5: "3d"}[len(shape)]
    options = w.pick(("", "", "", ", affine=False", ", eps=0.3", ", bias=False"))
    gammas, seed = w.pick(GAMMAS), w.rng.randrange(100)
    name = f"nn.BatchNorm{kind}({shape[1]}{options})"
    odd = w.pick(("", "", "", "", "", "", "", "", "sync", "train", "batch", "relu"))
    if odd == "sync":
        name = f"nn.SyncBatchNorm({shape[1]})"
    if odd == "batch":
        name = f"nn.BatchNorm{kind}({shape[1]}, track_running_stats=False)"
    if odd == "relu" and len(shape) == 4:
        name = f"NormRelu({shape[1]})"
    layer = w.layer(f"draw_statistics({name}, {gammas!r}, {seed})")
    if odd == "train":
        w.after.append(f"{layer.replace('self', 'net')}.train()")
    return w.call(layer, v)


def functional_norm(w: Writer, v: str) -> str:
    """F.batch_norm with any subset of gamma and beta; the arithmetic of a frozen BatchNorm."""
    shape = w.values[v].shape
    view = f".view(1, -1{', 1' * (len(shape) - 2)})"
    inner = f"nn.BatchNorm1d({shape[1]})"
    n = w.layer(f"draw_statistics({inner}, {w.pick(GAMMAS)!r}, {w.rng.randrange(100)})")
    statistics = f"{n}.running_mean, {n}.running_var"
    return w.add(
        w.pick(
            (
                f"F.batch_norm({v}, {statistics}, {n}.weight, {n}.bias)",
                f"F.batch_norm({v}, {statistics}, {n}.weight, None, False, 0.1, 0.2)",
                f"F.batch_norm({v}, {statistics}, None, {n}.bias, eps=1e-3)",
                f"F.batch_norm({v}, {statistics})",
                f"({v} - {n}.running_mean{view}) * ({n}.weight * ({n}.running_var + 1e-5).rsqrt())"
                f"{view} + {n}.bias{view}",
                f"{v} * {n}.weight{view} + {n}.bias{view}",
            )
        )
    )


def other_norm(w: Writer, v: str) -> str:
    """Normalisations that depend on the input, and InstanceNorm, which may not."""
    shape = w.values[v].shape
    options: list[str] = [f"nn.LayerNorm({shape[-1]})"]
    if len(shape) > 2 and shape[1] % 2 == 0:
        options.append(f"nn.GroupNorm(2, {shape[1]})")
    if len(shape) in (3, 4, 5):
        kind = f"nn.InstanceNorm{len(shape) - 2}d({shape[1]}, "
        options += [
            f"draw_statistics({kind}affine=True, track_running_stats=True), {w.pick(GAMMAS)!r}, 3)",
            f"draw_statistics({kind}track_running_stats=True), 'plain', 5)",
            f"{kind}affine=True)",
        ]
    return w.call(w.layer(w.pick(options)), v)


def norm_on_last_axis(w: Writer, v: str) -> str:
    """BatchNorm over features, the way that LeViT and friends write it."""
    shape = w.values[v].shape
    seed = w.rng.randrange(100)
    n = w.layer(f"draw_statistics(nn.BatchNorm1d({shape[-1]}), {w.pick(GAMMAS)!r}, {seed})")
    if len(shape) == 3 and w.chance(50):
        return w.add(f"{n}({v}.transpose(1, 2)).transpose(1, 2)")
    return w.add(f"{n}({v}.flatten(0, -2)).reshape_as({v})")


def layer_scale(w: Writer, v: str) -> str:
    """Constants per channel: LayerScale, input normalisation, and their broadcasting traps."""
    shape = w.values[v].shape
    lengths = [f"({shape[1]},{' 1,' * (len(shape) - 2)})", f"({shape[-1]},)", "(1,)"]
    k = w.layer(f"nn.Parameter(torch.rand({w.pick(lengths)}) + 0.5)")
    written = w.pick(
        (f"{v} * {k}", f"{k} * {v}", f"{v} + {k}", f"({v} - 0.3) / {k}", f"{v} / {k}", f"{k} - {v}",
         f"{v}.mul({k})", f"torch.add({v}, {k}, alpha=2)", f"torch.sub({v}, {k}, alpha=0.5)",
         f"torch.rsub({v}, {k})", f"torch.addcmul({k}, {v}, {k})", f"torch.lerp({v}, {k}, 0.25)")
    )  # fmt: skip
    return w.add(written)
