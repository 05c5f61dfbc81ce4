"""From a folder of weights to the synthesizer that makes images with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from kdfast.diffusion import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    Synthesizer,
)
from kdfast.diffusion.plans import fused_scheduler
from kdfast.documents import Fields, read_json
from kdfast.errors import CheckpointError, ConfigError, require
from kdfast.experiments.common.results import SCHEDULER, TRANSFORMER
from kdfast.experiments.synth.config import SynthConfig

VAE, INDEX = "vae", "model_index.json"
_FEATURE = "kdfast synth --source diffusion"
#: By the recipe's word; ``own`` begins as DDIM does where a model brings no scheduler.
_SAMPLERS: dict[str, Any] = {
    "ddim": DDIMScheduler,
    "ddpm": DDPMScheduler,
    "dpm_solver": DPMSolverMultistepScheduler,
    "euler": EulerDiscreteScheduler,
    "euler_ancestral": EulerAncestralDiscreteScheduler,
    "lcm": LCMScheduler,
}
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# diffusers and safetensors raise these, and a few of their own, for files that are not what they should be.
_BROKEN = (OSError, ValueError, RuntimeError, KeyError, NotImplementedError, TypeError, AttributeError)


def load_generator(config: SynthConfig, device: torch.device) -> Synthesizer:
    """The synthesizer over the networks in ``config.weights``.

    Raises:
        CheckpointError: They cannot be read, or do not match their config.
        ConfigError: A value makes no sense for this model; named by its key in the recipe.
    """
    root = Path(config.weights or "")
    if not root.exists():
        raise CheckpointError(f"weights {root}: does not exist, or is no directory")
    if _is_pipeline(root):
        subject, scheduler, vae = _pipeline(root, config, device)
    else:
        subject, scheduler, vae = _parts(root, config)
    source = scheduler if scheduler is not None else subject.scheduler
    trained = int(source.config.num_train_timesteps)
    if config.steps > trained:
        raise ConfigError(
            f"steps: got {config.steps}, accepted: 1 to {trained}, the steps that the model was trained on"
        )
    return Synthesizer(
        subject,
        scheduler,
        vae=vae,
        class_names=class_names(config),
        prompt=config.prompt,
        negative_prompt=config.negative_prompt,
        height=config.height,
        width=config.width,
        num_inference_steps=config.steps,
        guidance_scale=config.guidance_scale,
        cfg_channels=config.cfg_channels,
        eta=config.eta,
        seed=config.seed,
        paper_rng=config.paper_rng,
        device=device,
        mode=config.mode,
    )


def class_names(config: SynthConfig) -> tuple[str, ...] | None:
    """The classes' names: given in the recipe, or one a line in a text file.

    Raises:
        ConfigError: The file cannot be read, or holds no name.
    """
    if not isinstance(config.class_names, str):
        return config.class_names
    try:
        lines = Path(config.class_names).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or error
        raise ConfigError(f"class_names {config.class_names}: cannot be read: {why}") from error
    while lines and not lines[-1].strip():
        lines.pop()
    if not lines:
        raise ConfigError(
            f"class_names {config.class_names}: is empty, accepted: a name a line, in the labels' order"
        )
    return tuple(lines)


def _is_pipeline(root: Path) -> bool:
    """Whether a folder holds a whole pipeline other than DiT's, whose parts are taken one by one."""
    if not (root / INDEX).is_file():
        return False
    index = Fields(read_json(root / INDEX, error=CheckpointError), f"weights {root / INDEX}", CheckpointError)
    return index.optional("_class_name", index.text) != "DiTPipeline"


def _pipeline(root: Path, config: SynthConfig, device: torch.device) -> tuple[Any, Any, None]:
    diffusers = require("diffusers", extra="diffusion", feature=_FEATURE)
    if config.random_weights:
        raise ConfigError(
            f"random_weights: got true for the pipeline in {root}, accepted: a transformer's folder, or DiTPipeline's"
        )
    safe = _only_safetensors(root, config)
    try:
        pipe = diffusers.DiffusionPipeline.from_pretrained(
            str(root), local_files_only=True, use_safetensors=safe, torch_dtype=_DTYPES[config.precision]
        )
    except _BROKEN as error:
        raise CheckpointError(f"weights {root}: cannot be read: {' '.join(str(error).split())}") from error
    except Exception as error:  # safetensors raises an exception class of its own
        raise CheckpointError(f"weights {root}: is damaged: {error}") from error
    if getattr(pipe, "scheduler", None) is None:
        raise CheckpointError(f"weights {root}: {type(pipe).__name__} has no scheduler to sample with")
    return pipe.to(device), _pipeline_scheduler(config, pipe, diffusers), None


def _pipeline_scheduler(config: SynthConfig, pipe: Any, diffusers: Any) -> Any:
    """The sampler over the pipeline's own noise schedule; None leaves a pipeline its own."""
    if config.sampler == "own":
        fused = isinstance(pipe, diffusers.StableDiffusionPipeline)
        return fused_scheduler(pipe.scheduler) if fused else None
    if "Flow" in type(pipe.scheduler).__name__:
        raise ConfigError(
            f"sampler: got {config.sampler!r}, accepted: own, as {type(pipe).__name__} is trained for flow matching"
        )
    kind = _SAMPLERS.get(config.sampler, DDIMScheduler)
    return kind.from_config({k: v for k, v in pipe.scheduler.config.items() if not k.startswith("_")})


