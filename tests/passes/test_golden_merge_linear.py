"""MergeLinear as text, through fold_bn: linear maps in sequence, and sequences that stay."""

from __future__ import annotations

import torch
from torch import nn

from tests.support.golden import Golden
from tests.support.networks import chain, conv, linear, net, norm

X = torch.randn(2, 2, 5, 5, dtype=torch.float64)


def test_linear_layers(golden: Golden) -> None:
    golden.fold(chain(linear(2, 2), linear(2, 2)), X[..., :2])


def test_a_product_and_a_linear_layer(golden: Golden) -> None:
    model = net("self.a(x @ self.w)", w=torch.ones(2, 2), a=linear(2, 2))
    golden.fold(model, X[..., :2])


def test_a_kernel_behind_one_of_size_one(golden: Golden) -> None:
    golden.fold(chain(conv(2, 2), conv(2, 2, 2)), X)


def test_a_bias_of_zero_may_be_padded(golden: Golden) -> None:
    golden.fold(chain(conv(1, 1, bias=False), conv(1, 1, 3, padding=1)), X[:, :1])


def test_a_bias_may_not_be_padded(golden: Golden) -> None:
    golden.fold(chain(conv(1, 1), conv(1, 1, 3, padding=1)), X[:, :1])


def test_a_frame_that_depends_on_the_data_is_not_zero(golden: Golden) -> None:
    golden.fold(chain(conv(1, 1, 3, bias=False), conv(1, 1, 3, padding=1)), X[:, :1])


def test_a_batch_norm_between(golden: Golden) -> None:
    golden.fold(chain(conv(2, 2), norm([2, 4], [1, -1]), conv(2, 2)), X)


def test_strides_multiply(golden: Golden) -> None:
    golden.fold(chain(conv(1, 1, stride=2), conv(1, 1, 2, stride=2)), X[:, :1])


def test_a_wide_layer_is_not_made_of_narrow_ones(golden: Golden) -> None:
    golden.fold(chain(linear(64, 16), linear(16, 64)), torch.randn(2, 64).double())


def test_what_others_read_stays(golden: Golden) -> None:
    golden.fold(net("self.b(y), y", "y = self.a(x)", a=conv(2, 2), b=conv(2, 2)), X)


def test_a_nonlinearity_parts(golden: Golden) -> None:
    golden.fold(net("self.b(torch.relu(self.a(x)))", a=conv(2, 2), b=conv(2, 2)), X)


def test_what_products_of_half_precision_lose(golden: Golden) -> None:
    model = chain(linear(2, 2, bias=False), linear(2, 2, bias=False)).half()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1e-4)
    golden.fold(model)


def test_zero_padding_goes_into_a_layer(golden: Golden) -> None:
    golden.fold(chain(nn.ZeroPad2d(1), conv(1, 1, 2)), X[:, :1])


def test_uneven_padding_stays(golden: Golden) -> None:
    golden.fold(chain(nn.ZeroPad2d((0, 1, 0, 1)), conv(1, 1, 2)), X[:, :1])


def test_sequences_beside_each_other(golden: Golden) -> None:
    model = net(
        "self.b(self.a(x)) + self.d(self.c(x)) + self.e(x)",
        a=conv(1, 1, bias=False),
        b=conv(1, 1, 3, padding=1),
        c=conv(1, 1, bias=False),
        d=nn.AvgPool2d(3, 1, 1),
        e=conv(1, 1),
    )
    golden.fold(model, X[:, :1])


def test_an_average_comes_before_a_layer_of_size_one(golden: Golden) -> None:
    golden.fold(chain(conv(2, 2), nn.AvgPool2d(2, ceil_mode=True)), X)


def test_an_average_over_space_comes_first(golden: Golden) -> None:
    golden.fold(net("self.a(x).mean((2, 3), keepdim=True)", a=conv(2, 2)), X)


def test_an_average_that_counts_padding_waits_for_a_bias(golden: Golden) -> None:
    golden.fold(chain(nn.ReLU(), conv(20, 2), nn.AvgPool2d(2, padding=1, ceil_mode=True)))


def test_not_asked_for(golden: Golden) -> None:
    golden.fold(chain(conv(2, 2), conv(2, 2)), X, merge_linear=False)
