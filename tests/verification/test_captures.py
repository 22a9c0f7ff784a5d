"""The reference is captured once, however many forms a file is compared with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bnfx


class _Asking(nn.Module):
    """Which way it goes depends on a size, and it casts: only torch.export captures it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.head = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) -> (N, 2)."""
        y = self.bn(self.conv(x))
        if y.shape[2] > 3:
            y = torch.relu(y)
        positive = (y.mean((2, 3)) > 0).to(torch.float32)
        out: Tensor = self.head(y.mean((2, 3)) * positive)
        return out


def _net(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = _Asking().eval()
    for name, state in model.bn.state_dict().items():
        if state.is_floating_point():
            state.uniform_(0.5, 1.5) if name in ("weight", "running_var") else state.normal_()
    return model


@pytest.mark.parametrize("right", [True, False])
def test_one_capture(right: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: FBT001  # drawn by pytest
    f, x = tmp_path / "net.onnx", torch.randn(2, 3, 8, 8)
    bnfx.export_onnx(bnfx.fold_bn(_net(0), x), x, f)
    calls, export = [], torch.export.export

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        return export(*args, **kwargs)

    monkeypatch.setattr(torch.export, "export", counted)
    report = bnfx.verify_onnx(_net(0 if right else 1), f, x, isolate=False)
    assert len(calls) == 1
    assert bool(report) is right
    weights = next(tier for tier in report.tiers if tier.tier == "weights")
    assert weights.status == ("passed" if right else "failed"), report.notes
