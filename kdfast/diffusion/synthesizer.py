"""From a diffusion model to labelled shards: resumable, sharded by rank, the same images whoever makes them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kdfast.data.codec import ImageFormat
from kdfast.data.writer import ShardWriter
from kdfast.diffusion.loop import Mode
from kdfast.diffusion.notes import REFUSED, SCORES, Scores, note, noted
from kdfast.diffusion.overlap import Background
from kdfast.diffusion.parts import check_same_run, joined, merge_parts, part_directory, shard_range
from kdfast.diffusion.sources import ModelSource, PipelineSource, Sampling, fingerprint
from kdfast.diffusion.subjects import make_source
from kdfast.errors import ConfigError, DataError
from kdfast.profiling import annotate, phase

_ATTEMPTS = 4
#: Gives each image a number: called with uint8 ``[B, 3, H, W]`` and int64 labels ``[B]``, both on the CPU.
Scorer = Callable[[torch.Tensor, torch.Tensor], Any]


@dataclass(frozen=True)
class SynthesisResult:
    """What :meth:`Synthesizer.write` did.

    Attributes:
        images: Images that this rank is responsible for and that are now on disk.
        written: Those of them that this call made; the rest were there from an earlier one.
        refused: Non-finite latents that were refused and drawn again, over all calls (``refused.jsonl`` lists them).
        complete: Whether the whole set, of all ranks, is in place.
        score: Mean of the scorer's numbers (``scores.jsonl`` lists them); ``None`` without one.
    """

    images: int
    written: int
    refused: int
    complete: bool
    score: float | None = None


class Synthesizer:
    """Generate labelled images by classifier-free guidance (DM-KD, Sec. 3) and write them as shards.

    Image n of a set is number ``n // len(classes)`` of class ``classes[n % len(classes)]``, so every prefix of the set
    is balanced. Its noise depends on (seed, class, number) alone: images do not change with the batch size beyond
    rounding, and not at all with the number of ranks, with resuming, or with a larger set.

    While a batch is sampled, the one before it is decoded (on CUDA on a stream of its own), encoded and written.

    Args:
        pipeline_or_model: One of

            - a denoiser that is called as ``DiTTransformer2DModel``, or ``DiTPipeline``, whose transformer, VAE and
              number of classes are taken;
            - ``StableDiffusionPipeline``, with ``class_names``;
            - any other pipeline of diffusers that takes ``class_labels``, or ``prompt`` with ``class_names``: it is
              called as it is, with a generator for each image.
        scheduler: One of kdfast's schedulers; ``None`` takes the pipeline's, swapped for kdfast's of the same name.
        vae: Decodes the latents to images in [-1, 1]; ``None`` for a model that works on pixels.
        num_classes: The null class has this number; ``None`` reads the model's ``num_embeds_ada_norm``.
        sample_shape: (C, H, W) of a latent; ``None`` reads the model's ``in_channels`` and ``sample_size``.
        class_names: For prompts: what each class is called.
        prompt: Template of a prompt; ``CLASS`` stands for the name. Of several each class's images take one in turn.
        num_inference_steps: T.
        guidance_scale: s ≥ 1; 1 leaves guidance out and halves the work.
        cfg_channels: Guide only the first so many channels; ``None`` guides all.
        eta: DDIM's η.
        seed: The run's seed.
        paper_rng: All classes share their noise, as in DM-KD's published code.
        device: Where to sample; ``None`` leaves the model where it is.
        weights_id: What tells these weights from others, kept in the manifest; ``None`` hashes them.
        mode: How the loop runs: ``"graph"`` (CUDA), ``"compile"``, ``"eager"``, or ``"auto"``.
        height, width: Of the images of a pipeline that takes prompts, in pixels; ``None`` takes its own.
        negative_prompt: What guidance leads away from; ``None`` is the empty prompt.

    Raises:
        ConfigError: Guidance below 1, more steps than the model was trained on, a scheduler that cannot guide, a
            model whose number of classes is unknown, or a pipeline that takes neither labels nor prompts.

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
        class_names: Sequence[str] | None = None,
        prompt: str | Sequence[str] = "A realistic photo of CLASS",
        num_inference_steps: int = 50,
        guidance_scale: float = 2.0,
        cfg_channels: int | None = None,
        eta: float = 0.0,
        seed: int = 0,
        paper_rng: bool = False,
        device: torch.device | str | None = None,
        weights_id: str | None = None,
        mode: Mode = "auto",
        height: int | None = None,
        width: int | None = None,
        negative_prompt: str | None = None,
    ) -> None:
        self.num_inference_steps, self.guidance_scale = num_inference_steps, guidance_scale
        self.cfg_channels, self.eta, self.seed, self.paper_rng = cfg_channels, eta, seed, paper_rng
        sampling = Sampling(
            num_inference_steps,
            guidance_scale,
            cfg_channels,
            eta,
            seed,
            paper_rng,
            mode,
            height,
            width,
            negative_prompt,
        )
        self.source: ModelSource | PipelineSource = make_source(
            pipeline_or_model,
            scheduler,
            sampling,
            vae=vae,
            num_classes=num_classes,
            sample_shape=sample_shape,
            class_names=class_names,
            prompt=prompt,
            device=device,
        )
        self.scheduler, self.num_classes = self.source.scheduler, self.source.num_classes
        self.device = self.source.device
        template = prompt if isinstance(prompt, str) else list(prompt)
        self.prompt = None if class_names is None else template
        asked = {"height": height, "width": width, "negative_prompt": negative_prompt}
        self._asked = {name: value for name, value in asked.items() if value is not None}
        self.class_names = None if class_names is None else tuple(class_names)
        self.weights_id = weights_id if weights_id is not None else fingerprint(*self.source.modules())

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
        latents, refused = self._finite_latents(classes, indices)
        return self._decode(latents), refused

    def write(
        self,
        directory: str | os.PathLike[str],
        images: int,
        *,
        classes: Sequence[int] | None = None,
        batch_size: int = 64,
        samples_per_shard: int = 1000,
        image_format: ImageFormat = "jpg",
        quality: int = 95,
        resume: bool = False,
        rank: int = 0,
        world_size: int = 1,
        scorer: Scorer | None = None,
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
            image_format: ``"jpg"``, ``"png"`` or ``"webp"``.
            quality: Of JPEG and WebP.
            resume: Continue what an earlier call began.
            rank: This process's number, from 0.
            world_size: How many processes share the work.
            scorer: Called with the images (uint8 ``[B, 3, H, W]``) and labels (int64 ``[B]``) of each batch, on the
                CPU; returns a number for each, such as ImageReward's. They are kept in ``scores.jsonl``.
            on_progress: Called with (done, total) images of this rank, at the start and as batches are finished.

        Raises:
            ConfigError: A class the model does not have, or a nonsensical size.
            DataError: The scorer's numbers are not one finite number an image.
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
                return _result(root, stop - start, 0, True)
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
            begun = start + writer.num_samples
            finish = _Finish(self, writer, Scores(target, scorer, begun) if scorer else None, begun)
            self._produce(finish, chosen, (start, begun, stop), batch_size, samples_per_shard, on_progress)
        complete = world_size == 1 or merge_parts(root, images, samples_per_shard, world_size)
        return _result(target if target.exists() else root, stop - start, stop - begun, complete)

    def metadata(self, classes: Sequence[int]) -> dict[str, Any]:
        """What makes a set of images this one: kept in the manifest, compared before a run is continued."""
        config = {k: v for k, v in dict(self.scheduler.config).items() if not k.startswith("_")}
        names = (
            {} if self.class_names is None else {"prompt": self.prompt, "class_names": list(self.class_names)}
        )
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
            "dtype": str(self.source.dtype()).removeprefix("torch."),
            "classes": list(classes),
            **names,
            **self._asked,
        }

    def _produce(
        self,
        finish: _Finish,
        chosen: tuple[int, ...],
        span: tuple[int, int, int],
        batch_size: int,
        samples_per_shard: int,
        on_progress: Callable[[int, int], None] | None,
    ) -> None:
        """Sample what is missing, handing each batch on to be finished meanwhile."""
        start, done, stop = span

        def report() -> None:
            if on_progress:
                on_progress(finish.done - start, stop - start)

        report()
        self.source.fill_to = min(batch_size, samples_per_shard)
        with Background(finish) as background:
            while done < stop:
                # Batches never cross a shard's end: a resumed run, which begins at one, then makes the same batches.
                end = min(done + batch_size, (done // samples_per_shard + 1) * samples_per_shard, stop)
                labels = [chosen[n % len(chosen)] for n in range(done, end)]
                indices = [n // len(chosen) for n in range(done, end)]
                latents, refused = self._finite_latents(labels, indices)
                background.put((latents, labels, refused))
                report()
                done = end
        self.source.fill_to = 0
        report()

    def _finite_latents(
        self, classes: Sequence[int], indices: Sequence[int]
    ) -> tuple[torch.Tensor, list[dict[str, int]]]:
        """Latents of these keys, those that are not finite drawn again; see :meth:`sample`."""
        if wrong := sorted({c for c in classes if not 0 <= c < self.num_classes}):
            raise ConfigError(f"classes: got {wrong[0]}, accepted: 0 to {self.num_classes - 1}")
        classes, indices = list(classes), list(indices)
        latents = self._latents(classes, indices, 0)
        refused: list[dict[str, int]] = []
        for attempt in range(1, _ATTEMPTS + 1):
            bad = (~latents.flatten(1).isfinite().all(dim=1)).nonzero().flatten().tolist()
            if not bad:
                return latents, refused
            refused += [{"class": classes[i], "index": indices[i], "attempt": attempt - 1} for i in bad]
            if attempt < _ATTEMPTS:
                latents[bad] = self._latents([classes[i] for i in bad], [indices[i] for i in bad], attempt)
        first = refused[-1]
        raise DataError(
            f"class {first['class']}, index {first['index']}: the latent is not finite after {_ATTEMPTS} draws; "
            "the model's weights are damaged, or its precision too low (try float32 or bfloat16)"
        )

    def _latents(self, classes: list[int], indices: list[int], attempt: int) -> torch.Tensor:
        return self.source.draw(classes, indices, attempt)

    def _decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents to uint8 ``[B, 3, H, W]``; grey images are repeated to three channels."""
        images = self.source.decode(latents)
        pixels = (images * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)
        return pixels.expand(-1, 3, -1, -1) if pixels.shape[1] == 1 else pixels

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


class _Finish:
    """What is left of a batch once it is sampled: decode, score, encode, write."""

    def __init__(self, owner: Synthesizer, writer: ShardWriter, scores: Scores | None, done: int) -> None:
        self._owner, self._writer, self._scores, self.done = owner, writer, scores, done
        self._stream = torch.cuda.Stream(owner.device) if owner.device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def __call__(self, batch: tuple[torch.Tensor, list[int], list[dict[str, int]]]) -> None:
        latents, labels, refused = batch
        if self._stream is None:
            pixels = self._owner._decode(latents)
        else:
            # The latents are complete: they were looked at for non-finite values before they came here.
            with torch.cuda.stream(self._stream):
                latents.record_stream(self._stream)
                pixels = self._owner._decode(latents).cpu()
        if refused:
            note(self._writer.directory / REFUSED, refused)
        targets = torch.tensor(labels)
        if self._scores is not None:
            self._scores.add(pixels, targets)
        with phase("synthesizer.write"):
            self._writer.write(pixels, targets)
        self.done += len(labels)


def _result(folder: Path, images: int, written: int, complete: bool) -> SynthesisResult:
    refused = len(noted(folder / REFUSED))
    scores = [entry["score"] for entry in noted(folder / SCORES)]
    score = sum(scores) / len(scores) if scores else None
    return SynthesisResult(images, written, refused, complete, score)
