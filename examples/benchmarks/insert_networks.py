"""Networks of torchvision, timm and transformers with random weights, and inputs that fit them."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from bnfx.cli.libraries import open_torchvision

#: Words of timm's names, smallest networks first.
_SIZES = (
    *("test", "050", "atto", "femto", "pico", "nano", "xxs", "xxt", "xt", "tiny", "_t", "xs", "s0"),
    *("m0", "_s", "small", "18", "19", "26", "b0", "b1", "128", "10", "n12"),
)


@dataclass(frozen=True)
class Network:
    """One network to insert BatchNorm into.

    Attributes:
        suite: Where it comes from.
        name: Its name there.
        build: Makes it.
        inputs: Positional arguments for a batch of two, given the side of an image.
        kwargs: Keyword arguments.
        sides: Sides of images to try in turn, smallest first.
    """

    suite: str
    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[int], tuple[Any, ...]]
    kwargs: dict[str, Any] = field(default_factory=dict)
    sides: tuple[int, ...] = (64, 96, 224, 299)


def images(side: int) -> tuple[Tensor, ...]:
    """Two RGB images."""
    return (torch.randn(2, 3, side, side),)


def torchvision_networks() -> Iterator[Network]:
    """Classification, segmentation and video networks, and the backbones of the detectors."""
    models = open_torchvision()
    for name in models.list_models():
        if name.startswith(("quantized", "raft")):
            continue
        build = functools.partial(models.get_model, name, weights=None, weights_backbone=None)
        module = models.get_model_builder(name).__module__
        if ".detection." in module:
            yield Network("torchvision detection backbones", name, _backbone(build), images)
        elif ".segmentation." in module:
            yield Network("torchvision segmentation", name, build, images)
        elif ".video." in module:
            build = functools.partial(models.get_model, name, weights=None)
            yield Network("torchvision video", name, build, _clips, sides=(64, 112, 224))
        else:
            slow = name in ("googlenet", "inception_v3")  # drawing their initial weights is
            options = {"init_weights": False} if slow else {}
            build = functools.partial(models.get_model, name, weights=None, **options)
            yield Network("torchvision classification", name, build, images)


def _backbone(build: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    def made() -> nn.Module:
        backbone = build().backbone
        assert isinstance(backbone, nn.Module)
        return backbone

    return made


def _clips(side: int) -> tuple[Tensor, ...]:
    return (torch.randn(2, 3, 16, side, side),)


def timm_networks() -> Iterator[Network]:
    """One small network for each family of timm."""
    open_torchvision()
    timm = importlib.import_module("timm")
    for family in timm.list_modules():
        name = _smallest(timm.list_models(module=family))
        config = timm.get_pretrained_cfg(name)
        side = config.input_size[-1] if config is not None else 224
        build = functools.partial(timm.create_model, name, pretrained=False)
        sides = (side,) if config is None or config.fixed_input_size else (96, side)
        yield Network("timm", f"{family}: {name}", build, images, sides=tuple(dict.fromkeys(sides)))


def _smallest(names: list[str]) -> str:
    """The name that sounds smallest: building all of a family to compare them takes minutes."""

    def rank(name: str) -> int:
        return next((i for i, word in enumerate(_SIZES) if word in name), len(_SIZES))

    return min(names, key=lambda name: (rank(name), len(name), name))


_TINY = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}


def transformers_networks() -> Iterator[Network]:
    """Small configurations of what people train with transformers; empty where it is missing."""
    if importlib.util.find_spec("transformers") is None:
        return
    open_torchvision()  # transformers imports it where it is installed
    t = importlib.import_module("transformers")
    tokens = {
        "input_ids": torch.randint(0, 90, (2, 12)),
        "attention_mask": torch.ones(2, 12).long(),
    }
    pixels = {"pixel_values": torch.randn(2, 3, 64, 64)}
    text = {**_TINY, "vocab_size": 100, "max_position_embeddings": 32}
    t5 = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "vocab_size": 100}
    t5["decoder_start_token_id"] = 0
    whisper = {
        "d_model": 32,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "vocab_size": 100,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 64,
        "decoder_ffn_dim": 64,
        "num_mel_bins": 16,
        "max_source_positions": 30,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "decoder_start_token_id": 1,
    }
    wav = {
        **_TINY,
        "conv_dim": (16, 16),
        "conv_kernel": (10, 3),
        "conv_stride": (5, 2),
        "vocab_size": 32,
        "num_conv_pos_embeddings": 16,
        "num_conv_pos_embedding_groups": 2,
        "num_feat_extract_layers": 2,
    }
    mel = {"input_features": torch.randn(2, 16, 60), "decoder_input_ids": tokens["input_ids"]}
    both = {**tokens, "pixel_values": torch.randn(2, 3, 32, 32)}
    clip = {
        "text_config": {**text, "projection_dim": 16},
        "vision_config": {**_TINY, "image_size": 32, "patch_size": 8, "projection_dim": 16},
        "projection_dim": 16,
    }
    swin = {"embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4], "image_size": 64}
    mobilevit = {
        "hidden_sizes": [16, 24, 32],
        "neck_hidden_sizes": [8, 8, 16, 16, 16, 16, 32],
        "image_size": 64,
        "num_attention_heads": 2,
    }
    segformer = {
        "hidden_sizes": [16, 16, 32, 32],
        "depths": [1, 1, 1, 1],
        "decoder_hidden_size": 32,
        "num_attention_heads": [1, 2, 2, 4],
    }
    vit = {**_TINY, "image_size": 64, "patch_size": 16}
    gpt2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 100, "n_positions": 32}
    cases: tuple[tuple[str, str, dict[str, Any], dict[str, Any]], ...] = (
        ("ViTForImageClassification", "ViTConfig", vit, pixels),
        ("BertForSequenceClassification", "BertConfig", text, tokens),
        ("GPT2LMHeadModel", "GPT2Config", gpt2, tokens),
        ("T5ForConditionalGeneration", "T5Config", t5, {**tokens, "labels": tokens["input_ids"]}),
        ("WhisperForConditionalGeneration", "WhisperConfig", whisper, mel),
        ("Wav2Vec2ForCTC", "Wav2Vec2Config", wav, {"input_values": torch.randn(2, 800)}),
        ("CLIPModel", "CLIPConfig", clip, both),
        ("SegformerForSemanticSegmentation", "SegformerConfig", segformer, pixels),
        (
            "ConvNextForImageClassification",
            "ConvNextConfig",
            {"hidden_sizes": [16, 24, 32, 48], "depths": [1, 1, 1, 1]},
            pixels,
        ),
        ("MobileViTForImageClassification", "MobileViTConfig", mobilevit, pixels),
        ("SwinForImageClassification", "SwinConfig", swin, pixels),
        ("LlamaForCausalLM", "LlamaConfig", {**text, "num_key_value_heads": 2}, tokens),
    )
    for model, config, options, kwargs in cases:
        build = functools.partial(_transformer, t, model, config, options)
        yield Network("transformers", model, build, lambda _: (), kwargs, (0,))


def _transformer(t: Any, model: str, config: str, options: dict[str, Any]) -> nn.Module:
    made = getattr(t, model)(getattr(t, config)(**options))
    assert isinstance(made, nn.Module)
    return made
