"""A tiny language model, its texts, and a trainer's settings for one step that shows the gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch

__all__ = ["language_model", "one_step", "rows"]


def language_model(width: int, seed: int) -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=40,
        hidden_size=width,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=16,
    )
    return transformers.LlamaForCausalLM(config)


def rows() -> list[dict[str, torch.Tensor]]:
    """Eight texts, of which unequal numbers of tokens count."""
    ids = torch.randint(40, (8, 10), generator=torch.Generator().manual_seed(7))
    found = []
    for row, tokens in enumerate(ids):
        labels = tokens.clone()
        labels[: 1 + row % 5] = -100
        found.append({"input_ids": tokens, "labels": labels})
    return found


def one_step(out: str, batch: int, accumulate: int) -> dict[str, Any]:
    """Of ``transformers.TrainingArguments``: one step of SGD with rate 1 on a CPU, of ``batch · accumulate`` rows."""
    return {
        "output_dir": out,
        "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": accumulate,
        "max_steps": 1,
        "learning_rate": 1.0,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "report_to": [],
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
    }
