"""Ranks that were assumed: which calls have the rank of another, and a check when a model runs."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, fx, nn

from bnfx.graphs.shapes import keeps_rank
from bnfx.operators.table import affine_of


class RankedIdentity(nn.Identity):
    """What is left of a BatchNorm that was folded for tensors of one rank: it refuses others."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.rank = rank

    def forward(self, input: Tensor) -> Tensor:  # as nn.Identity calls it
        """The input itself.

        Raises:
            AssertionError: It has another rank.
        """
        torch._assert(
            input.dim() == self.rank,
            f"the BatchNorm here was folded for rank {self.rank} only; fold again with "
            "example_inputs",
        )
        return input


def of_same_rank(start: fx.Node) -> Iterator[fx.Node]:
    """`start`, and the calls behind it that have its rank."""
    seen, queue = {start}, [start]
    while queue:
        node = queue.pop()
        yield node
        for user in node.users:
            same = affine_of(user) is not None or keeps_rank(user)
            if user not in seen and same and user.args and user.args[0] is node:
                seen.add(user)
                queue.append(user)