def _parts(root: Path, config: SynthConfig) -> tuple[Any, Any, Any]:
    """A class-conditional transformer, its scheduler, and a VAE where there is one."""
    diffusers = require("diffusers", extra="diffusion", feature=_FEATURE)
    if root.is_file():
        model = _from_file(diffusers.DiTTransformer2DModel, root, config)
        root = root.parent.parent if root.parent.name == TRANSFORMER else root.parent
    else:
        whole = (root / TRANSFORMER / "config.json").exists()
        model = _network(diffusers.DiTTransformer2DModel, root / TRANSFORMER if whole else root, config)
    vae = _network(diffusers.AutoencoderKL, root / VAE, config) if (root / VAE).is_dir() else None
    return model, _scheduler(config, root / SCHEDULER, model), vae


def _scheduler(config: SynthConfig, folder: Path, model: Any) -> Any:
    """The sampler over the noise schedule that the model was trained with; DiT's where no config says."""
    diffusers = require("diffusers", extra="diffusion", feature=_FEATURE)
    kind = _SAMPLERS.get(config.sampler, DDIMScheduler)
    try:
        settings = dict(kind.load_config(str(folder))) if folder.is_dir() else {}
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be read: {' '.join(str(error).split())}") from error
    if config.sampler == "own" and settings:
        theirs = getattr(diffusers, str(settings.get("_class_name")), None)
        if theirs is None:
            raise CheckpointError(
                f"{folder}: names {settings.get('_class_name')!r}, which diffusers does not have"
            )
        return fused_scheduler(theirs.from_config(settings))
    settings = settings or {"beta_schedule": "linear", "clip_sample": False}
    if config.sampler == "ddpm":
        learned = model.config.out_channels == 2 * model.config.in_channels
        settings |= {
            "timestep_spacing": "linspace",  # as the paper respaces: both ends included
            "variance_type": "learned_range" if learned else "fixed_small",
        }
    return kind.from_config(settings)


def _network(kind: Any, folder: Path, config: SynthConfig) -> Any:
    """One of diffusers' networks from safetensors; unlike diffusers, never with part of its weights left random."""
    safe = config.random_weights or _only_safetensors(folder, config)
    try:
        if config.random_weights:
            return _random(kind, folder, config)
        network, found = kind.from_pretrained(
            str(folder),
            output_loading_info=True,
            use_safetensors=safe,
            local_files_only=True,
            torch_dtype=_DTYPES[config.precision],
        )
    except _BROKEN as error:
        raise CheckpointError(f"weights {folder}: cannot be read: {' '.join(str(error).split())}") from error
    except Exception as error:  # safetensors raises an exception class of its own
        raise CheckpointError(f"weights {folder}: is damaged: {error}") from error
    _complete(folder, found)
    return network


def _only_safetensors(folder: Path, config: SynthConfig) -> bool | None:
    """True, or None where weights that are pickles may be read too (by torch's restricted reader, as diffusers does).

    Raises:
        CheckpointError: There are pickles alone, and nobody said that they may be read.
    """
    if config.allow_pickle:
        return None
    for file in sorted(folder.rglob("*.bin")):
        if not any(file.parent.glob("*.safetensors")) and (file.parent / "config.json").exists():
            raise CheckpointError(
                f"weights {file}: is a pickle, which can run code when it is read, and there are no safetensors beside "
                "it; allow_pickle=true reads it by torch's restricted reader, or save the model again with diffusers "
                "(save_pretrained writes safetensors)"
            )
    return True


def _random(kind: Any, folder: Path, config: SynthConfig) -> Any:
    torch.manual_seed(config.seed)
    return kind.from_config(kind.load_config(str(folder))).to(_DTYPES[config.precision])


def _from_file(kind: Any, path: Path, config: SynthConfig) -> Any:
    """A network from one safetensors file, with its ``config.json`` beside it."""
    safetensors = require("safetensors.torch", extra="train", feature=_FEATURE)
    if path.suffix != ".safetensors":
        raise CheckpointError(f"weights {path}: is no folder and no .safetensors file")
    try:
        network = _random(kind, path.parent, config)
        if config.random_weights:
            return network
        tensors = safetensors.load_file(path)
    except _BROKEN as error:
        raise CheckpointError(f"weights {path}: cannot be read: {' '.join(str(error).split())}") from error
    except Exception as error:
        raise CheckpointError(f"weights {path}: is damaged: {error}") from error
    wanted = network.state_dict()
    _complete(
        path,
        {
            "missing_keys": sorted(wanted.keys() - tensors.keys()),
            "unexpected_keys": sorted(tensors.keys() - wanted.keys()),
            "mismatched_keys": [k for k in wanted if k in tensors and wanted[k].shape != tensors[k].shape],
        },
    )
    network.load_state_dict(tensors)
    return network


def _complete(place: Path, found: dict[str, Any]) -> None:
    """Refuse weights that are not those of the config, by the names of some of them."""
    for fault in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if keys := [str(key) for key in found.get(fault) or ()]:
            shown = ", ".join(keys[:5]) + (f" and {len(keys) - 5} more" if len(keys) > 5 else "")
            raise CheckpointError(
                f"weights {place}: do not match config.json: {fault.replace('_', ' ')} {shown}"
            )
