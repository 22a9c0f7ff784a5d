"""scikit-learn's handwritten digits, and plain SGD on any labelled images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

TEST_IMAGES = 360
BATCH = 60


@dataclass(frozen=True)
class Images:
    """Images in [0, 1], (N, C, H, W) float32, and labels, (N,) int64."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor

    def to(self, device: torch.device, dtype: torch.dtype = torch.float32) -> Images:
        """The same on another device, the pixels in another type."""
        return Images(
            self.train_images.to(device, dtype),
            self.train_labels.to(device),
            self.test_images.to(device, dtype),
            self.test_labels.to(device),
        )


@dataclass(frozen=True)
class Run:
    """A trained network, in eval mode, and its accuracy on the test images along the way."""

    model: nn.Module
    steps: list[int] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)


def constant(_share: float) -> float:
    """A learning rate that stays."""
    return 1.0


def falling(share: float) -> float:
    """A learning rate that falls linearly to zero; `share` of the steps is done."""
    return 1.0 - share


def load(seed: int) -> Images:
    """All 1,797 digits, (N, 1, 8, 8); 360 of them, drawn at random, are for testing."""
    raw = load_digits()
    images = torch.tensor(raw.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(raw.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    test, train = order[:TEST_IMAGES], order[TEST_IMAGES:]
    return Images(images[train], labels[train], images[test], labels[test])


def predict(model: nn.Module, images: Tensor) -> Tensor:
    """Predicted labels, in eval mode; the training flags of the modules come back."""
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    with torch.no_grad():
        labels = torch.cat([model(part).argmax(1) for part in images.split(500)])
    for module, flag in flags:
        module.training = flag
    return labels


def share(labels: Tensor, truth: Tensor) -> float:
    """Share of labels that are right."""
    return (labels == truth).float().mean().item()


def train(
    model: nn.Module,
    data: Images,
    *,
    lr: float,
    steps: int,
    tick: Callable[[], object],
    decay: Callable[[float], float] = falling,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    batch: int = BATCH,
    seed: int = 0,
    points: int = 60,
    watch: Callable[[], object] | None = None,
) -> Run:
    """SGD on the cross entropy, with batches drawn at random.

    Args:
        model: Trained in place.
        data: What to train on and what to test on.
        lr: Learning rate at the start.
        steps: Number of updates.
        tick: Called after each of them.
        decay: Factor of the learning rate, when that share of the steps is done.
        momentum: Of SGD.
        weight_decay: Of SGD, on all parameters.
        batch: Images for one update.
        seed: Of the draw of the batches.
        points: How often the accuracy is measured, besides before the first step.
        watch: Called whenever the accuracy has been measured.
    """
    run = Run(model.train())
    optimizer = torch.optim.SGD(
        model.parameters(), lr=lr, momentum=momentum, weight_decay=weight_decay
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: decay(step / steps))
    draw = torch.Generator().manual_seed(seed)
    every = max(1, steps // points)
    for step in range(steps + 1):
        if step % every == 0 or step == steps:
            run.steps.append(step)
            run.accuracy.append(share(predict(model, data.test_images), data.test_labels))
            if watch is not None:
                watch()
        if step == steps:
            break
        chosen = torch.randint(len(data.train_images), (batch,), generator=draw)
        optimizer.zero_grad()
        F.cross_entropy(model(data.train_images[chosen]), data.train_labels[chosen]).backward()
        optimizer.step()
        schedule.step()
        tick()
    model.eval()
    return run
