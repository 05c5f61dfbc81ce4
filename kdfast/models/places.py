"""Names of places in a network: a layer, what of it is meant, an item of that, and which of its calls."""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

__all__ = ["EVERY", "Place", "descend"]

#: Every item, or every call.
EVERY = "*"
#: What libraries call the one that is meant: 🤗 Transformers, torchvision's segmentation networks.
_MEANT = ("logits", "out")


@dataclass(frozen=True)
class Place:
    """``LAYER[:input|:output][:ITEM …][#CALL]``.

    Attributes:
        name: As it was written.
        layer: As in ``named_modules()``; empty for the network itself.
        is_input: What goes into the layer, instead of what it puts out.
        items: Keys or positions within a dict, tuple or list, from the outside in.
        call: Which time that the layer runs in a pass; negative ones count from the end, ``"*"`` is every one, and
            None leaves it to what is found.
    """

    name: str
    layer: str
    is_input: bool = False
    items: tuple[str, ...] = ()
    call: int | str | None = None

    @classmethod
    def parse(cls, name: str, known: Container[str]) -> Place:
        """A place by its name.

        Args:
            name: ``"backbone.fpn:0"``, ``"head:input:2"``, ``":output:pred_boxes"``, ``"head.cls_logits#-1"`` …
            known: Names of layers, which are taken as they are.

        Raises:
            ValueError: The call is no number.
        """
        if name in known and name:
            return cls(name, name)
        path, mark, call = name.partition("#")
        layer, *items = path.split(":")
        number: int | str | None = None
        if mark:
            if call != EVERY and not call.removeprefix("-").isdigit():
                raise ValueError(
                    f"layer {name!r}: got call {call!r} after '#', accepted: a number, or * for every one"
                )
            number = EVERY if call == EVERY else int(call)
        is_input = items[:1] == ["input"]
        if items[:1] in (["input"], ["output"]):
            items = items[1:]
        return cls(name, layer, is_input, tuple(items), number)

    @property
    def is_output(self) -> bool:
        """Whether it is what the network itself returns."""
        return not self.layer and not self.is_input


def descend(value: Any, place: Place) -> list[Tensor]:
    """The tensors of a place in what a layer put out (or took in): one, or as many as ``*`` finds.

    Raises:
        TypeError: There is no tensor there.
        ValueError: There is no such item, or one of several maps has to be named.
    """
    found = [value]
    for item in place.items:
        found = [inner for outer in found for inner in _items(outer, item, place)]
    tensors = []
    for inner in found:
        tensor = _first(inner, place)
        if not isinstance(tensor, Tensor):
            raise TypeError(
                f"layer {place.name!r} gave a {type(tensor).__name__}; only tensors can be tapped"
            )
        tensors.append(tensor)
    return tensors


def _items(value: Any, item: str, place: Place) -> list[Any]:
    if isinstance(value, Mapping):
        keys = list(value)
        if item == EVERY:
            return [value[key] for key in keys]
        if item in value:
            return [value[item]]
        names, values = [repr(key) for key in keys], [value[key] for key in keys]
    elif isinstance(value, (tuple, list)):
        if item == EVERY:
            return list(value)
        names, values = [str(at) for at in range(len(value))], list(value)
    elif isinstance(getattr(value, item, None), (Tensor, Mapping, tuple, list)):
        return [getattr(value, item)]  # an output class
    else:
        raise ValueError(f"layer {place.name!r} gave a {type(value).__name__}, which has no item {item!r}")
    if item.removeprefix("-").isdigit() and -len(values) <= int(item) < len(values):
        return [values[int(item)]]
    raise ValueError(f"layer {place.name!r}: no item {item!r}; there are {', '.join(names) or 'none'}")


def _first(value: Any, place: Place) -> Any:
    """The first tensor: 🤗 modules return tuples and output classes whose first entry is the activation.

    Of several maps none is the one that is meant.
    """
    while isinstance(value, (Mapping, tuple, list)) and value:
        if isinstance(value, Mapping):
            meant = next((name for name in _MEANT if name in value), None)
            if meant is not None:
                value = value[meant]
                continue
        entries = dict(value.items() if isinstance(value, Mapping) else enumerate(value))
        maps = [key for key, entry in entries.items() if isinstance(entry, Tensor) and entry.dim() == 4]
        if len(maps) > 1 and len(maps) == len(entries):
            path = ":".join((place.name.partition("#")[0], "{}"))
            raise ValueError(
                f"layer {place.name!r} gave {len(maps)} maps; name one, {path.format(maps[0])!r} to "
                f"{path.format(maps[-1])!r}, or all of them, {path.format(EVERY)!r}"
            )
        value = next(iter(entries.values()))
    return None if isinstance(value, (Mapping, tuple, list)) else value  # an empty one
