"""Remove Dropout, or reduce it: section 4.2.1, "Remove Dropout", and 3.4, "removed or reduced".

Dropout multiplies by a random mask in train mode and does nothing in eval mode, so eval outputs
stay to the bit. Edited are

1. modules (`nn.Dropout`, `nn.Dropout1d/2d/3d`, `nn.AlphaDropout`, `nn.FeatureAlphaDropout`), in
   their slot, in any model;
2. the rate between the layers of `nn.RNN`, `nn.LSTM` and `nn.GRU`;
3. functional calls, where the model or the part around them can be traced symbolically.

Left alone, with the reason, are dropout of attention weights (behind a softmax, inside
`nn.MultiheadAttention` and `scaled_dot_product_attention`) unless asked for, because BatchNorm does
not take its place; calls that are active in eval mode too; and what is out of reach.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.modules.dropout import _DropoutNd

from bnfx.editing.declarations import Preserved
from bnfx.editing.draft import Draft, Region, argument, constant_by_mode
from bnfx.editing.sightings import (
    OPTIONAL,
    OUT_OF_REACH,
    SeenCall,
    chosen,
    is_stock,
    seen_calls,
    source_of,
    unseen_calls,
)
from bnfx.errors import RecipeError
from bnfx.graphs.examples import has_hooks
from bnfx.operators.calls import call_name, function_name
from bnfx.reports.report import Change


@dataclass(frozen=True)
class _Form:
    """How a function takes its rate and its mode; attention knows no mode."""

    rate: str = "p"
    position: int = 1
    default_rate: float = 0.5
    training: str | None = "training"
    default_training: bool = True


_FORMS: dict[Any, _Form] = {
    **dict.fromkeys((F.dropout, F.dropout1d, F.dropout2d, F.dropout3d), _Form()),
    **dict.fromkeys((F.alpha_dropout, F.feature_alpha_dropout), _Form(default_training=False)),
    **dict.fromkeys((torch.dropout, torch.feature_dropout), _Form(training="train")),
    **dict.fromkeys((torch.alpha_dropout, torch.feature_alpha_dropout), _Form(training="train")),
    F.scaled_dot_product_attention: _Form("dropout_p", 4, 0.0, None),
}
_NAMES = frozenset(function_name(f) for f in _FORMS)
_KINDS = (_DropoutNd, nn.MultiheadAttention, nn.RNNBase)
_ATTENTION = "it drops attention weights, which BatchNorm does not replace; attention=True edits it"


@dataclass(frozen=True)
class Site:
    """A module, or a functional call in a graph, whose rate changes."""

    path: str
    kind: str
    #: The rate it has.
    rate: float
    #: Where a module keeps it.
    attribute: str = ""
    #: The call, where it is one.
    call: fx.Node | None = None


@dataclass(frozen=True)
class RemoveDropout:
    """Remove every Dropout, or reduce its rate."""

    name: ClassVar[str] = "remove_dropout"
    preserves: ClassVar[Preserved] = (
        Preserved.STATE_KEYS | Preserved.STATE_VALUES | Preserved.EVAL_OUTPUTS
    )

    #: What is left of rates above it; 0 removes.
    rate: float = 0.0
    #: Whether to edit the dropout of attention weights as well.
    attention: bool = False
    #: Glob or globs over module paths to leave alone.
    exclude: str | Sequence[str] = ()

    def __post_init__(self) -> None:
        if not 0 <= self.rate < 1:
            raise RecipeError(f"rate={self.rate} is no probability below 1; 0 removes Dropout")

    def match(self, draft: Draft) -> list[Site | Change]:
        """Modules in the order of the model, then functional calls."""
        seen = _Seen(draft)
        looks = [self._look_at_module(path, module, seen) for path, module in draft.modules()]
        looks += [self._look_at_call(r, node) for r in draft.regions for node in r.graph.nodes]
        found = [entry for entry in looks if entry is not None]
        rest = unseen_calls(draft, self.name, _NAMES, _KINDS, found, self._why_out_of_reach)
        return [*found, *rest]

    def rewrite(self, draft: Draft, found: Sequence[Site | Change]) -> tuple[Change, ...]:
        """Carry out what `match` found."""
        return tuple(e if isinstance(e, Change) else self._edit(draft, e) for e in found)

    def _why_out_of_reach(self, call: SeenCall) -> str:
        attention = call.after_softmax or call.function == "scaled_dot_product_attention"
        return _ATTENTION if attention and not self.attention else OUT_OF_REACH

    def _kept(self, path: str, kind: str, reason: str) -> Change:
        return Change(self.name, path, kind, "kept", reason)

    def _look_at_module(self, path: str, module: nn.Module, seen: _Seen) -> Site | Change | None:
        attribute = "p" if isinstance(module, _DropoutNd) else "dropout"
        rate = getattr(module, attribute) if is_stock(module, _KINDS) else 0.0
        if rate <= self.rate:
            return None
        kind = type(module).__name__
        if chosen(path, self.exclude):
            return self._kept(path, kind, "chosen by exclude")
        if not self.attention and seen.attention(path, module):
            return self._kept(path, kind, _ATTENTION)
        return Site(path, kind, rate, attribute)

    def _look_at_call(self, region: Region, node: fx.Node) -> Site | Change | None:
        form = _FORMS.get(node.target)
        if node.op != "call_function" or form is None:
            return None
        rate, active = _rates(node, form, region.modules)
        path, kind = region.caller(node), function_name(node.target)
        if rate is not None and (rate[0] <= self.rate or active == (False, False)):
            return None
        if chosen(path, self.exclude):
            return self._kept(path, kind, "chosen by exclude")
        if rate is None or active is None:
            return self._kept(path, kind, "its rate or its mode is computed in the forward")
        if rate[1] > 0 and active[1]:
            return self._kept(
                path, kind, "it is active in eval mode too: without it, eval outputs would change"
            )
        attention = form.training is None or _behind_softmax(node, region.modules)
        if attention and not self.attention:
            return self._kept(path, kind, _ATTENTION)
        if not region.fixed:
            return self._kept(path, kind, OPTIONAL)
        return Site(path, kind, rate[0], call=node)

    def _edit(self, draft: Draft, site: Site) -> Change:
        if site.call is not None:
            form = _FORMS[site.call.target]
            if form.training is not None and not self.rate:
                draft.bypass(site.call, argument(site.call, 0, "input", None))
            else:
                draft.set_in_train(site.call, form.position, form.rate, self.rate)
        else:
            module = draft.root.get_submodule(site.path)
            if self.rate or site.attribute != "p" or has_hooks(module) or not site.path:
                setattr(module, site.attribute, self.rate)
            else:
                draft.replace(site.path, _identity().train(module.training))
        done = f"reduced to {self.rate:g}" if self.rate else "removed"
        return Change(self.name, site.path, site.kind, "changed", f"rate {site.rate:g} {done}")


class _Seen:
    """Which dropout modules were seen to get the result of a softmax."""

    def __init__(self, draft: Draft) -> None:
        self.draft = draft
        self.behind: dict[int, bool] = {}
        for region in draft.regions:
            for node in region.graph.nodes:
                module = region.modules.get(str(node.target)) if node.op == "call_module" else None
                if isinstance(module, _DropoutNd) and source_of(node).op != "placeholder":
                    behind = _behind_softmax(node, region.modules)
                    self._note(region.name(str(node.target)), behind=behind)
        for call in seen_calls(draft.seen, _NAMES):
            if isinstance(draft.root.get_submodule(call.path), _DropoutNd):
                self._note(call.path, behind=call.after_softmax)

    def _note(self, path: str, *, behind: bool) -> None:
        key = id(self.draft.root.get_submodule(path))
        self.behind[key] = behind or self.behind.get(key, False)

    def attention(self, path: str, module: nn.Module) -> bool:
        """As seen; by the names of the path and its modules where it was not seen."""
        if not isinstance(module, _DropoutNd):
            return isinstance(module, nn.MultiheadAttention)
        if id(module) in self.behind:
            return self.behind[id(module)]
        parts = path.split(".")
        owners = [self.draft.root.get_submodule(".".join(parts[:i])) for i in range(len(parts))]
        words = [*parts, *(type(owner).__name__ for owner in owners)]
        return any("attn" in word.lower() or "attention" in word.lower() for word in words)


def _rates(
    node: fx.Node, form: _Form, modules: Mapping[str, nn.Module]
) -> tuple[tuple[float, float] | None, tuple[bool, bool] | None]:
    """The rate, and whether the call acts, each in train and in eval mode; None if unknown."""
    rate = constant_by_mode(argument(node, form.position, form.rate, form.default_rate), modules)
    if form.training is None:
        return rate, (True, True)
    return rate, constant_by_mode(argument(node, 2, form.training, form.default_training), modules)


def _behind_softmax(node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    source = source_of(node)
    if source.op == "call_module":
        return isinstance(modules.get(str(source.target)), nn.Softmax)
    return call_name(source) == "softmax"


def _identity() -> nn.Module:
    """An Identity; some parents read the rate of their dropout, so it tells that it is 0."""
    identity = nn.Identity()
    vars(identity).update(p=0.0, inplace=False)
    return identity
