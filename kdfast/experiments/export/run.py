"""``kdfast export``: write a trained network as a file that runs without kdfast, read it back, and compare."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kdfast.data.manifest import is_shard_folder
from kdfast.errors import ConfigError, KDFastError, require
from kdfast.experiments.common.networks import load_teacher
from kdfast.experiments.export.config import IMAGES, ExportConfig
from kdfast.experiments.export.images import export_images
from kdfast.experiments.export.shards import write_inverted
from kdfast.models.outputs import logits_of
from kdfast.training import files
from kdfast.training.model_io import BEST, ModelConfig, save_weights

PREPROCESS = "preprocess.json"
#: The file of each format.
FILES = {
    "safetensors": "model.safetensors",
    "torchscript": "model.pt",
    "torch.export": "model.pt2",
    "onnx": "model.onnx",
}
_RTOL, _ATOL = 1e-3, 1e-4

Reader = Callable[[Tensor], Tensor]


class _Logits(nn.Module):
    """The network with a tensor for an output, whatever it puts out."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        """Logits of normalised images ``[B, C, H, W]``."""
        return logits_of(self.network(images))


def run(config: ExportConfig) -> dict[str, Any]:
    """Export.

    Args:
        config: What to write where.

    Returns:
        ``file``, ``preprocess``, ``bytes``, and ``difference``: the largest one between the network's logits and those
        of the file as it was read back. Of ``shards``: ``folder``, ``images``, ``classes``.

    Raises:
        ConfigError: There are no best weights.
        CheckpointError: The network cannot be read.
        MissingExtraError: A package that the format needs is not installed.
        KDFastError: The file, read back, gives other logits.
    """
    if is_shard_folder(config.run) or config.to in IMAGES:
        return export_images(config)
    if config.to == "shards":
        return write_inverted(config)
    source = config.run
    if config.weights == "best":
        source = str(Path(config.run) / BEST)
        if not Path(source).exists():
            raise ConfigError(
                f"--weights: got best, accepted: last; {config.run} holds no {BEST} (a run with test images has one)"
            )
    network, described = load_teacher(source, key="run")
    network = network.cpu().eval().requires_grad_(False)
    if config.out is None and not Path(config.run).is_dir():
        raise ConfigError(f"--out: missing; {config.run} is no directory to put the files into")
    folder = Path(config.out) if config.out is not None else Path(config.run) / "export"
    with files.reporting_disk(folder):
        folder.mkdir(parents=True, exist_ok=True)
    file = folder / FILES[config.to]
    facts = preprocessing(described)
    size = described.image_size
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(3, described.in_channels, size, size, generator=generator)
    read = _WRITERS[config.to](network, file, images[:2], facts)
    expected = _Logits(network)(images)
    found = read(images)
    if found.shape != expected.shape or not torch.allclose(found, expected, rtol=_RTOL, atol=_ATOL):
        raise KDFastError(f"{file}: read back, it gives other logits than {config.run}; do not use it")
    files.write_json(folder / PREPROCESS, facts)
    return {
        "file": str(file),
        "preprocess": str(folder / PREPROCESS),
        "bytes": file.stat().st_size,
        "difference": float((found - expected).abs().max()),
    }


def preprocessing(described: ModelConfig) -> dict[str, Any]:
    """What a picture goes through before the network sees it, and what comes out, as ``preprocess.json`` holds it."""
    return {
        "resize_shorter_side": described.image_size,
        "interpolation": "bilinear",
        "centre_crop": described.image_size,
        "scale": "to [0, 1]",
        "mean": list(described.mean),
        "std": list(described.std),
        "input": f"float32 [batch, {described.in_channels}, {described.image_size}, {described.image_size}], RGB",
        "output": f"logits, float32 [batch, {described.num_classes}]",
        "classes": list(described.classes),
        "model": described.model,
    }


def _safetensors(network: nn.Module, file: Path, images: Tensor, facts: dict[str, Any]) -> Reader:
    save_weights(file, network, {"preprocess": json.dumps(facts)})
    load = require("safetensors.torch", extra="train", feature="reading the exported file").load_file
    network.load_state_dict(load(file))
    return _Logits(network)


def _torchscript(network: nn.Module, file: Path, images: Tensor, facts: dict[str, Any]) -> Reader:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that TorchScript is old is known to whoever asks for it
        trace: Callable[..., Any] = torch.jit.trace
        load: Callable[..., Reader] = torch.jit.load
        traced = trace(_Logits(network), images, check_trace=False)
        torch.jit.save(traced, file, _extra_files={"preprocess.json": json.dumps(facts)})
        return load(file)


def _exported(network: nn.Module, images: Tensor) -> Any:
    batch = torch.export.Dim("batch", min=1, max=4096)
    return torch.export.export(_Logits(network), (images,), dynamic_shapes=({0: batch},))


def _torch_export(network: nn.Module, file: Path, images: Tensor, facts: dict[str, Any]) -> Reader:
    program = _exported(network, images)
    torch.export.save(program, file, extra_files={"preprocess.json": json.dumps(facts)})
    read: Reader = torch.export.load(file).module()
    return read


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Without a library's warnings of what it found not to be installed."""
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def _onnx(network: nn.Module, file: Path, images: Tensor, facts: dict[str, Any]) -> Reader:
    onnx = require("onnx", extra="export", feature="--to onnx")
    require("onnxscript", extra="export", feature="--to onnx")
    runtime = require("onnxruntime", extra="export", feature="checking the ONNX file")
    with warnings.catch_warnings(), _quiet("torch.onnx"):
        warnings.simplefilter("ignore")
        program: Any = torch.onnx.export(
            _Logits(network),
            (images,),
            dynamo=True,
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=4096)},),
            verbose=False,
        )
    model = program.model_proto
    for key, value in facts.items():
        entry = model.metadata_props.add()
        entry.key, entry.value = key, value if isinstance(value, str) else json.dumps(value)
    onnx.save(model, file)
    session = runtime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    return lambda given: torch.from_numpy(session.run(None, {"images": given.numpy()})[0])


_WRITERS: dict[str, Callable[[nn.Module, Path, Tensor, dict[str, Any]], Reader]] = {
    "safetensors": _safetensors,
    "torchscript": _torchscript,
    "torch.export": _torch_export,
    "onnx": _onnx,
}
