"""Tiny diffusion models and pipelines with random weights, built on the spot."""

from __future__ import annotations

from typing import Any

import diffusers
import torch


def shaken(module: torch.nn.Module, std: float = 0.3, seed: int = 0) -> torch.nn.Module:
    """Weights whose output depends on everything that goes in; fresh ones barely tell classes apart."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=std, generator=generator)
    return module.eval()


def tiny_dit(channels: int = 4, out_channels: int | None = None, classes: int = 4, size: int = 8) -> Any:
    """A class-conditional transformer of some thousand weights."""
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=channels,
        out_channels=out_channels or channels,
        num_layers=1,
        sample_size=size,
        patch_size=4,
        num_embeds_ada_norm=classes,
        norm_num_groups=4,
    )
    return shaken(model, 0.1)


def tiny_vae(channels: int = 4) -> Any:
    """Latents to images of twice the side."""
    torch.manual_seed(1)
    return diffusers.AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=channels,
        norm_num_groups=4,
        layers_per_block=1,
        sample_size=16,
    ).eval()


def dit_pipeline(scheduler: Any = None, out_channels: int = 8) -> Any:
    """diffusers' DiTPipeline; its null class is number 1000."""
    pipe = diffusers.DiTPipeline(
        tiny_dit(4, out_channels, classes=1000),
        tiny_vae(),
        scheduler or diffusers.DDIMScheduler(clip_sample=False),
        id2label={0: "tench", 1: "goldfish, carp"},
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tokenizer(folder: Any) -> Any:
    """A CLIP tokenizer whose words are single characters."""
    import json

    from transformers import CLIPTokenizer

    letters = [chr(code) for code in range(33, 127)]
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: at for at, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=40)


def stable_diffusion(folder: Any, scheduler: Any = None) -> Any:
    """diffusers' StableDiffusionPipeline."""
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(2)
    words = tokenizer(folder)
    text = CLIPTextModel(
        CLIPTextConfig(
            hidden_size=16,
            intermediate_size=32,
            num_attention_heads=2,
            num_hidden_layers=1,
            vocab_size=len(words),
            max_position_embeddings=40,
            bos_token_id=len(words) - 2,
            eos_token_id=len(words) - 1,
            pad_token_id=len(words) - 1,
        )
    )
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(8, 8),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=2,
        norm_num_groups=4,
    )
    pipe = diffusers.StableDiffusionPipeline(
        tiny_vae(),
        text.eval(),
        words,
        unet.eval(),
        scheduler or diffusers.DDIMScheduler(clip_sample=False, steps_offset=1, set_alpha_to_one=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe
