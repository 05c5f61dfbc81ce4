"""From a diffusion model to labelled shards: resumable, sharded by rank, the same images whoever makes them."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from kdfast.data.writer import ShardWriter
from kdfast.diffusion.parts import check_same_run, joined, merge_parts, part_directory, shard_range
from kdfast.diffusion.sampling import sample_latents, sample_noise, step_generators
from kdfast.errors import ConfigError, DataError
from kdfast.profiling import annotate, phase

REFUSED = "refused.jsonl"
_ATTEMPTS = 4


@dataclass(frozen=True)
class SynthesisResult:
    """What :meth:`Synthesizer.write` did.

    Attributes:
        images: Images that this rank is responsible for and that are now on disk.
        written: Those of them that this call made; the rest were there from an earlier one.
        refused: Non-finite latents that were refused and drawn again, over all calls (``refused.jsonl`` lists them).
        complete: Whether the whole set, of all ranks, is in place.
    """

    images: int
    written: int
    refused: int
    complete: bool


class Synthesizer:
    """Generate labelled images by classifier-free guidance (DM-KD, Sec. 3) and write them as shards.

    Image n of a set is number ``n // len(classes)`` of class ``classes[n % len(classes)]``, so every prefix of the set
    is balanced. Its noise depends on (seed, class, number) alone: images do not change with the batch size beyond
    rounding, and not at all with the number of ranks, with resuming, or with a larger set.

    Args:
        pipeline_or_model: diffusers' ``DiTPipeline`` (its transformer, VAE and number of classes are taken), or a
            denoiser that is called as ``DiTTransformer2DModel``.
        scheduler: One of kdfast's schedulers; ``None`` takes the pipeline's, which must then be one.
        vae: Decodes the latents to images in [-1, 1]; ``None`` for a model that works on pixels.
        num_classes: The null class has this number; ``None`` reads the model's ``num_embeds_ada_norm``.
        sample_shape: (C, H, W) of a latent; ``None`` reads the model's ``in_channels`` and ``sample_size``.
        num_inference_steps: T.
        guidance_scale: s ≥ 1; 1 leaves guidance out and halves the work.
        cfg_channels: Guide only the first so many channels; ``None`` guides all.
        eta: DDIM's η.
        seed: The run's seed.
        paper_rng: All classes share their noise, as in DM-KD's published code.
        device: Where to sample; ``None`` leaves the model where it is.
        weights_id: What tells these weights from others, kept in the manifest; ``None`` hashes them.

    Raises:
        ConfigError: Guidance below 1, more steps than the model was trained on, a scheduler that cannot guide, or a
            model whose number of classes is unknown.

    Example:
        >>> synthesizer = Synthesizer(dit, DDIMScheduler(), guidance_scale=2.0)      # doctest: +SKIP
        >>> synthesizer.write("shards", 2000, batch_size=250, resume=True)           # doctest: +SKIP
    """

    def __init__(
        self,
        pipeline_or_model: Any,
        scheduler: Any = None,
        *,
        vae: Any = None,
        num_classes: int | None = None,
        sample_shape: tuple[int, int, int] | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 2.0,
        cfg_channels: int | None = None,
        eta: float = 0.0,
        seed: int = 0,
        paper_rng: bool = False,
        device: torch.device | str | None = None,
        weights_id: str | None = None,
    ) -> None:
        if isinstance(pipeline_or_model, torch.nn.Module):
            model = pipeline_or_model
        else:
            found = getattr(pipeline_or_model, "transformer", None)
            if not isinstance(found, torch.nn.Module):
                raise ConfigError(
                    f"pipeline_or_model: got {type(pipeline_or_model).__name__}, accepted: a denoiser (nn.Module) or a "
                    "pipeline with a class-conditional transformer, such as DiTPipeline"
                )
            model = found
            vae = vae if vae is not None else getattr(pipeline_or_model, "vae", None)
            scheduler = scheduler if scheduler is not None else pipeline_or_model.scheduler
        self.model, self.vae, self.scheduler = model.eval(), vae, scheduler
        self.num_inference_steps, self.guidance_scale = num_inference_steps, guidance_scale
        self.cfg_channels, self.eta, self.seed, self.paper_rng = cfg_channels, eta, seed, paper_rng
        self._check_sampler()
        self.num_classes = (
            num_classes if num_classes is not None else _from_config(model, "num_embeds_ada_norm")
        )
        self.sample_shape = sample_shape if sample_shape is not None else _sample_shape(model)
        if device is not None:
            self.model.to(device)
            if self.vae is not None:
                self.vae.to(device)
        self.device = next(self.model.parameters()).device
        self.weights_id = weights_id if weights_id is not None else fingerprint(self.model)
        scheduler.set_timesteps(num_inference_steps, device=self.device)

    @annotate("synthesizer.sample")
    def sample(
        self, classes: Sequence[int], indices: Sequence[int]
    ) -> tuple[torch.Tensor, list[dict[str, int]]]:
        """Make the images with these keys.

        A sample whose latent comes out non-finite is refused and drawn again with fresh noise.

        Args:
            classes: Class of each image.
            indices: Its index within the class.

        Returns:
            The images, uint8 ``[B, 3, H, W]`` on the model's device, and one entry for each refused draw.

        Raises:
            ConfigError: A class that the model does not have.
            DataError: Latents that stay non-finite: the weights or the precision are broken.
        """
        if wrong := sorted({c for c in classes if not 0 <= c < self.num_classes}):
            raise ConfigError(f"classes: got {wrong[0]}, accepted: 0 to {self.num_classes - 1}")
        classes, indices = list(classes), list(indices)
        latents = self._latents(classes, indices, 0)
        refused: list[dict[str, int]] = []
        for attempt in range(1, _ATTEMPTS + 1):
            bad = (~latents.flatten(1).isfinite().all(dim=1)).nonzero().flatten().tolist()
            if not bad:
                return self._decode(latents), refused
            refused += [{"class": classes[i], "index": indices[i], "attempt": attempt - 1} for i in bad]
            if attempt < _ATTEMPTS:
                latents[bad] = self._latents([classes[i] for i in bad], [indices[i] for i in bad], attempt)
        first = refused[-1]
        raise DataError(
            f"class {first['class']}, index {first['index']}: the latent is not finite after {_ATTEMPTS} draws; "
            "the model's weights are damaged, or its precision too low (try float32 or bfloat16)"
        )

    def write(
        self,
        directory: str | os.PathLike[str],
        images: int,
        *,
        classes: Sequence[int] | None = None,
        batch_size: int = 64,
        samples_per_shard: int = 1000,
        image_format: Literal["jpg", "png"] = "jpg",
        quality: int = 95,
        resume: bool = False,
        rank: int = 0,
        world_size: int = 1,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> SynthesisResult:
        """Write a set of labelled images, or this rank's part of it.

        Ranks own whole shards and work without talking to each other; whichever finishes last puts the parts together.
        After a kill at any point the same call with ``resume=True`` ends in the set of an undisturbed run.

        Args:
            directory: Created if missing.
            images: Size of the whole set.
            classes: Which classes to make; ``None`` for all.
            batch_size: Images sampled at a time.
            samples_per_shard: Images a shard.
            image_format: ``"jpg"`` or ``"png"``.
            quality: JPEG quality.
            resume: Continue what an earlier call began.
            rank: This process's number, from 0.
            world_size: How many processes share the work.
            on_progress: Called with (done, total) images of this rank, once at the start and after every batch.

        Raises:
            ConfigError: A class the model does not have, or a nonsensical size.
            ShardError: ``directory`` belongs to another run (both are named), or cannot be written.
        """
        chosen = tuple(range(self.num_classes)) if classes is None else tuple(classes)
        self._check_plan(chosen, images, batch_size, rank, world_size)
        root, metadata = Path(directory), self.metadata(chosen)
        start, stop = shard_range(images, samples_per_shard, rank, world_size)
        check_same_run(root, metadata)
        target = root
        if world_size > 1:
            if start == stop:  # more ranks than shards
                return SynthesisResult(0, 0, 0, merge_parts(root, images, samples_per_shard, world_size))
            if joined(root, images, resume=resume):
                return SynthesisResult(stop - start, 0, len(_noted(root / REFUSED)), True)
            target = part_directory(root, start, stop)
            check_same_run(target, metadata)
        with ShardWriter(
            target,
            samples_per_shard=samples_per_shard,
            image_format=image_format,
            quality=quality,
            num_classes=self.num_classes,
            resume=resume,
            metadata=metadata,
            first_sample=start,
        ) as writer:
            done = begun = start + writer.num_samples
            if on_progress:
                on_progress(done - start, stop - start)
            while done < stop:
                # Batches never cross a shard's end: a resumed run, which begins at one, then makes the same batches.
                end = min(done + batch_size, (done // samples_per_shard + 1) * samples_per_shard, stop)
                labels = [chosen[n % len(chosen)] for n in range(done, end)]
                pixels, refused = self.sample(labels, [n // len(chosen) for n in range(done, end)])
                if refused:
                    _note(target / REFUSED, refused)
                with phase("synthesizer.write"):
                    writer.write(pixels, torch.tensor(labels))
                done = end
                if on_progress:
                    on_progress(done - start, stop - start)
        complete = world_size == 1 or merge_parts(root, images, samples_per_shard, world_size)
        noted = target if target.exists() else root
        return SynthesisResult(stop - start, done - begun, len(_noted(noted / REFUSED)), complete)

    def metadata(self, classes: Sequence[int]) -> dict[str, Any]:
        """What makes a set of images this one: kept in the manifest, compared before a run is continued."""
        config = {k: v for k, v in dict(self.scheduler.config).items() if not k.startswith("_")}
        return {
            "generator": "diffusion",
            "weights": self.weights_id,
            "scheduler": type(self.scheduler).__name__,
            "scheduler_config": json.loads(json.dumps(config, default=str)),
            "num_inference_steps": self.num_inference_steps,
            "guidance_scale": self.guidance_scale,
            "cfg_channels": self.cfg_channels,
            "eta": self.eta,
            "seed": self.seed,
            "paper_rng": self.paper_rng,
            "dtype": str(next(self.model.parameters()).dtype).removeprefix("torch."),
            "classes": list(classes),
        }

    def _latents(self, classes: list[int], indices: list[int], attempt: int) -> torch.Tensor:
        key: dict[str, Any] = {"attempt": attempt, "paper_rng": self.paper_rng}
        # Schedulers with a step counter or history (multistep, Euler) start each batch afresh.
        self.scheduler.set_timesteps(self.num_inference_steps, device=self.device)
        return sample_latents(
            self.model,
            self.scheduler,
            sample_noise(self.seed, classes, indices, self.sample_shape, **key).to(self.device),
            torch.tensor(classes, device=self.device),
            guidance_scale=self.guidance_scale,
            null_class=self.num_classes,
            cfg_channels=self.cfg_channels,
            eta=self.eta,
            generators=step_generators(self.seed, classes, indices, **key),
        )

    @torch.no_grad()
    @annotate("synthesizer.decode")
    def _decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents to uint8 ``[B, 3, H, W]``; grey images are repeated to three channels."""
        images = latents
        if self.vae is not None:
            weight = next(self.vae.parameters())
            images = self.vae.decode(
                (latents / self.vae.config.scaling_factor).to(weight.dtype)
            ).sample.float()
        pixels = (images * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)
        return pixels.expand(-1, 3, -1, -1) if pixels.shape[1] == 1 else pixels

    def _check_sampler(self) -> None:
        if self.scheduler is None:
            raise ConfigError(
                "scheduler: got None, accepted: a kdfast scheduler, e.g. kdfast.diffusion.DDIMScheduler()"
            )
        if self.guidance_scale < 1:
            raise ConfigError(
                f"guidance_scale: got {self.guidance_scale}, accepted: at least 1 (1 is without guidance; below it "
                "the condition is weakened, which makes images of no class)"
            )
        if self.guidance_scale != 1 and not hasattr(self.scheduler, "step_cfg"):
            raise ConfigError(
                f"scheduler: got {type(self.scheduler).__module__}.{type(self.scheduler).__name__}, which has no "
                "step_cfg; use the scheduler of the same name from kdfast.diffusion"
            )
        trained = int(self.scheduler.config.num_train_timesteps)
        if not 1 <= self.num_inference_steps <= trained:
            raise ConfigError(
                f"num_inference_steps: got {self.num_inference_steps}, accepted: 1 to {trained}, the steps that the "
                "model was trained on"
            )

    def _check_plan(
        self, classes: tuple[int, ...], images: int, batch_size: int, rank: int, world_size: int
    ) -> None:
        if not classes or len(set(classes)) != len(classes):
            raise ConfigError(f"classes: got {list(classes)}, accepted: at least one class, each once")
        if wrong := [c for c in classes if not 0 <= c < self.num_classes]:
            raise ConfigError(f"classes: got {wrong[0]}, accepted: 0 to {self.num_classes - 1}")
        for name, value in (("images", images), ("batch_size", batch_size), ("world_size", world_size)):
            if value < 1:
                raise ConfigError(f"{name}: got {value}, accepted: at least 1")
        if not 0 <= rank < world_size:
            raise ConfigError(f"rank: got {rank}, accepted: 0 to {world_size - 1}")


def fingerprint(model: torch.nn.Module) -> str:
    """SHA-256 over a model's state dict: names, shapes and bytes."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _from_config(model: torch.nn.Module, key: str) -> int:
    value = getattr(getattr(model, "config", None), key, None)
    if value is None:
        raise ConfigError(f"num_classes: got None, and the model's config has no {key} to read it from")
    return int(value)


def _sample_shape(model: torch.nn.Module) -> tuple[int, int, int]:
    config = getattr(model, "config", None)
    channels, size = getattr(config, "in_channels", None), getattr(config, "sample_size", None)
    if channels is None or size is None:
        raise ConfigError("sample_shape: got None, and the model's config lacks in_channels or sample_size")
    height, width = size if isinstance(size, (tuple, list)) else (size, size)
    return int(channels), int(height), int(width)


def _note(path: Path, refused: list[dict[str, int]]) -> None:
    """Add to the list of refused draws; a batch that is made again after a crash is not counted twice."""
    fresh = [entry for entry in refused if entry not in _noted(path)]
    with open(path, "a") as handle:
        handle.writelines(json.dumps(entry) + "\n" for entry in fresh)


def _noted(path: Path) -> list[dict[str, int]]:
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
