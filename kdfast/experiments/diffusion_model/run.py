"""Train a small class-conditional DiT in pixel space: the generator of the demo, and a way to have one offline.

The network predicts x₀ instead of the noise. At these sizes that is what makes it learn within minutes: clean images
lie close to a surface of few dimensions, noise fills all of them (Li and He, "Back to Basics: Let Denoising Generative
Models Denoise"). Its loss is weighted by min(SNR, 5) (Hang et al., Min-SNR).
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from kdfast.data.datasets import load_dataset, to_memory
from kdfast.errors import require
from kdfast.experiments.common.results import METRICS, SCHEDULER, TRANSFORMER, open_run
from kdfast.experiments.diffusion_model.batches import NoisyBatches
from kdfast.experiments.diffusion_model.config import DiffusionConfig
from kdfast.training import files
from kdfast.training.config import TrainerConfig
from kdfast.training.optim import OptimizerConfig, ScheduleConfig
from kdfast.training.rng import seed_everything
from kdfast.training.trainer import Trainer

_FEATURE = "training a diffusion model"

Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def run(
    config: DiffusionConfig, out: str | Path, *, resume: bool = False, progress: bool = True
) -> dict[str, Any]:
    """Train and save a diffusion model.

    Args:
        config: What to do.
        out: Result directory: ``transformer/`` and ``scheduler/`` as diffusers saves them (what ``kdfast synth`` takes
            as weights), ``metrics.json``, ``metrics.jsonl``, ``recipe.yaml``, ``checkpoints/``.
        resume: Go on from its latest checkpoint.
        progress: Show a progress bar.

    Returns:
        What ``metrics.json`` holds: ``loss`` on held-out images, ``parameters``, ``steps``, ``images``, ``seconds``.

    Raises:
        ConfigError: ``out`` holds another run.
        DataError: The data cannot be used.
        TrainingInterrupted: On Ctrl-C, after a checkpoint.
    """
    noising = _noising(config)
    train = to_memory(load_dataset(config.data, "train", image_size=config.image_size))
    test = to_memory(load_dataset(config.data, "test", image_size=config.image_size))
    seed_everything(config.seed)
    network = build_dit(config, train.num_classes)
    fixed = list(
        NoisyBatches(test, noising, config, train.num_classes, batches=-(-len(test) // config.batch_size))
    )
    trainer = Trainer(
        network,
        denoising_loss,
        TrainerConfig(
            epochs=config.epochs,
            seed=config.seed,
            device=config.device,
            clip_grad_norm=1.0,
            ema_decay=config.ema_decay,
            optimizer=OptimizerConfig("adamw", config.lr, weight_decay=0.01, betas=(0.9, 0.99)),
            schedule=ScheduleConfig(
                "cosine", warmup_epochs=min(1.0, 100 / config.steps_per_epoch), min_ratio=0.05
            ),
            log_every=min(25, config.steps_per_epoch),
            progress=progress,
        ),
        out=open_run(out, config, resume=resume),
        evaluate=lambda model: {"loss": _mean_loss(model, fixed)},
        fingerprint=json.loads(json.dumps(asdict(config))),
        name="diffusion model",
    )
    batches = NoisyBatches(train, noising, config, train.num_classes, batches=config.steps_per_epoch)
    result = trainer.fit(batches, resume=resume)
    folder, model = Path(out), cast(Any, result.model)
    model.save_pretrained(folder / TRANSFORMER)
    noising.save_pretrained(folder / SCHEDULER)
    metrics = {
        **result.metrics,
        "parameters": sum(p.numel() for p in network.parameters()),
        "steps": result.steps,
        "images": result.images,
        "seconds": round(result.seconds, 3),
    }
    files.write_json(folder / METRICS, metrics)
    return metrics


def build_dit(config: DiffusionConfig, num_classes: int) -> nn.Module:
    """diffusers' DiT with fresh weights, adaLN-Zero as its paper initialises it (Peebles and Xie, Sec. 3.2)."""
    diffusers = require("diffusers", extra="diffusion", feature=_FEATURE)
    dit: nn.Module = diffusers.DiTTransformer2DModel(
        num_attention_heads=config.heads,
        attention_head_dim=config.head_dim,
        in_channels=config.channels,
        out_channels=config.channels,
        num_layers=config.layers,
        sample_size=config.image_size,
        patch_size=config.patch_size,
        num_embeds_ada_norm=num_classes,
    )
    for name, module in dit.named_modules():
        # diffusers gives each block an embedding of its own, which would drop labels independently of the others':
        # the network would hardly ever see an image without any label. NoisyBatches drops them for all blocks at once.
        if hasattr(module, "dropout_prob"):
            module.dropout_prob = 0.0
        if isinstance(module, nn.Linear) and name.endswith(("norm1.linear", "proj_out_1", "proj_out_2")):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
    return dit


def denoising_loss(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Weighted squared error of the predicted x₀.

    Args:
        model: The DiT.
        batch: x_t ``[B, C, H, W]``, t ``[B]``, labels ``[B]``, x₀ ``[B, C, H, W]``, weights ``[B]``.
    """
    noisy, timesteps, labels, clean, weight = batch
    predicted = model(noisy, timestep=timesteps, class_labels=labels).sample.float()
    loss: torch.Tensor = (weight * (predicted - clean).square().flatten(1).mean(1)).mean()
    return loss


def _noising(config: DiffusionConfig) -> Any:
    diffusers = require("diffusers", extra="diffusion", feature=_FEATURE)
    return diffusers.DDIMScheduler(
        num_train_timesteps=config.timesteps,
        beta_schedule="linear",
        prediction_type="sample",
        clip_sample=True,
        timestep_spacing="leading",
    )


@torch.no_grad()
def _mean_loss(model: nn.Module, batches: list[Batch]) -> float:
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    losses = [float(denoising_loss(model, tuple(part.to(device) for part in batch))) for batch in batches]  # type: ignore[arg-type]
    model.train(was_training)
    return sum(losses) / len(losses)
