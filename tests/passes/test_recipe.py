"""The recipe's passes: what goes, what stays and why, and that what they declare is checked."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bnfx
from bnfx.editing.declarations import Preserved
from bnfx.editing.draft import Draft
from bnfx.passes import RemoveDropout, RemoveLocalResponseNorm, ZeroInitResidual
from tests.support import zoo
from tests.support.laws import assert_same_state

X = torch.randn(4, 8)


def acts_the_same_twice(model: nn.Module, *args: Tensor) -> bool:
    """Whether train mode is free of randomness."""
    model.train()
    return torch.equal(model(*args), model(*args))


def kept(done: bnfx.Edited) -> dict[str, str]:
    return {change.path: change.reason for change in done.changes if change.action == "kept"}


def changed(done: bnfx.Edited) -> set[tuple[str, str]]:
    return {(c.path, c.kind) for c in done.changes if c.action == "changed"}


class Branchy(nn.Module):
    """Its root cannot be traced: control flow on data. Dropout as a module and as a function."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Dropout(0.3))
        self.drop, self.head = nn.Dropout(0.5), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(self.body(x))
        if x.sum() > 0:
            x = F.dropout(x, 0.1, self.training)
        out: Tensor = self.head(x)
        return out


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.head, self.unused = nn.Linear(8, 8), nn.Linear(8, 2), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(torch.relu(self.fc(x)), training=self.training)
        x = F.dropout(x, p=0.4 if self.training else 0.0)
        out: Tensor = self.head(torch.dropout(x, 0.2, self.training))
        return out


