"""The operators of ONNX that resample, in float64: Resize, Upsample and RoiAlign.

Every result is a sum of few elements along each axis in turn. Which one is nearest, and what lies
outside, is decided in float32 as runtimes do: one digit more could decide otherwise.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from bnfx.verification.file_calls import Call


def upsample(call: Call, x: Tensor, scales: Tensor | None = None) -> Tensor:
    """Axis by axis, result i lies at i / factor; Resize of opset 10 is the same operator.

    Where an axis shrinks, onnxruntime takes the nearest element behind.
    """
    factors = call["scales"] if scales is None else scales.tolist()
    for axis, factor in enumerate(factors):
        last = x.shape[axis] - 1
        places = (torch.arange(int(x.shape[axis] * factor)) / factor).clamp(max=last).double()
        low = places.floor().long()
        if call["mode"] == "linear":
            share = (places - low).reshape(-1, *[1] * (x.dim() - 1 - axis))
            high = x.index_select(axis, (low + 1).clamp(max=last))
            x = x.index_select(axis, low) * (1 - share) + high * share
        else:
            x = x.index_select(axis, low if factor >= 1 else places.ceil().long())
    return x


@dataclass(frozen=True)
class _Axis:
    """One axis that is resized."""

    axis: int
    #: Its elements, and how many there are to be.
    size: int
    count: int
    scale: float
    #: Where the region to crop begins and ends, in parts of the axis.
    region: tuple[float, float]

    def places(self, mode: str, dtype: torch.dtype) -> Tensor:
        """Where each result lies among the elements (ONNX, operator Resize)."""
        at, scale = torch.arange(self.count, dtype=dtype), torch.tensor(self.scale, dtype=dtype)
        last, begin, end = self.size - 1, *self.region
        if mode == "align_corners":
            return at * last / max(self.count - 1, 1)
        if mode == "asymmetric":
            return at / scale
        if mode == "tf_half_pixel_for_nn":
            return (at + 0.5) / scale
        if mode == "tf_crop_and_resize":
            if self.count == 1:
                return (at + 0.5 * (begin + end)) * last
            return begin * last + at * (end - begin) * last / (self.count - 1)
        if mode == "pytorch_half_pixel" and self.count == 1:
            return at * 0
        if mode == "half_pixel_symmetric":
            adjusted = self.count / (scale * self.size)
            return self.size / 2 * (1 - adjusted) + (at + 0.5) / scale - 0.5
        return (at + 0.5) / scale - 0.5


def resize(
    call: Call,
    x: Tensor,
    roi: Tensor | None = None,
    scales: Tensor | None = None,
    sizes: Tensor | None = None,
) -> Tensor:
    """Opset 10 has two inputs, and is Upsample."""
    if call.opset == 10:
        return upsample(call, x, roi)
    mode, crops = call["coordinate_transformation_mode"], False
    result, outside = x.double() if call["mode"] != "nearest" else x, torch.zeros(())
    for axis in _axes(call, x, roi, scales, sizes):
        coarse = axis.places(mode, torch.float32)
        if mode == "tf_crop_and_resize":
            crops, view = True, (-1, *[1] * (x.dim() - 1 - axis.axis))
            outside = outside + ((coarse < 0) | (coarse > axis.size - 1)).reshape(view)
        at = coarse.double() if call["mode"] == "nearest" else axis.places(mode, torch.float64)
        places, shares = _taps(call, at, axis)
        result = _gathered(result, axis.axis, places, shares)
    if crops:
        value = torch.as_tensor(call["extrapolation_value"], dtype=result.dtype)
        result = torch.where(outside > 0, value, result)
    return result if x.dtype is torch.float64 else result.to(x.dtype)


def _axes(
    call: Call, x: Tensor, roi: Tensor | None, scales: Tensor | None, sizes: Tensor | None
) -> list[_Axis]:
    """The axes that change, with sizes or scales as they are given."""
    axes = [n % x.dim() for n in (call["axes"] or range(x.dim()))]
    given = [x.shape[n] for n in axes]
    if sizes is not None and sizes.numel():
        counts = [int(n) for n in sizes]
        factors = [float(torch.tensor(c) / n) for c, n in zip(counts, given, strict=True)]
        policy = call["keep_aspect_ratio_policy"] or "stretch"
        if policy != "stretch":
            factors = [(min if policy == "not_larger" else max)(factors)] * len(axes)
            counts = [math.floor(f * n + 0.5) for f, n in zip(factors, given, strict=True)]
    else:
        assert scales is not None  # the operator needs one of them
        factors = scales.tolist()
        counts = [math.floor(f * n) for f, n in zip(factors, given, strict=True)]
    whole = [0.0] * len(axes) + [1.0] * len(axes)
    region = roi.tolist() if roi is not None and roi.numel() else whole
    found = []
    for k, axis in enumerate(axes):
        crop = (region[k], region[k + len(axes)])
        found.append(_Axis(axis, given[k], counts[k], factors[k], crop))
    return [a for a in found if a.scale != 1 or a.region != (0.0, 1.0)]


def _taps(call: Call, at: Tensor, axis: _Axis) -> tuple[Tensor, Tensor]:
    """Which elements each result is a sum of, and their shares: (results, elements)."""
    if call["mode"] == "nearest":
        places = _rounded(call["nearest_mode"], at).long()[:, None]
        return places.clamp(0, axis.size - 1), torch.ones_like(places)
    reach = 1 if call["mode"] == "linear" else 2
    stretch = min(axis.scale, 1.0) if call["antialias"] else 1.0
    wide = math.ceil(reach / stretch)
    places = at.floor().long()[:, None] + torch.arange(1 - wide, wide + 1)
    distance = (places - at[:, None]).abs() * stretch
    shares = (1 - distance).clamp(min=0) if reach == 1 else _keys(distance, call["cubic_coeff_a"])
    if call["exclude_outside"]:
        shares = torch.where((places >= 0) & (places < axis.size), shares, 0.0)
    if call["exclude_outside"] or call["antialias"]:
        shares = shares / shares.sum(1, keepdim=True)
    return places.clamp(0, axis.size - 1), shares


def _rounded(mode: str, at: Tensor) -> Tensor:
    if mode == "round_prefer_floor":
        return (at - 0.5).ceil()
    if mode == "round_prefer_ceil":
        return (at + 0.5).floor()
    return at.floor() if mode == "floor" else at.ceil()


def _keys(distance: Tensor, a: float) -> Tensor:
    """Cubic convolution (Keys 1981, equation 15 for any a)."""
    near = ((a + 2) * distance - (a + 3)) * distance**2 + 1
    far = ((a * distance - 5 * a) * distance + 8 * a) * distance - 4 * a
    return torch.where(distance <= 1, near, torch.where(distance < 2, far, 0.0))


def _gathered(x: Tensor, axis: int, places: Tensor, shares: Tensor) -> Tensor:
    """The sums along one axis."""
    if places.shape[1] == 1:
        return x.index_select(axis, places[:, 0])
    shape = list(x.shape)
    shape[axis] = len(places)
    total = x.new_zeros(shape)
    for k in range(places.shape[1]):
        share = shares[:, k].reshape(-1, *[1] * (x.dim() - 1 - axis))
        total += x.index_select(axis, places[:, k]) * share
    return total


def roi_align(call: Call, x: Tensor, rois: Tensor, of: Tensor) -> Tensor:
    """Means or maxima over points within each part of each region (ONNX, operator RoiAlign)."""
    half = call["coordinate_transformation_mode"] == "half_pixel"  # opset 10 has none
    corners = rois * call["spatial_scale"] - (0.5 if half else 0.0)
    found = [_region(call, x[int(n)], c, half=half) for n, c in zip(of, corners, strict=True)]
    shape = (0, x.shape[1], call["output_height"], call["output_width"])
    return torch.stack(found) if found else x.new_zeros(shape)


def _region(call: Call, x: Tensor, corners: Tensor, *, half: bool) -> Tensor:
    """One region of one image; the largest of the four weighted corners is the maximum."""
    parts = (call["output_height"], call["output_width"])
    places, shares, counts = [], [], []
    for k, n in enumerate(parts):
        begin, end = corners[1 - k], corners[3 - k]
        long = end - begin if half else (end - begin).clamp(min=1)
        count = call["sampling_ratio"] or max(math.ceil(float(long) / n), 0)
        at = begin + (torch.arange(n * count) + 0.5) * long / max(n * count, 1)
        low, share = _pair(at, x.shape[1 + k])
        places.append(low)
        shares.append(share)
        counts.append(count)
    y = x[:, places[0]][:, :, :, places[1]]  # (channels, 2, rows, 2, columns)
    y = y * shares[0][:, :, None, None] * shares[1]
    y = y.unflatten(4, (parts[1], counts[1])).unflatten(2, (parts[0], counts[0]))
    inner = (1, 3, 4, 6)
    if call["mode"] == "max":
        return y.amax(inner) if all(counts) else x.new_zeros(len(x), *parts)
    mean: Tensor = y.sum(inner) / max(math.prod(counts), 1)
    return mean


def _pair(at: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The two elements around each place and their shares; none more than one beyond the edge."""
    inside = (at >= -1) & (at <= size)
    at = at.clamp(0, size - 1)
    low = at.floor().long()
    share = at - low
    both = torch.stack((low, (low + 1).clamp(max=size - 1)))
    return both, torch.stack((1 - share, share)) * inside
