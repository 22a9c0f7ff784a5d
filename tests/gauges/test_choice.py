"""The choice of BatchNorms that vanish, and the bound on it, against trying every subset."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx

from bnfx.gauges.bound import Bound
from bnfx.gauges.choice import Solver
from bnfx.gauges.constraints import Cause, Constraints, Demand, Kind, Site, hard_systems
from bnfx.gauges.elimination import attempt
from bnfx.gauges.soundness import WIDE
from bnfx.numbers import Ints

_SOME = settings(max_examples=60, deadline=None)
_TENSORS = 5
_CHANNELS = 2


def labels_of(tensor: int) -> Ints:
    """Labels of a tensor's channels; tensor 0 is the ground."""
    return np.arange(_CHANNELS) + 1 + (tensor - 1) * _CHANNELS if tensor else np.zeros(2, np.int64)


@st.composite
def systems(draw: st.DrawFn) -> tuple[Constraints, list[Site]]:
    """A few tensors that demands and BatchNorms tie together, the ground among them."""
    graph = fx.Graph()
    source = graph.placeholder("x")
    cause = Cause(source, "drawn")
    found = Constraints(count=1 + (_TENSORS - 1) * _CHANNELS)
    tensors = st.integers(0, _TENSORS - 1)
    for _ in range(draw(st.integers(0, 3))):
        a, b, c = (labels_of(draw(tensors)) for _ in range(3))
        match draw(st.sampled_from(["scale", "sum", "positive", "unshifted", "gate"])):
            case "scale":
                found.demand(Demand.SAME_SCALE, a, b, cause=cause)
            case "sum":
                found.demand(Demand.SUM, a, b, c, factors=(1.0, -1.0), cause=cause)
            case "positive":
                found.demand(Demand.POSITIVE, a, cause=cause)
            case "unshifted":
                found.demand(Demand.UNSHIFTED, a, cause=cause)
            case _:
                found.demand(Demand.GATE, a, b, c, factors=(1.0,), cause=cause)
    for _ in range(draw(st.integers(1, 5))):
        numbers = st.lists(st.sampled_from([1.0, 2.0, -2.0]), min_size=2, max_size=2)
        shifts = st.lists(st.sampled_from([0.0, 1.0]), min_size=2, max_size=2)
        node = graph.call_function(torch.relu, (source,))
        x, y = labels_of(draw(tensors)), labels_of(draw(tensors))
        site = Site(
            node=node,
            kind=Kind.BATCH_NORM,
            x=x,
            y=y,
            s=np.array(draw(numbers)),
            t=np.array(draw(shifts)),
            source=source,
            mean=np.zeros(2),
            std=np.ones(2),
        )
        found.site(site)
    return found, list(found.sites.values())


def can_go(found: Constraints, sites: Sequence[Site], chosen: Sequence[Site]) -> bool:
    """Whether all of `chosen` can vanish together."""
    hard = hard_systems(found, sites)
    return all(attempt(hard, site, dead=False) is None for site in chosen)


def most_that_can_go(found: Constraints, sites: Sequence[Site]) -> int:
    return next(
        size
        for size in range(len(sites), -1, -1)
        if any(can_go(found, sites, some) for some in itertools.combinations(sites, size))
    )


@_SOME
@given(systems())
def test_what_was_chosen_can_go_and_nothing_can_be_added(
    drawn: tuple[Constraints, list[Site]],
) -> None:
    found, sites = drawn
    gauges = Solver(found, sites, frozenset(), WIDE).solve()
    assert can_go(found, sites, gauges.eliminated)
    gone = {site.node for site in gauges.eliminated}
    assert gone | set(gauges.refused) == {site.node for site in sites}
    for site in sites:
        if site.node not in gone:
            assert not can_go(found, sites, [*gauges.eliminated, site])


@_SOME
@given(systems())
def test_the_bound_never_claims_too_much(drawn: tuple[Constraints, list[Site]]) -> None:
    found, sites = drawn
    gauges = Solver(found, sites, frozenset(), WIDE).solve()
    gone = {site.node for site in gauges.eliminated}
    stayed = [(site, gauges.refused[site.node]) for site in sites if site.node not in gone]
    best = len(sites) - most_that_can_go(found, sites)
    assert gauges.bound.unavoidable(stayed) <= best <= len(stayed)


@_SOME
@given(systems())
def test_alone_and_rivals_are_what_trying_says(drawn: tuple[Constraints, list[Site]]) -> None:
    found, sites = drawn
    bound = Bound(hard_systems(found, sites), sites)
    for site in sites:
        assert (bound.alone(site) is None) is can_go(found, sites, [site])
        for rival in bound.rivals(site):
            assert not can_go(found, sites, [site, rival])


@_SOME
@given(systems())
def test_gauges_satisfy_what_was_demanded(drawn: tuple[Constraints, list[Site]]) -> None:
    found, sites = drawn
    gauges = Solver(found, sites, frozenset(), WIDE).solve()
    a, d = gauges.scale, gauges.shift
    assert a[0] == 1
    assert d[0] == 0
    for site in gauges.eliminated:
        np.testing.assert_allclose(a[site.x], site.s * a[site.y], rtol=1e-9)
        np.testing.assert_allclose(d[site.y], site.s * d[site.x] - site.t, rtol=1e-9, atol=1e-9)
    for batch in found.batches:
        i, *rest = batch.labels
        if batch.demand is Demand.SAME_SCALE:
            np.testing.assert_allclose(a[i], a[rest[0]], rtol=1e-9)
        elif batch.demand is Demand.POSITIVE:
            assert (a[i] > 0).all()
        elif batch.demand is Demand.UNSHIFTED:
            np.testing.assert_allclose(d[i], 0, atol=1e-9)
        elif batch.demand is Demand.GATE:
            np.testing.assert_allclose(a[i], a[rest[0]] * a[rest[1]], rtol=1e-9)
        else:
            np.testing.assert_allclose(d[i], d[rest[0]] - d[rest[1]], rtol=1e-9, atol=1e-9)
