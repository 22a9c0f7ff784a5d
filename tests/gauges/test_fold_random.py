"""Random networks: whatever fold_bn does to them, the laws hold; and the laws can fail."""

from __future__ import annotations

import contextlib
import copy
import itertools
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, find, given, settings
from hypothesis import strategies as st
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

import bnfx
from bnfx.gauges.choice import Gauges, Solver
from bnfx.gauges.constraints import Kind, hard_systems
from bnfx.gauges.elimination import attempt
from bnfx.reports.report import FoldReport, remember, report
from tests.support.graph_laws import Broken, check, options_of_fold_bn
from tests.support.graph_moves import MOVES
from tests.support.graphs import Sample, random_network

#: hypothesis' own Random, so that it can shrink what was drawn from it.
networks = st.randoms(use_true_random=False).map(lambda rng: random_network(rng, MOVES))

repeatable = settings(
    derandomize=True,
    database=None,
    deadline=None,
    phases=[Phase.generate, Phase.shrink],
    suppress_health_check=list(HealthCheck),
)


@pytest.mark.slow
@settings(repeatable, max_examples=300)
@given(sample=networks, with_inputs=st.booleans(), data=st.data())
def test_laws_hold(sample: Sample, with_inputs: bool, data: st.DataObject) -> None:  # noqa: FBT001  # drawn
    switches = options_of_fold_bn(given=with_inputs)
    options = {name: data.draw(st.booleans(), label=name) for name in switches}
    others = [sample.inputs(5)] if sample.batched else []
    check(sample.build(), sample.inputs(), given=with_inputs, others=others, **options)


def _most(solver: Solver, more_than: int) -> int:
    """The largest number of BatchNorms that can vanish together, by trying all sets of them."""
    norms = [s for s in solver.candidates if s.kind is Kind.BATCH_NORM and s.s.all()]
    able = [site for site in norms if solver.bound.alone(site) is None]
    for size in range(len(able), more_than, -1):
        for together in itertools.combinations(able, size):
            systems = hard_systems(solver.found, solver.candidates)
            if all(attempt(systems, site, dead=True) is None for site in together):
                return size
    return more_than


@pytest.mark.slow
def test_no_other_choice_folds_more(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = 0
    solve = Solver.solve

    def compared(self: Solver) -> Gauges:
        nonlocal tried
        gauges = solve(self)
        by_words = [why for why in gauges.refused.values() if why.words]
        if not by_words:  # soundness and zeros have rules of their own
            went = sum(site.kind is Kind.BATCH_NORM for site in gauges.eliminated)
            assert _most(self, went) == went
            tried += 1
        return gauges

    monkeypatch.setattr(Solver, "solve", compared)
    for seed in range(60):
        sample = random_network(random.Random(seed), MOVES)
        with contextlib.suppress(bnfx.CaptureError):
            bnfx.fold_bn(sample.build(), tuple(sample.inputs()))
    assert tried > 30


def test_a_seed_gives_one_network() -> None:
    first, second = (random_network(random.Random(5), MOVES) for _ in range(2))
    assert first == second
    torch.testing.assert_close(first.build().state_dict(), second.build().state_dict())


Fold = Callable[..., fx.GraphModule]


def _on_norms(change: Callable[[_BatchNorm], None]) -> Callable[[Fold], Fold]:
    """An engine that reads one thing of every BatchNorm wrongly."""

    def spoil(fold: Fold) -> Fold:
        def wrong(model: nn.Module, *args: Any, **options: Any) -> fx.GraphModule:
            read = copy.deepcopy(model)
            with torch.no_grad():
                for norm in read.modules():
                    if isinstance(norm, _BatchNorm):
                        change(norm)
            return fold(read, *args, **options)

        return wrong

    return spoil


def _sign(norm: _BatchNorm) -> None:
    if norm.weight is not None:
        norm.weight.neg_()


def _axis(norm: _BatchNorm) -> None:
    if norm.running_mean is not None:
        norm.running_mean.copy_(norm.running_mean.flip(0))


def _variance(norm: _BatchNorm) -> None:
    if norm.running_var is not None:
        norm.running_var.sqrt_()


def _eps(norm: _BatchNorm) -> None:
    norm.eps = 2e-5


def _beta(norm: _BatchNorm) -> None:
    if norm.bias is not None:
        norm.bias.zero_()


def _source_written(fold: Fold) -> Fold:
    def wrong(model: nn.Module, *args: Any, **options: Any) -> fx.GraphModule:
        folded = fold(model, *args, **options)
        for parameter in model.parameters():
            parameter.requires_grad = False
        return folded

    return wrong


def _record_lost(fold: Fold) -> Fold:
    def wrong(*args: Any, **options: Any) -> fx.GraphModule:
        folded = fold(*args, **options)
        done = report(folded)
        assert isinstance(done, FoldReport)
        return remember(folded, FoldReport(done.batch_norms[1:], done.provenance))

    return wrong


def _verdict_invented(fold: Fold) -> Fold:
    def wrong(*args: Any, **options: Any) -> fx.GraphModule:
        folded = fold(*args, **options)
        done = report(folded)
        assert isinstance(done, FoldReport)
        kept = [type(r)(r.path, "kept", (), "invented") for r in done.batch_norms]
        return remember(folded, FoldReport(tuple(kept), done.provenance))

    return wrong


FAULTS: dict[str, Callable[[Fold], Fold]] = {
    "sign": _on_norms(_sign),
    "axis": _on_norms(_axis),
    "standard deviation for variance": _on_norms(_variance),
    "eps": _on_norms(_eps),
    "beta": _on_norms(_beta),
    "source written": _source_written,
    "record lost": _record_lost,
    "verdict invented": _verdict_invented,
}


def _breaks(sample: Sample) -> bool:
    try:
        check(sample.build(), sample.inputs(), given=False)
    except Broken:
        return True
    except (RuntimeError, AssertionError):  # of the network drawn, or of what the fault did to it
        return False
    return False


@pytest.mark.parametrize("name", FAULTS)
def test_laws_can_fail(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bnfx, "fold_bn", FAULTS[name](bnfx.fold_bn))
    smallest = find(networks, _breaks, settings=settings(repeatable, max_examples=200))
    assert len(smallest.lines) <= 4, smallest
