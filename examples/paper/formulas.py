"""Formulas of Ioffe & Szegedy 2015, written out as in the paper, to compare the library with."""

from __future__ import annotations

import torch
from torch import Tensor


def batch_norm_backward(
    x: Tensor, by_y: Tensor, gamma: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the loss with respect to x, gamma and beta (section 3, before Algorithm 2).

    Args:
        x: Inputs of the BatchNorm, (m, features).
        by_y: Gradient of the loss with respect to its outputs, of the same shape.
        gamma: Scale, (features,).
        eps: Added to the variance.
    """
    m = len(x)
    mean, var = x.mean(0), x.var(0, unbiased=False)
    centred, std = x - mean, torch.sqrt(var + eps)
    by_xhat = by_y * gamma
    by_var = (by_xhat * centred).sum(0) * -0.5 * (var + eps) ** -1.5
    by_mean = -by_xhat.sum(0) / std + by_var * (-2 * centred).sum(0) / m
    by_x = by_xhat / std + by_var * 2 * centred / m + by_mean / m
    return by_x, (by_y * centred / std).sum(0), by_y.sum(0)


def population_statistics(batches: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and variance by Algorithm 2: E[x] = E_B[mean_B], Var[x] = m / (m - 1) E_B[var_B].

    Args:
        batches: Inputs of a BatchNorm, one (m, features) for each mini-batch, all of one size.
    """
    m = len(batches[0])
    means = torch.stack([x.mean(0) for x in batches])
    variances = torch.stack([x.var(0, unbiased=False) for x in batches])
    return means.mean(0), m / (m - 1) * variances.mean(0)


def inference_map(
    gamma: Tensor, beta: Tensor, mean: Tensor, var: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Scale and shift of the frozen transform (Algorithm 2, step 11)."""
    scale = gamma / torch.sqrt(var + eps)
    return scale, beta - scale * mean


def largest_difference(a: Tensor, b: Tensor) -> float:
    """Largest |a - b|, relative to the largest |a|."""
    return float(((a - b).abs().max() / a.abs().max()).detach())
