"""Mean and variance per channel of data that comes in batches.

    n = n1 + n2,  d = m2 - m1,  m = m1 + d n2/n,  M2 = M2_1 + M2_2 + d^2 n1 n2 / n

(Chan, Golub, LeVeque: Updating formulae and a pairwise algorithm for computing sample variances,
1979). The merge is exact whatever the sizes of the batches and however they are sorted, which an
average of the batches' variances is not.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

#: Elements converted to float64 at once: bounds the memory that one batch takes.
_CHUNK = 1 << 17


@dataclass(frozen=True)
class Moments:
    """Moments of the values of each channel."""

    count: int  #: number of values per channel
    mean: Tensor  #: (C,), float64 (float32 on devices without it)
    m2: Tensor  #: (C,), sum of squared distances from the mean

    @staticmethod
    def of(x: Tensor) -> Moments:
        """Moments of x, (N, C, ...), over all axes but axis 1."""
        rows = x.detach().transpose(0, 1).reshape(x.shape[1], -1)
        step = max(1, _CHUNK // max(1, rows.shape[0]))
        parts = [_of_rows(part) for part in rows.split(step, dim=1)]
        total = parts[0]
        for part in parts[1:]:
            total = total.merged(part)
        return total

    def merged(self, other: Moments) -> Moments:
        """Moments of both sets of values together."""
        count = self.count + other.count
        if count == 0:
            return self
        apart = other.mean - self.mean
        mean = self.mean + apart * (other.count / count)
        m2 = self.m2 + other.m2 + apart.square() * (self.count * other.count / count)
        return Moments(count, mean, m2)

    def to(self, device: torch.device | str) -> Moments:
        """The same on another device."""
        return Moments(self.count, self.mean.to(device), self.m2.to(device))

    @property
    def variance(self) -> Tensor:
        """Unbiased variance, m2 / (n - 1), as nn.BatchNorm keeps it in running_var."""
        return self.m2 / (self.count - 1)


def _of_rows(rows: Tensor) -> Moments:
    wide = rows.to(torch.float32 if rows.device.type == "mps" else torch.float64)
    if wide.shape[1] == 0:
        zeros = wide.new_zeros(wide.shape[0])
        return Moments(0, zeros, zeros)
    mean = wide.mean(1)
    return Moments(wide.shape[1], mean, (wide - mean[:, None]).square_().sum(1))
