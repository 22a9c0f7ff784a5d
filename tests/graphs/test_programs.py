"""Exported programs: one goes in, one comes out, and all that is not edited is as it was."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._export.verifier import Verifier
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import InputKind
from torch.utils import _pytree as pytree

import bnfx
from bnfx.reports.report import FoldReport
from tests.support.laws import randomise
from tests.support.networks import chain, conv, linear, net, norm

BATCH = Dim("batch", min=2, max=64)
SIZE = Dim("size", min=2, max=64)


def image(batch: int = 2, size: int = 6, channels: int = 2) -> Tensor:
    """(batch, channels, size, size)."""
    return torch.randn(batch, channels, size, size, dtype=torch.float64)


def saved(program: ExportedProgram) -> ExportedProgram:
    """`program`, written and read."""
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    return torch.export.load(file)


def norms(program: ExportedProgram) -> int:
    """How many BatchNorms it evaluates."""
    graphs = [m.graph for m in program.graph_module.modules() if isinstance(m, fx.GraphModule)]
    return sum("batch_norm" in str(n.target) for g in graphs for n in g.nodes)


def run(program: ExportedProgram, args: tuple[Any, ...]) -> tuple[Any, dict[str, Tensor]]:
    """What a copy returns, and its buffers afterwards."""
    module = copy.deepcopy(program).module()
    with torch.no_grad():
        out = module(*copy.deepcopy(args))
    return out, {n: b for n, b in module.named_buffers() if n in program.state_dict}


def close(ours: Any, truth: Any) -> None:
    torch.testing.assert_close(
        pytree.tree_leaves(ours), pytree.tree_leaves(truth), rtol=1e-10, atol=1e-10
    )


def law(program: ExportedProgram, *examples: tuple[Any, ...], left: int = 0) -> ExportedProgram:
    """Fold `program`, and hold the result against it; `examples` are inputs that it takes."""
    before = {n: t.clone() for n, t in program.state_dict.items()}
    text = str(program.graph)
    folded = bnfx.fold_bn(program)
    assert isinstance(folded, ExportedProgram)
    assert str(program.graph) == text
    for name, value in before.items():
        assert torch.equal(program.state_dict[name], value)
    assert norms(folded) == left
    mine, theirs = folded.graph_signature, program.graph_signature
    assert mine.user_inputs == theirs.user_inputs
    assert [s.kind for s in mine.output_specs] == [s.kind for s in theirs.output_specs]
    assert [s.target for s in mine.output_specs] == [s.target for s in theirs.output_specs]
    assert folded.call_spec.in_spec == program.call_spec.in_spec
    assert folded.call_spec.out_spec == program.call_spec.out_spec
    assert folded.range_constraints == program.range_constraints
    assert folded._guards_code == program._guards_code
    assert [e.fqn for e in folded.module_call_graph] == [e.fqn for e in program.module_call_graph]
    assert folded.example_inputs is program.example_inputs
    assert folded.verifiers == program.verifiers
    read = saved(folded)
    for loaded in (folded, read):
        for args in examples:
            ours, truth = run(loaded, args), run(program, args)
            close(ours[0], truth[0])
            for name in ours[1]:
                close(ours[1][name], truth[1][name])
    done = bnfx.report(folded)
    assert isinstance(done, FoldReport)
    assert bnfx.report(read) == done
    assert done.left == left
    assert bnfx.report(bnfx.fold_bn(folded)).to_dict()["batch_norms"] == [] or left
    return folded


def form_of(program: ExportedProgram, form: str) -> ExportedProgram:
    """`program`, in core ATen or as a file gives it."""
    core = program.run_decompositions() if form.startswith("core") else program
    return saved(core) if form.endswith("saved") else core


def mixed() -> nn.Module:
    """Tied weights, a constant, buffers of all kinds, an unread parameter, a part without grad."""
    made: Any = net(
        "{'y': y + self.plain * self.hidden + torch.tensor([1.0, 2.0]), 'n': n['k'], 'none': None}",
        "self.count.add_(1)",
        "y = self.bn(self.conv(x)).relu().mean((2, 3))",
        "with torch.no_grad(): y = self.bn_in(self.one(y))",
        "y = self.two(y * self.count)",
        args="x, n, absent=None",
        conv=conv(2, 2, 3, bias=False),
        bn=nn.BatchNorm2d(2),
        one=linear(2, 2),
        two=linear(2, 2),
        bn_in=nn.BatchNorm1d(2),
        count=torch.zeros(()),
        plain=torch.ones(2),
    )
    made.two.weight = made.one.weight
    made.unread = nn.Parameter(torch.ones(3))
    made.register_buffer("hidden", torch.full((2,), 2.0), persistent=False)
    return randomise(made.double())


@pytest.mark.parametrize("form", ["plain", "core", "plain saved", "core saved"])
def test_all_kinds_of_state(form: str) -> None:
    args = (image(), {"k": image()})
    program = torch.export.export(mixed(), args, dynamic_shapes=({0: BATCH}, {"k": None}))
    program = form_of(program, form)
    folded = law(program, args, (image(5), args[1]))
    assert {"conv.weight", "unread", "count"} <= set(folded.state_dict)
    assert not [name for name in folded.state_dict if name.startswith("bn")]
    held = {*folded.state_dict, *folded.constants}
    inputs = folded.graph_signature.input_specs
    assert {s.target for s in inputs if s.kind is not InputKind.USER_INPUT} <= held
    with pytest.raises(AssertionError, match="Guard failed"):
        folded.module()(image(100), args[1])


def test_a_tensor_with_two_names_stays_one() -> None:
    model: Any = net("self.two(self.one(x).relu()), self.bn(self.conv(x))", one=linear(6, 6))
    model.two, model.conv, model.bn = linear(6, 6), conv(2, 2), norm([2, 3])
    model.double().eval().two.weight = model.one.weight
    program = torch.export.export(model, (image(),))
    folded = law(program, (image(),))
    assert folded.state_dict["one.weight"] is folded.state_dict["two.weight"]


@pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr")  # unflatten's own
def test_modules_that_are_called_twice() -> None:
    inner = net("self.bn(self.conv(x)) + x", conv=conv(2, 2, bias=False), bn=nn.BatchNorm2d(2))
    model = randomise(chain(nn.Sequential(inner, nn.BatchNorm2d(2)), inner, conv(2, 3)))
    folded = law(torch.export.export(model, (image(),)), (image(),))
    assert not [name for name in folded.state_dict if name.endswith("tracked")]
    x = image()
    close(torch.export.unflatten(folded)(x), model(x))


def test_what_a_run_changes_is_not_shared() -> None:
    args = (image(), {"k": image()})
    program = torch.export.export(mixed(), args)
    folded = bnfx.fold_bn(program)
    folded.module()(*args)
    assert program.state_dict["count"] == 0
    weights = (p.state_dict["unread"].data_ptr() for p in (program, folded))
    assert len(set(weights)) == 1


@pytest.mark.parametrize("form", ["plain", "core saved"])
def test_norms_that_stay_are_spelled_as_before(form: str) -> None:
    model = net(
        "self.group(self.bn(self.conv(x).relu() + x)), self.layer(x)",
        conv=conv(2, 2),
        bn=nn.BatchNorm2d(2),
        group=nn.GroupNorm(1, 2),
        layer=nn.LayerNorm(6),
    )
    shapes = ({0: BATCH, 2: SIZE},)
    program = torch.export.export(randomise(model), (image(),), dynamic_shapes=shapes)
    program = form_of(program, form)
    kept = law(program, (image(),), (image(3, 6),), left=1)
    names = [n.target for n in program.graph.nodes if n.op == "call_function"]
    assert {n.target for n in kept.graph.nodes if n.op == "call_function"} <= {
        *names,
        torch.ops.aten.sym_size.int,
    }


@pytest.mark.parametrize("form", ["plain", "core"])
def test_a_norm_whose_output_is_returned(form: str) -> None:
    model = net("y, y.relu()", "y = self.bn(self.conv(x))", conv=conv(2, 2), bn=nn.BatchNorm2d(2))
    law(form_of(torch.export.export(randomise(model), (image(),)), form), (image(),))


def test_arguments_stand_at_their_places() -> None:
    program = torch.export.export(chain(conv(2, 2, bias=False), norm([2, 3], [4, 5])), (image(),))
    folded = law(program, (image(),))
    [call] = [node for node in folded.graph.nodes if node.op == "call_function"]
    assert [str(arg) for arg in call.args] == ["input", "p_0_weight", "p_0_bias"]
    assert not call.kwargs


def test_paths_that_are_no_identifiers() -> None:
    model = nn.Sequential()
    model.add_module("block-0", conv(2, 2, bias=False))
    model.add_module("1 a", nn.BatchNorm2d(2))
    folded = law(torch.export.export(randomise(model.double()), (image(),)), (image(),))
    assert set(folded.state_dict) == {"block-0.weight", "block-0.bias"}


@pytest.mark.parametrize("form", ["plain", "core"])
def test_train_mode_is_told(form: str) -> None:
    program = torch.export.export(chain(conv(2, 2), nn.BatchNorm2d(2)).train(), (image(),))
    program = form_of(program, form)
    kept = law(program, (image(),), left=1)
    [record] = bnfx.report(kept).to_dict()["batch_norms"]
    assert "train mode" in record["reason"]


@pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr")  # unflatten's own
def test_the_calls_of_preserved_modules_go_on() -> None:
    inner: Any = chain(conv(2, 2, bias=False), nn.BatchNorm2d(2))
    model = randomise(net("self.after(self.inner(x)).relu()", inner=inner, after=nn.BatchNorm2d(2)))
    program = torch.export.export(model, (image(),), preserve_module_call_signature=("inner",))
    folded = law(program, (image(),), left=1)  # what `inner` returns stays what it is
    x = image()
    apart = torch.export.unflatten(folded)
    close(apart.get_submodule("inner")(x), inner(x))
    close(apart(x), model(x))


def test_every_door_takes_a_program(tmp_path: Path) -> None:
    parts = {"conv": conv(2, 2, 3), "bn": nn.BatchNorm2d(2)}
    model = randomise(net("{'y': self.bn(self.conv(x)), 'n': 2 * n['k']}", args="x, n", **parts))
    args = (image().float(), {"k": image().float()})
    shapes = ({0: BATCH, 2: 2 * SIZE}, {"k": {0: BATCH}})
    program, file = torch.export.export(model.float(), args, dynamic_shapes=shapes), tmp_path / "f"
    assert bnfx.plan_fold(program).folded == 1
    done = bnfx.deploy(program, None, file, num_inputs=2, batch_sizes=(5,))
    assert done.export.inputs == {"x": "float32[batch,2,dim_1,6]", "n_k": "float32[batch,2,6,6]"}
    assert done.fold.folded == 1
    written = bnfx.export_onnx(bnfx.fold_bn(program), None, file)
    assert written.inputs == done.export.inputs
    assert set(written.outputs) == {"y", "n"}
    assert bnfx.verify_onnx(program, file, num_inputs=2)


@pytest.mark.parametrize(
    "call",
    [
        bnfx.insert_bn,
        bnfx.plan_insert,
        lambda program: bnfx.recalibrate_bn(program, [image()]),
        lambda program: bnfx.recalibrate_bn(program.module(), [image()]),
        lambda program: bnfx.recipe(program, lr=0.1, weight_decay=0.1),
        lambda program: bnfx.apply_pass(bnfx.passes.RemoveDropout(), program),
    ],
)
def test_a_program_where_a_module_is_needed(call: Callable[[Any], object]) -> None:
    program = torch.export.export(chain(conv(2, 2), norm([2, 3])), (image(),))
    with pytest.raises(bnfx.BnfxError, match="that it was exported from"):
        call(program)


def test_linear_layers_of_core_aten_are_linear_layers() -> None:
    parts: Any = {name: linear(3, 3, bias=False) for name in "ab"}
    parts |= {name: nn.BatchNorm1d(3) for name in "vw"}
    model = randomise(net("self.v(self.a(x)) + self.w(self.b(x)) + x @ x.T", **parts))
    x = torch.randn(3, 3, dtype=torch.float64)
    core = torch.export.export(model, (x,)).run_decompositions()
    folded = law(core, (x,))
    calls = [n.target for n in folded.graph.nodes if n.op == "call_function"]
    aten = torch.ops.aten
    assert calls.count(aten.addmm.default) == 1  # both branches
    assert set(calls) <= {n.target for n in core.graph.nodes} | {aten.addmm.default}
    assert {"a.merged.weight", "a.merged.bias"} == set(folded.state_dict)


def test_computed_weights_are_parameters() -> None:
    scaled = "self.bn(F.conv2d(x, self.conv.weight * self.mask))"
    mask = torch.tensor([1.0, 0.5]).reshape(2, 1, 1, 1)
    model = net(scaled, conv=conv(2, 2, bias=False), bn=nn.BatchNorm2d(2), mask=mask)
    folded = law(torch.export.export(randomise(model), (image(),)), (image(),))
    assert not [node for node in folded.graph.nodes if "mul" in node.name]


def test_lowered_programs_are_refused() -> None:
    class Lowered(Verifier):
        dialect = "LOWERED"

    program = torch.export.export(chain(conv(2, 2), norm([2, 3])), (image(),))
    lowered = program._update(program.graph_module, program.graph_signature, verifiers=[Lowered])
    with pytest.raises(bnfx.CaptureError, match="lowered from"):
        bnfx.fold_bn(lowered)


def test_border_maps_need_sizes() -> None:
    model = randomise(net("self.conv(self.bn(x))", conv=conv(2, 2, 3, padding=1), bn=norm([2, 3])))
    program = torch.export.export(model, (image(),), dynamic_shapes=({0: BATCH},))
    assert norms(bnfx.fold_bn(program, border_maps=True)) == 0
    program = torch.export.export(model, (image(),), dynamic_shapes=({2: SIZE},))
    with pytest.raises(bnfx.FoldError, match="fixed sizes"):
        bnfx.fold_bn(program, border_maps=True)


@pytest.mark.parametrize("form", ["plain", "core"])
@pytest.mark.parametrize(
    ("result", "line"),
    [
        ("self.w, y, y, self.other.running_mean", "y = self.bn(self.conv(x))"),
        ("self.bn(self.conv(x)), x", "x.add_(1)"),
        ("self.bn(self.conv(x)) * x[x > 0].sum().item()", ""),
        ("y", "with torch.autocast('cpu', torch.bfloat16): y = self.bn(self.conv(x))"),
        ("self.other(x), self.conv.weight", "self.seen.copy_(self.bn(self.conv(x)).mean())"),
    ],
)
def test_programs_with_effects_branches_and_parameters_returned(
    result: str, line: str, form: str
) -> None:
    parts: Any = {"conv": conv(2, 2), "bn": nn.BatchNorm2d(2), "w": nn.Parameter(torch.ones(2))}
    model = net(result, line or "pass", **parts, other=nn.BatchNorm2d(2), seen=torch.zeros(()))
    program = form_of(torch.export.export(randomise(model), (image(),)), form)
    folded = bnfx.fold_bn(program)
    assert bnfx.report(folded).to_dict()["batch_norms"]
    law(program, (image(),), (-image(),), left=norms(folded))
    whole = "autocast" in line and form == "plain"  # core ATen has no such parts
    assert norms(folded) == whole + ("self.other(" in result)


class Between(nn.Module):
    """Convolution, something that moves elements, BatchNorm."""

    def __init__(self, moves: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.moves, self.norm = nn.Conv2d(2, 4, 1), moves, nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(self.moves(self.conv(x)))
        return y


@pytest.mark.parametrize("form", ["plain", "core", "core saved"])
@pytest.mark.parametrize(
    "moves",
    [
        nn.CircularPad2d((1, 2, 0, 3)),
        nn.ReflectionPad2d((1, 2, 0, 3)),
        nn.ReplicationPad2d((1, 2, 0, 3)),
        nn.Upsample(scale_factor=2),
        lambda y: y.roll((1, 2), (2, 3)),
        lambda y: y[:, :, torch.tensor([0, 2, 2])],
        lambda y: y[:, torch.tensor([3, 0, 1, 2])],
        lambda y: y[:, :, torch.tensor([[0, 2]]), torch.tensor([[1], [0]])],
        lambda y: y.index_select(2, torch.tensor([1, 1])),
    ],
)
def test_moved_elements_keep_their_gauges(form: str, moves: Callable[[Tensor], Tensor]) -> None:
    model = randomise(Between(moves)).double()
    open_sizes = {0: BATCH} if form == "plain" else {0: BATCH, 3: SIZE}
    try:
        program = torch.export.export(model, (image(),), dynamic_shapes=(open_sizes,))
    except (ValueError, RuntimeError):  # a reflection asks for the size
        program = torch.export.export(model, (image(),), dynamic_shapes=({0: BATCH},))
    law(form_of(program, form), (image(),), (image(5),))


def test_what_is_chosen_by_the_data_keeps_one_gauge() -> None:
    """Whatever the indices are; along the channels there would have to be one for all."""
    line = "y[:, :, (x[0, 0, 0] > 0).long()]"
    parts: dict[str, Any] = {"conv": nn.Conv2d(2, 4, 1), "norm": nn.BatchNorm2d(4)}
    for left, text in ((0, line), (1, line.replace("[:, :, ", "[:, "))):
        made = randomise(net(f"self.norm({text}[:, :4])", "y = self.conv(x)", **parts)).double()
        law(torch.export.export(made, (image(),)), (image(),), left=left)
