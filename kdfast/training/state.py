"""Nested states as JSON plus a flat dict of tensors, and back: what pickle is not needed for."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

# JSON has no tensors, tuples, bytes or keys that are not strings: these wrappers stand for them.
_TENSOR, _ARRAY, _TUPLE, _BYTES, _ITEMS = "$tensor", "$array", "$tuple", "$bytes", "$items"


def flatten(value: Any, name: str = "state") -> tuple[Any, dict[str, torch.Tensor]]:
    """Split a nested state into a JSON document and named CPU tensors.

    Args:
        value: Dicts, lists and tuples of tensors, NumPy arrays, numbers, strings, bytes, booleans and ``None``.
        name: What this is, for the error message.

    Returns:
        The document, and the tensors: contiguous, none sharing storage. A flat dict of tensors keeps its keys, so
        that a model's file can be read by any safetensors reader.

    Raises:
        TypeError: Something in it is none of these; the message says where.
    """
    tensors: dict[str, torch.Tensor] = {}
    storages: set[int] = set()

    def keep(tensor: torch.Tensor, path: tuple[str, ...]) -> str:
        key = ".".join(path) or "value"
        while key in tensors:
            key += "_"
        kept = tensor.detach().cpu().contiguous()
        storage = kept.untyped_storage()
        if storage.data_ptr() in storages or storage.nbytes() != kept.numel() * kept.element_size():
            kept = kept.clone()  # tied weights and views: each gets bytes of its own
        storages.add(kept.untyped_storage().data_ptr())
        tensors[key] = kept
        return key

    def encode(item: Any, path: tuple[str, ...]) -> Any:
        if item is None or isinstance(item, (bool, str)):
            return item
        if isinstance(item, (int, float)):
            return item
        if isinstance(item, torch.Tensor):
            return {_TENSOR: keep(item, path)}
        if isinstance(item, np.generic):
            return item.item()
        if isinstance(item, np.ndarray):
            raw = torch.from_numpy(np.frombuffer(item.tobytes(), dtype=np.uint8).copy())
            return {_ARRAY: keep(raw, path), "dtype": item.dtype.str, "shape": list(item.shape)}
        if isinstance(item, (bytes, bytearray)):
            return {_BYTES: base64.b64encode(item).decode()}
        if isinstance(item, Mapping):
            if all(isinstance(key, str) and not key.startswith("$") for key in item):
                return {key: encode(entry, (*path, key)) for key, entry in item.items()}
            return {_ITEMS: [[encode(k, path), encode(v, (*path, str(k)))] for k, v in item.items()]}
        if isinstance(item, (list, tuple)):
            entries = [encode(entry, (*path, str(i))) for i, entry in enumerate(item)]
            return {_TUPLE: entries} if isinstance(item, tuple) else entries
        where = ".".join((name, *path))
        raise TypeError(f"{where}: a {type(item).__name__} cannot be checkpointed (no pickle is written)")

    return encode(value, ()), tensors


def first_not_finite(states: Any) -> str | None:
    """The name of a tensor in a nested state that holds a NaN or an infinity; ``None`` if none does.

    All are asked with one wait for the device, and each by name only if one of them does.
    """
    found: list[tuple[str, torch.Tensor]] = []

    def collect(item: Any, name: str) -> None:
        if isinstance(item, torch.Tensor):
            if item.is_floating_point() and item.numel():
                found.append((name, item))
        elif isinstance(item, Mapping):
            for key, entry in item.items():
                collect(entry, f"{name}.{key}" if name else str(key))
        elif isinstance(item, (list, tuple)):
            for entry in item:
                collect(entry, name)

    collect(states, "")
    # A sum is finite only if every value is, unless it overflows by itself: then each is looked at.
    sums = [tensor.detach().double().abs().sum() for _, tensor in found]
    if not sums or bool(torch.isfinite(torch.stack([value.to(sums[0].device) for value in sums]).sum())):
        return None
    return next((name for name, tensor in found if not bool(torch.isfinite(tensor).all())), None)


def unflatten(document: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    """Rebuild what :func:`flatten` split.

    Raises:
        KeyError: The document names a tensor that is not there.
    """
    if isinstance(document, list):
        return [unflatten(entry, tensors) for entry in document]
    if not isinstance(document, dict):
        return document
    if _TENSOR in document:
        return tensors[document[_TENSOR]]
    if _ARRAY in document:
        raw = tensors[document[_ARRAY]].numpy().tobytes()
        return np.frombuffer(raw, dtype=np.dtype(document["dtype"])).reshape(document["shape"]).copy()
    if _BYTES in document:
        return base64.b64decode(document[_BYTES])
    if _TUPLE in document:
        return tuple(unflatten(entry, tensors) for entry in document[_TUPLE])
    if _ITEMS in document:
        return {unflatten(key, tensors): unflatten(entry, tensors) for key, entry in document[_ITEMS]}
    return {key: unflatten(entry, tensors) for key, entry in document.items()}