class Attention(nn.Module):
    """Dropout of attention weights in every spelling, and one behind the projection."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out, self.final = nn.Linear(8, 24), nn.Linear(8, 8), nn.Linear(8, 8)
        self.a, self.b = nn.Dropout(0.1), nn.Dropout(0.2)
        self.mha = nn.MultiheadAttention(8, 2, dropout=0.3, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        x = self.b(self.out(self.a(torch.softmax(q @ k.mT, -1).to(x.dtype)) @ v))
        x = x + F.scaled_dot_product_attention(q, k, v, dropout_p=0.4 if self.training else 0.0)
        out: Tensor = self.mha(x, x, x, need_weights=False)[0]
        return out


def test_modules_leave_their_slot_and_the_class_stays() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.Sequential(nn.AlphaDropout(0.2)))
    before = copy.deepcopy(model.state_dict())
    done = bnfx.apply_pass(RemoveDropout(), model, X)
    assert type(done.model) is nn.Sequential
    assert changed(done) == {("1", "Dropout"), ("2.0", "AlphaDropout")}
    assert acts_the_same_twice(done.model, X)
    assert not acts_the_same_twice(model, X)
    assert_same_state(done.model.state_dict(), before)


def test_reduced_rates_are_never_raised() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.Dropout2d(0.1))
    done = bnfx.apply_pass(RemoveDropout(rate=0.2), model)
    assert [done.model.get_submodule(i).p for i in "12"] == [0.2, 0.1]
    assert "0.5 reduced to 0.2" in done.changes[0].reason
    assert len(done.changes) == 1


@pytest.mark.parametrize("rate", [0.0, 0.1])
def test_functions_are_edited_in_the_graph(rate: float) -> None:
    model = Functional()
    done = bnfx.apply_pass(RemoveDropout(rate), model, X)
    assert [c.kind for c in done.changes if c.action == "changed"] == ["dropout"] * 3
    assert set(done.model.state_dict()) == set(model.state_dict())
    assert acts_the_same_twice(done.model, X) is (rate == 0)
    for twin in (done.model, copy.deepcopy(done.model), pickle.loads(pickle.dumps(done.model))):
        assert torch.equal(twin.eval()(X), model.eval()(X))
    again = bnfx.apply_pass(RemoveDropout(rate), done.model, X)
    assert again.changes == ()


def test_reduced_function_drops_at_the_new_rate() -> None:
    class Wide(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.dropout(x, p=0.9, training=self.training)

    done = bnfx.apply_pass(RemoveDropout(0.25), Wide()).model.train()
    share = (done(torch.ones(100_000)) == 0).double().mean().item()
    assert share == pytest.approx(0.25, abs=0.01)


def test_a_root_that_cannot_be_traced() -> None:
    done = bnfx.apply_pass(RemoveDropout(), Branchy(), X)
    assert type(done.model) is Branchy
    assert changed(done) == {("body.2", "Dropout"), ("drop", "Dropout")}
    blind = bnfx.apply_pass(RemoveDropout(), Branchy())
    assert changed(blind) == changed(done)
    assert "give example_inputs" in kept(blind)[""]


def test_a_function_out_of_reach_is_reported() -> None:
    model = Branchy()
    with torch.no_grad():
        model.head.weight.zero_()
        for parameter in model.body.parameters():
            parameter.fill_(1.0)
    done = bnfx.apply_pass(RemoveDropout(), model, torch.ones(4, 8))
    assert "cannot be traced" in kept(done)[""]


def test_attention_is_left_alone_unless_asked_for() -> None:
    x = torch.randn(2, 4, 8)
    done = bnfx.apply_pass(RemoveDropout(), Attention(), x)
    assert changed(done) == {("b", "Dropout")}
    assert set(kept(done)) == {"a", "mha", ""}
    assert all("attention" in reason for reason in kept(done).values())
    all_of_it = bnfx.apply_pass(RemoveDropout(attention=True), Attention(), x)
    assert not kept(all_of_it)
    assert acts_the_same_twice(all_of_it.model, x)


def test_attention_is_seen_on_the_example_where_it_cannot_be_traced() -> None:
    class Untraced(Attention):
        def forward(self, x: Tensor) -> Tensor:
            if x.sum() > 1e9:
                return x
            return super().forward(x)

    done = bnfx.apply_pass(RemoveDropout(), Untraced(), torch.randn(2, 4, 8))
    assert changed(done) == {("b", "Dropout")}
    assert {"a", "mha", ""} <= set(kept(done))


def test_attention_by_name_where_nothing_was_seen() -> None:
    class Untraced(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn_drop, self.drop = nn.Dropout(0.1), nn.Dropout(0.1)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.drop(self.attn_drop(x)) if x.sum() > 0 else x
            return out

    done = bnfx.apply_pass(RemoveDropout(), Untraced())
    assert changed(done) == {("drop", "Dropout")}
    assert "attention" in kept(done)["attn_drop"]


def test_dropout_that_acts_in_eval_mode_stays() -> None:
    class MonteCarlo(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.dropout(x)

    done = bnfx.apply_pass(RemoveDropout(), MonteCarlo(), X)
    assert "active in eval mode" in kept(done)[""]
    assert not changed(done)


def test_dropout_between_recurrent_layers() -> None:
    model = nn.ModuleDict({"rnn": nn.LSTM(8, 8, 2, dropout=0.5)})
    done = bnfx.apply_pass(RemoveDropout(), model)
    assert changed(done) == {("rnn", "LSTM")}
    rnn = done.model.get_submodule("rnn")
    assert torch.equal(rnn(X)[0], rnn(X)[0])


def test_subclasses_and_excluded_modules() -> None:
    class Own(nn.Dropout):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) * 2

    model = nn.Sequential(Own(0.5), nn.Dropout(0.5))
    done = bnfx.apply_pass(RemoveDropout(exclude="1"), model)
    assert changed(done) == {("0", "dropout")}  # its code is edited like any other
    assert "exclude" in kept(done)["1"]
    both = bnfx.apply_pass(RemoveDropout(exclude=["0", "1"]), model)
    assert set(kept(both)) == {"0", "1"}


def test_hooks_of_a_dropout_stay() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5))
    calls: list[int] = []
    model[1].register_forward_hook(lambda *_: calls.append(1))
    done = bnfx.apply_pass(RemoveDropout(), model)
    assert acts_the_same_twice(done.model, X)
    assert len(calls) == 2


def test_bad_rate() -> None:
    with pytest.raises(bnfx.RecipeError, match=r"rate=1\.5"):
        RemoveDropout(1.5)


class WithNorms(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.lrn, self.old = nn.Conv2d(3, 8, 3), nn.LocalResponseNorm(3), None
        self.cross = nn.CrossMapLRN2d(3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.cross(F.local_response_norm(self.lrn(F.relu(self.conv(x))), 5))
        return out


def test_local_response_normalisation_goes() -> None:
    model, x = WithNorms().eval(), torch.randn(2, 3, 8, 8)
    done = bnfx.apply_pass(RemoveLocalResponseNorm(), model, x)
    assert changed(done) == {
        ("lrn", "LocalResponseNorm"),
        ("cross", "CrossMapLRN2d"),
        ("", "local_response_norm"),
    }
    assert torch.equal(done.model(x), F.relu(model.conv(x)))


class Lying(RemoveLocalResponseNorm):
    preserves: ClassVar[Preserved] = Preserved.EVAL_OUTPUTS


@dataclass(frozen=True)
class Meddler:
    """A pass that says it keeps values or names, and does not."""

    name: ClassVar[str] = "meddler"
    preserves: ClassVar[Preserved] = Preserved.STATE_KEYS | Preserved.STATE_VALUES
    rename: bool = False

    def match(self, draft: Draft) -> list[Any]:
        return []

    def rewrite(self, draft: Draft, found: Sequence[Any]) -> tuple[bnfx.Change, ...]:
        if self.rename:
            draft.root.register_buffer("more", torch.zeros(1))
            return ()
        with torch.no_grad():
            next(draft.root.parameters()).add_(1)
        return ()


def test_declarations_are_checked() -> None:
    model, x = WithNorms(), torch.randn(2, 3, 8, 8)
    with pytest.raises(bnfx.RecipeError, match="output 0 of WithNorms moved by"):
        bnfx.apply_pass(Lying(), model, x)
    with pytest.raises(bnfx.RecipeError, match=r"values of 'conv\.weight'"):
        bnfx.apply_pass(Meddler(), model)
    with pytest.raises(bnfx.RecipeError, match="changed 'more'"):
        bnfx.apply_pass(Meddler(rename=True), model)


def test_example_that_does_not_fit() -> None:
    with pytest.raises(bnfx.CaptureError, match="does not run on the example inputs"):
        bnfx.apply_pass(RemoveDropout(), Branchy(), torch.randn(4, 3))


class Block(nn.Module):
    def __init__(self, *, projected: bool = False) -> None:
        super().__init__()
        self.c1, self.b1 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.c2, self.b2 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.short = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)) if projected else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.b2(self.c2(F.relu(self.b1(self.c1(x)))))
        return F.relu(y + (x if self.short is None else self.short(x)))


def test_last_gamma_of_a_residual_branch() -> None:
    model = nn.Sequential(Block(), Block(projected=True))
    done = bnfx.apply_pass(ZeroInitResidual(), model)
    assert {path for path, _ in changed(done)} == {"0.b2", "1.b2"}
    x = torch.randn(2, 4, 5, 5)
    block = done.model.get_submodule("0").eval()
    assert torch.equal(block(x), F.relu(x))
    assert bool((model.get_parameter("0.b2.weight") == 1).all())  # the source stays


def test_only_a_fresh_batch_norm_is_zeroed() -> None:
    model = nn.Sequential(Block(), Block())
    model.get_submodule("0")(torch.randn(2, 4, 5, 5))
    with torch.no_grad():
        model.get_parameter("1.b2.weight").fill_(0.5)
    done = bnfx.apply_pass(ZeroInitResidual(), model)
    assert not changed(done)
    assert "statistics" in kept(done)["0.b2"]
    assert "gamma" in kept(done)["1.b2"]


@pytest.mark.zoo
def test_stochastic_depth_does_not_end_a_branch() -> None:
    models: Any = zoo.torchvision_models()
    done = bnfx.apply_pass(ZeroInitResidual(), models.efficientnet_b0())
    assert len(changed(done)) == 9  # MBConv blocks of stride 1 and equal channels
    assert all(path.endswith(".1") for path, _ in changed(done))


def test_without_values_nothing_is_zeroed() -> None:
    with torch.device("meta"):
        model = nn.Sequential(Block())
    assert "meta" in kept(bnfx.apply_pass(ZeroInitResidual(), model))["0.b2"]


def test_a_gamma_that_is_shared_stays() -> None:
    model = nn.Sequential(Block(), Block())
    model.get_submodule("1.b2").weight = model.get_parameter("0.b2.weight")
    done = bnfx.apply_pass(ZeroInitResidual(), model)
    assert not changed(done)
    assert "used elsewhere" in kept(done)["0.b2"]


def test_transformer_layers_keep_their_fast_path() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.2, batch_first=True)
    model, x = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), torch.randn(2, 4, 8)
    done = bnfx.apply_pass(RemoveDropout(), model, x)
    assert len(changed(done)) == 6
    assert {path.rpartition(".")[2] for path in kept(done)} == {"self_attn"}
    everything = bnfx.apply_pass(RemoveDropout(attention=True), model, x)
    assert acts_the_same_twice(everything.model, x)


def test_two_long_sides_are_no_residual_block() -> None:
    class Parallel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = Block(), nn.Sequential(Block(), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.a(x) + self.b(x)
            return out

    done = bnfx.apply_pass(ZeroInitResidual(), Parallel())
    assert {path for path, _ in changed(done)} == {"a.b2", "b.0.b2"}
    assert "neither is a shortcut" in kept(done)["b.2"]


class Classic(nn.Module):
    """What the recipe is for: LRN, dropout, no BatchNorm, a residual block."""

    def __init__(self) -> None:
        super().__init__()
        self.c1, self.c2, self.c3 = (nn.Conv2d(i, 8, 3, padding=1) for i in (3, 8, 8))
        self.lrn, self.drop, self.head = nn.LocalResponseNorm(3), nn.Dropout(0.4), nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.lrn(F.relu(self.c1(x)))
        x = F.relu(x + self.c3(F.relu(self.c2(x))))
        out: Tensor = self.head(self.drop(x.mean((2, 3))))
        return out


def test_recipe() -> None:
    model, x = Classic(), torch.randn(2, 3, 8, 8)
    before = copy.deepcopy(model.state_dict())
    done = bnfx.recipe(model, lr=0.01, weight_decay=5e-4, example_inputs=x, zero_init_residual=True)
    assert_same_state(model.state_dict(), before)
    assert dict(done.hparams) == {"lr": 0.05, "weight_decay": 1e-4, "decay_speedup": 6.0}
    assert done.hparams.lr == done.hparams["lr"]
    by = {change.by for change in done.changes if change.action == "changed"}
    assert by == {"remove_lrn", "remove_dropout", "insert_bn", "zero_init_residual"}
    norms = [m for m in done.model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) == 3
    assert [bool((m.weight == 0).all()) for m in norms] == [False, False, True]
    assert {c.path for c in done.changes if c.action == "kept"} == {"head"}
    done.model.train()(x).sum().backward()
    text = str(done)
    assert all(word in text for word in ("0.05", "remove_lrn", "c3_bn", "photometric"))
    json.dumps(done.to_dict())


def test_recipe_keeps_what_it_is_told_to_keep() -> None:
    done = bnfx.recipe(Classic(), lr=0.1, weight_decay=0, keep=["lrn", "drop"], exclude="c1")
    assert isinstance(done.model.get_submodule("drop"), nn.Dropout)
    assert isinstance(done.model.get_submodule("lrn"), nn.LocalResponseNorm)
    assert "c1_bn" not in dict(done.model.named_modules())


def test_recipe_x30_and_its_own_numbers() -> None:
    done = bnfx.recipe(
        nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)),
        lr=0.1,
        weight_decay=0.0,
        lr_factor=30,
    )
    assert done.hparams.lr == pytest.approx(3.0)
    with pytest.raises(KeyError):
        done.hparams["momentum"]
    with pytest.raises(bnfx.RecipeError, match="lr=-1"):
        bnfx.recipe(nn.Linear(2, 2), lr=-1, weight_decay=0)


@pytest.mark.zoo
@pytest.mark.parametrize("name", ["resnet18", "resnet50", "wide_resnet50_2"])
def test_zero_init_equals_torchvisions_own(name: str) -> None:
    models: Any = zoo.torchvision_models()
    plain, theirs = getattr(models, name)(), getattr(models, name)(zero_init_residual=True)
    ours = bnfx.apply_pass(ZeroInitResidual(), plain).model
    x = torch.randn(1, 3, 32, 32)
    as_seen = bnfx.apply_pass(ZeroInitResidual(), plain, x).model

    def zeros(model: nn.Module) -> set[str]:
        norms = {n: m for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)}
        return {name for name, m in norms.items() if bool((m.weight == 0).all())}

    assert zeros(ours) == zeros(as_seen) == zeros(theirs)
    assert zeros(ours)


@pytest.mark.zoo
@pytest.mark.parametrize("name", ["alexnet", "vgg11", "squeezenet1_0", "vit_b_16", "googlenet"])
def test_dropout_of_torchvisions_networks(name: str) -> None:
    models: Any = zoo.torchvision_models()
    options = {"init_weights": False, "aux_logits": False} if name == "googlenet" else {}
    with torch.device("meta"):
        model = getattr(models, name)(**options)
    theirs = [path for path, m in model.named_modules() if isinstance(m, nn.Dropout) and m.p]
    done = bnfx.apply_pass(RemoveDropout(), model)
    assert {path for path, _ in changed(done)} == set(theirs)
    assert type(done.model) is type(model)


class UntracedResidual(nn.Module):
    """A residual block inside code that cannot be traced: only a run shows the add."""

    def __init__(self) -> None:
        super().__init__()
        self.c1, self.b1 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.b1(self.c1(x))
        if x.shape[0] > int(x.abs().max()) * 0:
            y += x
        return F.relu(y)


def test_residual_add_seen_in_a_run() -> None:
    x = torch.randn(2, 4, 5, 5)
    assert not changed(bnfx.apply_pass(ZeroInitResidual(), UntracedResidual()))
    done = bnfx.apply_pass(ZeroInitResidual(), UntracedResidual(), x)
    assert changed(done) == {("b1", "BatchNorm2d")}
    assert torch.equal(done.model.eval()(x), F.relu(x))


def test_functional_dropout_of_an_inserted_model() -> None:
    inserted = bnfx.insert_bn(Functional(), X, init="identity")
    done = bnfx.apply_pass(RemoveDropout(), inserted, X)
    assert len(changed(done)) == 1
    assert acts_the_same_twice(done.model, X)
    assert bnfx.report(done.model) == bnfx.report(inserted)
    done.model.load_state_dict(Functional().state_dict())  # from before the insertion, strictly


def test_recipe_of_a_model_that_cannot_be_traced() -> None:
    model, x = Branchy(), torch.randn(16, 8)
    done = bnfx.recipe(model, lr=0.1, weight_decay=1e-4, example_inputs=x)
    assert type(done.model) is Branchy
    assert sum(isinstance(m, nn.BatchNorm1d) for m in done.model.modules()) == 1
    done.model.train()(x).sum().backward()


class Around(nn.Module):
    """Code that cannot be traced around a block that can, whose dropout is a function."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = self.again = block
        self.scale = 2

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(x) * self.block.scale if x.sum() > -1e9 else x
        out: Tensor = self.again(x)
        return out


class FunctionalBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.scale = nn.Linear(8, 8), 2

    def forward(self, x: Tensor) -> Tensor:
        x = F.local_response_norm(F.relu(self.fc(x)).unsqueeze(0), 3).squeeze(0)
        return F.dropout(x, 0.5, self.training)


class Optional(FunctionalBlock):
    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        x = super().forward(x)
        return x if skip is None else x + skip


@pytest.mark.parametrize("rate", [0.0, 0.1])
def test_a_function_in_a_part_that_can_be_traced(rate: float) -> None:
    model = Around(FunctionalBlock()).train()
    keys = list(model.state_dict())
    for given in (None, X):
        done = bnfx.apply_pass(RemoveDropout(rate), model, given)
        assert {path for path, _ in changed(done)} == {"block"}
        assert type(done.model) is Around
        assert done.model.get_submodule("block") is done.model.get_submodule("again")
        assert list(done.model.state_dict()) == keys
        assert all(module.training for module in done.model.modules())
        for twin in (copy.deepcopy(done.model), pickle.loads(pickle.dumps(done.model))):
            assert acts_the_same_twice(twin, X) is (rate == 0)
            assert torch.equal(twin.eval()(X), copy.deepcopy(model).eval()(X))
    done = bnfx.apply_pass(RemoveLocalResponseNorm(), model, X)
    assert {path for path, _ in changed(done)} == {"block"}


def test_a_part_with_optional_arguments_stays() -> None:
    done = bnfx.apply_pass(RemoveDropout(), Around(Optional()), X)
    assert "optional arguments" in kept(done)["block"]
    assert not changed(done)


def test_code_that_needs_what_an_edit_takes_away() -> None:
    class Curious(Around):
        def forward(self, x: Tensor) -> Tensor:
            assert isinstance(self.block, FunctionalBlock)
            return super().forward(x)

    with pytest.raises(bnfx.RecipeError, match="does not run any more after remove_dropout"):
        bnfx.apply_pass(RemoveDropout(), Curious(FunctionalBlock()), X)
    left = bnfx.apply_pass(RemoveDropout(exclude="block"), Curious(FunctionalBlock()), X)
    assert not changed(left)
