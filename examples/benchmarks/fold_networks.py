"""Networks of timm and torchvision that hold BatchNorm, with random weights and statistics."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bnfx.cli.libraries import open_torchvision

#: One for each family of timm that holds BatchNorm, and those that are hard to fold.
TIMM = (
    *("byobnet:test_byobnet", "byobnet:repvgg_a0", "byobnet:mobileone_s0", "byoanet:halonet_h1"),
    *("convmixer:convmixer_768_32", "cpubone:cpubone_nano", "cspnet:cs3darknet_focus_s"),
    *("cspnext:cspnext_tiny", "densenet:densenet121", "dla:dla46x_c", "dpn:dpn48b"),
    *("efficientformer:efficientformer_l1", "efficientformer_v2:efficientformerv2_s0"),
    *("efficientnet:test_efficientnet", "efficientnet:mixnet_s", "efficientvim:efficientvim_m1"),
    *("efficientvit_mit:efficientvit_b0", "efficientvit_msra:efficientvit_m0"),
    *("fasternet:fasternet_t0", "fastvit:fastvit_t8", "ghostnet:ghostnet_050"),
    *("ghostnet:ghostnetv2_100", "hardcorenas:hardcorenas_a", "hgnet:hgnetv2_b0"),
    *("hrnet:hrnet_w18_small", "iformer:iformer_t", "inception_next:inception_next_atto"),
    *("inception_resnet_v2:inception_resnet_v2", "inception_v3:inception_v3"),
    *("inception_v4:inception_v4", "levit:levit_128s", "maxxvit:test_coatnet"),
    *("mobilenetv3:mobilenetv3_small_050", "mobilenetv3:mobilenetv4_conv_small_035"),
    *("mobilevit:mobilevit_xxs", "nasnet:nasnetalarge", "nextvit:nextvit_small"),
    *("pnasnet:pnasnet5large", "regnet:regnetx_002", "repghost:repghostnet_050"),
    *("repvit:repvit_m1", "res2net:res2net50_14w_8s", "resnest:resnest14d", "resnet:resnet18"),
    *("resnetv2:resnetv2_18", "rexnet:rexnet_100", "selecsls:selecsls42"),
    *("senet:legacy_seresnet18", "shvit:shvit_s1", "sknet:skresnet18", "starnet:starnet_s050"),
    "swiftformer:swiftformer_xs",
    *("tiny_vit:tiny_vit_5m_224", "tresnet:tresnet_m", "vgg:vgg11_bn", "visformer:visformer_tiny"),
    *("volo:volo_d1_224", "vovnet:ese_vovnet19b_slim_dw", "xception:legacy_xception"),
    *("xception_aligned:xception41p", "xcit:xcit_nano_12_p8_224"),
)  # fmt: skip

_TORCHVISION = (
    *("densenet121", "efficientnet_b0", "efficientnet_v2_s", "googlenet", "inception_v3"),
    *("maxvit_t", "mnasnet0_5", "mobilenet_v2", "mobilenet_v3_small", "regnet_x_400mf"),
    *("regnet_y_400mf", "resnet18", "resnet50", "resnext50_32x4d", "shufflenet_v2_x0_5"),
    *("vgg11_bn", "wide_resnet50_2", "deeplabv3_mobilenet_v3_large", "fcn_resnet50"),
    *("lraspp_mobilenet_v3_large", "r3d_18", "mc3_18", "r2plus1d_18", "s3d"),
)

#: As "suite:name", without timm's family.
NETWORKS: tuple[str, ...] = (
    *(f"timm:{name.partition(':')[2]}" for name in TIMM),
    *(f"torchvision:{name}" for name in _TORCHVISION),
)

#: Those that bnfx folds and the other tools do not, and two that stay hard.
NAMED: tuple[str, ...] = (
    *("timm:levit_128s", "timm:resnetv2_18", "timm:nextvit_small", "timm:visformer_tiny"),
    *("timm:repghostnet_050", "timm:xception41p", "timm:inception_next_atto"),
    *("torchvision:maxvit_t", "timm:fastvit_t8", "timm:convmixer_768_32"),
    *("torchvision:densenet121", "timm:dpn48b", "timm:xcit_nano_12_p8_224", "timm:nasnetalarge"),
    *("timm:swiftformer_xs", "timm:test_coatnet", "timm:efficientvit_m0", "timm:iformer_t"),
    *("timm:repvit_m1", "timm:shvit_s1", "timm:starnet_s050", "timm:efficientformerv2_s0"),
)


def build(network: str) -> nn.Module:
    """The network "suite:name", in eval mode, weights from a fixed seed."""
    torch.manual_seed(0)
    suite, _, name = network.partition(":")
    models = open_torchvision()
    if suite == "timm":
        made = importlib.import_module("timm").create_model(name, pretrained=False)
    else:
        options: dict[str, Any] = {"weights": None}
        if ".segmentation." in models.get_model_builder(name).__module__:
            options["weights_backbone"] = None
        if name in ("googlenet", "inception_v3"):
            options["init_weights"] = False
        made = models.get_model(name, **options)
    assert isinstance(made, nn.Module)
    return made.eval()


def example(network: str, model: nn.Module, *, full_size: bool = False) -> Tensor:
    """Two inputs, of the smallest size (or, with `full_size`, the usual one) that fits."""
    config = getattr(model, "pretrained_cfg", None) or {}
    usual = int(config.get("input_size", (3, 224, 224))[-1])
    video = network in ("torchvision:s3d", "torchvision:r3d_18", "torchvision:mc3_18")
    video = video or network == "torchvision:r2plus1d_18"
    for side in (usual,) if full_size else (64, 96, 128, 160, 224, 256, usual):
        shape = (2, 3, 16, side, side) if video else (2, 3, side, side)
        x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        try:
            with torch.no_grad():
                model(x)
        except (RuntimeError, ValueError, AssertionError, TypeError):
            continue
        return x
    raise ValueError(f"no size of image fits {network}")


def randomise(model: nn.Module, *, negative: float = 0.0, tiny: float = 0.0) -> nn.Module:
    """Running statistics, gamma and beta at random, as a trained network might have them.

    Args:
        model: Changed in place.
        negative: Share of the gammas that are negative.
        tiny: Share of the gammas that are drawn, evenly in their logarithm, from 1e-6 to 1e-1.
    """
    generator = torch.Generator().manual_seed(0)

    def uniform(like: Tensor) -> Tensor:
        return torch.rand(like.shape, generator=generator)

    with torch.no_grad():
        for norm in model.modules():
            if not isinstance(norm, _BatchNorm):
                continue
            if norm.running_mean is None or norm.running_var is None:
                continue
            norm.running_mean.copy_(torch.randn(norm.running_mean.shape, generator=generator))
            norm.running_var.copy_(uniform(norm.running_var) + 0.5)
            if not norm.affine:
                continue
            gamma = uniform(norm.weight) + 0.5
            small = uniform(gamma) < tiny
            gamma[small] = 10 ** (5 * uniform(gamma)[small] - 6)
            gamma[uniform(gamma) < negative] *= -1
            norm.weight.copy_(gamma)
            norm.bias.copy_(torch.randn(gamma.shape, generator=generator))
    return model.eval()
