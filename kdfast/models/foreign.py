"""Other people's networks: 🤗 Transformers' image classifiers by ``hf:NAME``, one's own by ``FILE.py:FACTORY``.

Nothing here reads a pickle or runs code from a hub: weights are safetensors, and the only code that is run is a file
that the caller named.
"""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from kdfast.errors import require
from kdfast.models.outputs import logits_of

_OWN = re.compile(r"(?P<file>.+\.py):(?P<factory>[A-Za-z_]\w*)")


def is_own(name: str) -> bool:
    """Whether a name is ``FILE.py:FACTORY``."""
    return _OWN.fullmatch(name) is not None


def find_own(name: str, what: str = "model") -> Callable[..., Any]:
    """What ``FILE.py:NAME`` names; the file is run once.

    Raises:
        ValueError: There is no such file, or nothing of that name in it that can be called.
    """
    match = _OWN.fullmatch(name)
    if match is None:
        raise ValueError(f"{what}: got {name!r}, accepted: FILE.py:FACTORY")
    path = Path(match["file"]).resolve()
    if not path.is_file():
        raise ValueError(f"{what} {name!r}: {path} is no file")
    module = _import(path)
    found: Callable[..., Any] | None = getattr(module, match["factory"], None)
    if not callable(found):
        known = ", ".join(n for n, v in vars(module).items() if callable(v) and not n.startswith("_"))
        raise ValueError(
            f"{what} {name!r}: {path.name} has no {match['factory']!r}; it has {known or 'none'}"
        )
    return found


def create_own(
    name: str, num_classes: int | None, in_channels: int, options: Mapping[str, object]
) -> nn.Module:
    """Call a factory of a file. It is given ``num_classes`` and ``in_channels`` if it takes them.

    Raises:
        ValueError: There is no such file or factory, or it returns no module.
        TypeError: It does not take the options.
    """
    factory = find_own(name)
    given = dict(options)
    offered = {"in_channels": in_channels} | ({} if num_classes is None else {"num_classes": num_classes})
    taken = inspect.signature(factory).parameters
    anything = any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken.values())
    given |= {key: value for key, value in offered.items() if key in taken or anything}
    network = factory(**given)
    if not isinstance(network, nn.Module):
        raise ValueError(f"model {name!r}: got {type(network).__name__} from it, accepted: a torch.nn.Module")
    return with_logits(network)


def create_hugging_face(
    name: str, num_classes: int | None, in_channels: int, options: Mapping[str, object]
) -> nn.Module:
    """A classifier of 🤗 Transformers, with fresh weights or with ``pretrained=True`` the hub's.

    ``num_classes=None`` leaves the classifier as it is; another number than its own replaces it.

    Raises:
        ValueError: There is no such model, or it classifies no images.
        MissingExtraError: transformers is not installed.
    """
    transformers = require("transformers", extra="diffusion", feature=f"model 'hf:{name}'")
    pretrained = bool(options.get("pretrained", False))
    if in_channels != 3:
        raise ValueError(f"model 'hf:{name}' is for 3 channels; got {in_channels}")
    automatic = transformers.AutoModelForImageClassification
    labels = {} if num_classes is None else {"num_labels": num_classes}
    try:
        if pretrained:
            network = automatic.from_pretrained(
                name, use_safetensors=True, ignore_mismatched_sizes=num_classes is not None, **labels
            )
        else:
            network = automatic.from_config(transformers.AutoConfig.from_pretrained(name, **labels))
    except (OSError, KeyError, ValueError) as error:
        said = " ".join(str(error).split())[:400]
        raise ValueError(
            f"model 'hf:{name}' cannot be had from 🤗 Transformers (safetensors only): {said}"
        ) from error
    return with_logits(network)


def with_logits(network: nn.Module) -> nn.Module:
    """The network, returning logits where it returned an object, a dict or a tuple; its state dict stays as it is."""
    network.register_forward_hook(_to_logits)
    return network


def _to_logits(module: nn.Module, inputs: Any, output: Any) -> Any:
    return logits_of(output)


def _import(path: Path) -> Any:
    name = f"kdfast_own_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ValueError(f"model: {path} cannot be imported")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    sys.path.insert(0, str(path.parent))  # its neighbours, while it is imported
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    finally:
        sys.path.remove(str(path.parent))
    return module
