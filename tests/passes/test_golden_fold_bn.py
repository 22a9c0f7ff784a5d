"""fold_bn as text: which weights carry what a BatchNorm did, and why one stays."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.support.golden import Golden
from tests.support.networks import chain, conv, linear, net, norm, numbered


def takes_no_eps() -> bool:
    """Whether BatchNorm computes with an eps of 0, which torch 2.11 refuses."""
    try:
        norm([1]).eval()(torch.ones(1, 1, 1, 1, dtype=torch.float64))
    except ValueError:
        return False
    return True


pytestmark = pytest.mark.skipif(not takes_no_eps(), reason="torch refuses an eps of 0")

X = torch.randn(2, 2, 5, 5, dtype=torch.float64)
ROWS = torch.randn(3, 2, dtype=torch.float64)


# What folds ---------------------------------------------------------------------------------------


def test_behind_a_convolution(golden: Golden) -> None:
    bn = norm([2, 4], [1, -1], mean=[3, 5], std=[2, 1])
    golden.fold(chain(conv(2, 2, bias=False), bn), X)


def test_behind_a_linear_layer(golden: Golden) -> None:
    golden.fold(chain(linear(2, 2), norm([2, -4], kind=nn.BatchNorm1d)), ROWS)


def test_behind_a_transposed_convolution_with_groups(golden: Golden) -> None:
    layer = numbered(nn.ConvTranspose2d(2, 4, 1, groups=2))
    golden.fold(chain(layer, norm([1, 2, 3, 4])), X)


def test_behind_a_group_norm(golden: Golden) -> None:
    golden.fold(chain(conv(2, 2), numbered(nn.GroupNorm(1, 2)), norm([2, 4], [1, 1])), X)


def test_before_a_convolution_that_pads_nothing(golden: Golden) -> None:
    golden.fold(chain(norm([2, 4], [1, -1]), conv(2, 2)), X)


def test_before_a_convolution_that_pads_by_reflection(golden: Golden) -> None:
    layer = conv(2, 1, 3, padding=1, padding_mode="reflect")
    golden.fold(chain(norm([2, 4], [1, -1]), layer), X)


def test_a_scale_alone_before_a_convolution_that_pads_zeros(golden: Golden) -> None:
    golden.fold(chain(norm([2, 4]), conv(2, 1, 3, padding=1)), X)


def test_between_two_layers_one_takes_it(golden: Golden) -> None:
    golden.fold(chain(conv(2, 2), norm([2, 4], [1, -1]), conv(2, 2)), X, merge_linear=False)


def test_beyond_the_range_of_half_precision(golden: Golden) -> None:
    layer = linear(2, 2)
    bn = norm([1, 1], mean=[900, 900], std=[0.01, 0.01], kind=nn.BatchNorm1d)
    golden.fold(chain(layer, bn).half())


def test_two_in_a_row(golden: Golden) -> None:
    golden.fold(chain(conv(2, 2), norm([2, 4], [1, -1]), norm([3, 5])), X)


def test_a_positive_scale_passes_a_rectifier(golden: Golden) -> None:
    golden.fold(chain(conv(2, 2), nn.ReLU(), norm([2, 4]), conv(2, 2)), X)


def test_a_map_passes_pooling_and_flattening(golden: Golden) -> None:
    layers = (nn.AdaptiveMaxPool2d(1), nn.Flatten(), linear(2, 1))
    golden.fold(chain(norm([2, 4], [1, -1]), *layers), X)


def test_through_a_residual_sum(golden: Golden) -> None:
    model = net(
        "self.last(self.bn(y + self.branch(torch.relu(y))))",
        "y = self.first(x)",
        first=conv(2, 2),
        branch=conv(2, 2),
        bn=norm([2, 2], [4, 6]),
        last=conv(2, 2),
    )
    golden.fold(model, X, given=True)


def test_through_a_concatenation_and_a_shuffle(golden: Golden) -> None:
    model = net(
        "self.bn(F.channel_shuffle(torch.cat([self.a(x), self.b(x)], 1), 2))",
        a=conv(2, 2),
        b=conv(2, 2),
        bn=norm([1, 2, 3, 4]),
    )
    golden.fold(model, X)


def test_a_factor_for_each_channel_goes_too(golden: Golden) -> None:
    model = net(
        "self.scale * self.bn(torch.relu(self.conv(x)))",
        conv=conv(2, 2),
        bn=norm([2, 4]),
        scale=torch.tensor([3.0, 5.0]).reshape(2, 1, 1),
    )
    golden.fold(model, X)


def test_a_gate_carries_a_scale(golden: Golden) -> None:
    model = net(
        "self.last(self.bn(y * torch.sigmoid(self.gate(y))))",
        "y = self.first(x)",
        first=conv(2, 2),
        gate=conv(2, 2),
        bn=norm([2, 4]),
        last=conv(2, 2),
    )
    golden.fold(model, X, given=True)


def test_rows_of_a_softmax_sum_to_one(golden: Golden) -> None:
    model = net(
        "self.out(self.bn((y @ self.v(x)).flatten(0, 1)))",
        "y = torch.softmax(self.q(x) @ self.k(x).mT, -1)",
        q=linear(2, 2),
        k=linear(2, 2),
        v=linear(2, 2),
        bn=norm([2, 4], [1, -1], kind=nn.BatchNorm1d),
        out=linear(2, 2),
    )
    golden.fold(model, torch.randn(2, 3, 2, dtype=torch.float64), given=True)


def test_a_function_without_gamma(golden: Golden) -> None:
    model = net(
        "F.batch_norm(self.conv(x), self.mean, self.var, eps=0.0)",
        conv=conv(2, 2),
        mean=torch.tensor([1.0, 2.0]),
        var=torch.tensor([4.0, 16.0]),
    )
    golden.fold(model, X)


class Arithmetic(nn.Module):
    """A BatchNorm as sums and products; mean 3 and 5, standard deviation 2 and 1 unless given."""

    def __init__(self, form: str = "x * s + t", std: Sequence[float] = (2, 1)) -> None:
        super().__init__()
        self.form = form
        self.register_buffer("running_mean", torch.tensor([3.0, 5.0]))
        self.register_buffer("running_var", torch.tensor(std) ** 2)

    def forward(self, x: Tensor) -> Any:
        scale = self.get_buffer("running_var").rsqrt()
        shape = (1, -1, 1, 1) if self.form != "rows" else (1, -1, 1)
        s, t = scale.reshape(shape), (-self.get_buffer("running_mean") * scale).reshape(shape)
        return torch.addcmul(t, x, s) if self.form == "addcmul" else x * s + t


def test_written_as_arithmetic(golden: Golden) -> None:
    golden.fold(chain(conv(2, 2), Arithmetic()), X)


def test_a_scale_of_zero_makes_a_constant(golden: Golden) -> None:
    golden.fold(chain(conv(2, 2), norm([0, 4], [7, 1])), X)


def test_nothing_reads_it(golden: Golden) -> None:
    model = net("self.conv(x)", "self.bn(x)", conv=conv(2, 2), bn=norm([2, 4]))
    golden.fold(model, X)


def test_an_identity_needs_no_weight(golden: Golden) -> None:
    golden.fold(chain(nn.GELU(), norm([1, 1]), nn.GELU()), X)


def test_arithmetic_that_is_an_identity(golden: Golden) -> None:
    norm = Arithmetic(std=(1, 1))
    norm.get_buffer("running_mean").zero_()
    golden.fold(chain(nn.GELU(), norm, nn.GELU()), X, given=True)


def test_two_that_undo_each_other(golden: Golden) -> None:
    golden.fold(
        chain(nn.GELU(), norm([2, 4], [1, 1]), norm([0.5, 0.25], [-0.5, -0.25]), nn.GELU()), X
    )


def test_assumed_ranks_are_checked(golden: Golden) -> None:
    golden.fold(
        net(
            "F.batch_norm(self.conv(x), self.mean, self.var, eps=0.0)",
            conv=conv(2, 2),
            mean=torch.zeros(2),
            var=torch.ones(2),
        ),
        X,
    )


def test_thresholds_let_any_map_through(golden: Golden) -> None:
    model = chain(conv(2, 2), nn.ReLU6(), norm([2, -4], [1, 1]))
    golden.fold(model, X, thresholds=True)


def test_a_border_map(golden: Golden) -> None:
    model = chain(norm([2, 4], [1, -1]), conv(2, 1, 3, padding=1, bias=False))
    golden.fold(model, X[..., :2, :2], given=True, border_maps=True)


# What stays ---------------------------------------------------------------------------------------


def test_before_a_convolution_that_pads_zeros(golden: Golden) -> None:
    golden.fold(chain(norm([2, 4], [1, -1]), conv(2, 2, 3, padding=1)), X)


def test_a_negative_scale_does_not_pass_a_rectifier(golden: Golden) -> None:
    golden.fold(chain(conv(2, 2), nn.ReLU(), norm([2, -4])), X)


def test_between_two_that_let_nothing_through(golden: Golden) -> None:
    golden.fold(chain(nn.GELU(), norm([2, 4]), nn.GELU()), X)


def test_channels_that_share_a_gauge(golden: Golden) -> None:
    bn = norm([2, 4], kind=nn.BatchNorm1d)
    golden.fold(chain(linear(3, 3), bn), torch.randn(2, 2, 3, dtype=torch.float64))


def test_a_counted_padding_lets_no_shift_through(golden: Golden) -> None:
    layers = (nn.AvgPool2d(3, padding=1), conv(2, 2))
    golden.fold(chain(nn.GELU(), norm([2, 4], [1, 1]), *layers), X)


def test_a_padding_of_its_own_lets_no_shift_through(golden: Golden) -> None:
    layers = (nn.ZeroPad2d(1), conv(2, 2))
    golden.fold(chain(nn.GELU(), norm([2, 4], [1, 1]), *layers), X, merge_linear=False)


def test_a_sum_lets_no_shift_through(golden: Golden) -> None:
    model = net(
        "self.fc(self.bn(torch.sin(x)).sum((2, 3)))", bn=norm([2, 4], [1, 1]), fc=linear(2, 2)
    )
    golden.fold(model, X)


def test_two_that_want_different_things_of_one_tensor(golden: Golden) -> None:
    model = net(
        "self.a(y), self.b(y)", "y = self.conv(x)", conv=conv(2, 2), a=norm([2, 4]), b=norm([3, 5])
    )
    golden.fold(model, X)


def test_a_scale_of_zero_behind_what_others_read(golden: Golden) -> None:
    model = net("self.bn(y), y", "y = self.conv(x)", conv=conv(2, 2), bn=norm([0, 1], [7, 0]))
    golden.fold(model, X)


def test_one_behind_it_has_a_scale_of_zero(golden: Golden) -> None:
    model = chain(conv(2, 2), norm([2, 4]), nn.GELU(), norm([3, 3]), norm([0, 1], [7, 0]))
    golden.fold(model, X)


def test_three_of_which_two_can_go(golden: Golden) -> None:
    model = net(
        "F.gelu(self.c(self.a(F.gelu(x)) + self.b(F.silu(x))))",
        a=norm([1, 1], [1, 2]),
        b=norm([1, 1], [3, 4]),
        c=norm([1, 1], [5, 6]),
    )
    golden.fold(model, X, given=True)


def test_joined_with_values_that_stay_before_a_layer(golden: Golden) -> None:
    model = net(
        "self.last(torch.cat([self.bn(y), y], 2))",
        "y = F.gelu(x)",
        bn=norm([2, 4]),
        last=conv(2, 2),
    )
    golden.fold(model, X, given=True)


def test_joined_with_values_that_stay_before_another(golden: Golden) -> None:
    model = net(
        "F.gelu(self.last(torch.cat([self.bn(y), y], 2)))",
        "y = F.gelu(x)",
        bn=norm([2, 4]),
        last=norm([1, 3]),
    )
    golden.fold(model, X, given=True)


def test_a_shift_that_costs_digits(golden: Golden) -> None:
    model = net(
        "self.last(self.bn(y)), self.other(y)",
        "y = self.first(x)",
        first=conv(2, 2),
        bn=norm([1e-3, 1], [1, 1]),
        last=conv(2, 2, 3, padding=1),
        other=conv(2, 2),
    )
    golden.fold(model, X, given=True)


def test_a_scale_beyond_the_dtype(golden: Golden) -> None:
    model = chain(nn.GroupNorm(1, 2), nn.ReLU(), norm([1e-7, 1]), nn.ReLU(), conv(2, 2))
    golden.fold(model, X)


def test_in_train_mode(golden: Golden) -> None:
    model = chain(conv(2, 2), norm([2, 4]))
    model.get_submodule("1").train()
    golden.fold(model)


def test_without_statistics(golden: Golden) -> None:
    golden.fold(chain(conv(2, 2), nn.BatchNorm2d(2, track_running_stats=False)), X)


def test_a_map_that_is_not_finite(golden: Golden) -> None:
    bn = norm([2, 4])
    bn.running_var[1] = -1.0
    golden.fold(chain(conv(2, 2), bn))


def test_a_scale_that_cannot_be_divided_by(golden: Golden) -> None:
    golden.fold(chain(conv(2, 2), norm([1e-320, 1.0], [1.0, 1.0])), X)


def test_a_gamma_that_is_computed(golden: Golden) -> None:
    model = net(
        "F.batch_norm(y, self.mean, self.var, y.mean((0, 2, 3)))",
        "y = self.conv(x)",
        conv=conv(2, 2),
        mean=torch.zeros(2),
        var=torch.ones(2),
    )
    golden.fold(model, X)


def test_an_eps_that_is_computed(golden: Golden) -> None:
    model = net(
        "F.batch_norm(self.conv(x), self.mean, self.var, eps=x.shape[0] * 1e-5)",
        conv=conv(2, 2),
        mean=torch.zeros(2),
        var=torch.ones(2),
    )
    golden.fold(model, X)


def test_a_shape_that_is_not_known(golden: Golden) -> None:
    model = net("F.batch_norm(x, self.mean, self.var)", mean=torch.zeros(2), var=torch.ones(2))
    golden.fold(model, X)


def test_inside_code_that_cannot_be_traced(golden: Golden) -> None:
    part = net("x if x.sum() > 1e9 else self.bn(x)", bn=norm([2, 4]))
    golden.fold(net("self.part(x)", part=part), X)


def test_inside_code_that_nothing_takes(golden: Golden) -> None:
    part = net("x if x.sum() > 1e9 else self.bn(x)", bn=norm([2, 4]))
    golden.fold(net("self.part(x)", part=part), X, given=True)


def test_behind_values_that_are_written_in_place(golden: Golden) -> None:
    model = net(
        "F.gelu(self.bn(torch.relu(y))), z",
        "y = self.conv(x)",
        "z = y[:, :1]",
        "y.add_(1)",
        conv=conv(2, 2),
        bn=norm([2, 4]),
    )
    golden.fold(model, X, given=True)


def test_on_the_meta_device(golden: Golden) -> None:
    golden.fold(chain(conv(2, 2), norm([2, 4])).to("meta"))


def test_hooks_see_what_goes_through(golden: Golden) -> None:
    model = chain(conv(2, 2), norm([2, 4]), nn.Sequential(norm([2, 4])))
    model.get_submodule("1").register_forward_hook(lambda *_: None)
    model.get_submodule("2").register_forward_hook(lambda *_: None)
    golden.fold(model, X)


def test_a_forward_of_its_own(golden: Golden) -> None:
    class Own(nn.BatchNorm2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if x.shape[0] > 1 else x

    model = nn.Sequential(conv(2, 2), Own(2)).double().eval()
    golden.fold(model, X)


def test_written_in_place(golden: Golden) -> None:
    model = net(
        "self.bn(y), z",
        "y = self.conv(x)",
        "z = y[:, :1]",
        "y.add_(1)",
        conv=conv(2, 2),
        bn=norm([2, 4]),
    )
    golden.fold(model, X)


def test_in_half_precision_scales_stay_small(golden: Golden) -> None:
    model = chain(nn.GroupNorm(1, 2), nn.ReLU(), norm([1e-3, 1]), nn.ReLU(), conv(2, 2)).half()
    golden.fold(model)


def test_arithmetic_between_two_that_let_nothing_through(golden: Golden) -> None:
    golden.fold(chain(nn.GELU(), Arithmetic(), nn.GELU()), X, given=True)


def test_arithmetic_of_another_form(golden: Golden) -> None:
    golden.fold(chain(conv(2, 2), Arithmetic("addcmul")), X)


def test_arithmetic_that_changes_the_dtype(golden: Golden) -> None:
    golden.fold(nn.Sequential(conv(2, 2).half(), Arithmetic()).eval())


def test_arithmetic_where_channels_share_a_gauge(golden: Golden) -> None:
    model = chain(linear(3, 3), Arithmetic("rows", std=(1, 1)))
    golden.fold(model, torch.randn(2, 2, 3, dtype=torch.float64), given=True)


def test_arithmetic_with_a_map_for_each_place(golden: Golden) -> None:
    norm = net(
        "(x - self.running_mean) * self.running_var.rsqrt()",
        running_mean=torch.arange(10.0).reshape(2, 1, 5),
        running_var=torch.ones(2, 1, 5),
    )
    golden.fold(chain(conv(2, 2), norm), X, given=True)


def test_inside_a_part_of_the_graph(golden: Golden) -> None:
    part = "with torch.autocast('cpu', torch.bfloat16): y = self.bn(self.conv(x))"
    golden.fold(net("y", part, conv=conv(2, 2), bn=norm([2, 4])), X, given=True)
