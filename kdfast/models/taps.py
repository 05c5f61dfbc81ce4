"""Named activations of any module, through hooks that are removed again."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from kdfast.closing import Closing
from kdfast.errors import KDFastError
from kdfast.models.outputs import logits_of
from kdfast.models.places import EVERY, Place, descend


class FeatureTaps(Closing):
    """What named layers of a network put out in its last forward pass.

    ::

        with FeatureTaps(model, ["layer2", "layer3"]) as taps:
            logits = model(images)
            features = taps["layer3"]        # [B, C, h, w], attached to the graph

    The taps are on from construction until :meth:`close` (or the end of the ``with`` block), so a training
    loop can keep one for its whole length. Each forward pass overwrites the last one's activations; of a layer
    that runs several times in one pass, ``taps[name]`` is the last output, and :meth:`levels` has every one.

    Args:
        model: Any module.
        layers: Dotted names as in ``model.named_modules()``. ``"NAME:input"`` taps what goes into the layer
            instead: ``"layer3.0.relu2:input"`` is the sum before the activation. ``":output"`` alone taps the logits
            that the model itself puts out. ``"backbone.fpn:0"`` is one item of a dict, tuple or list, by its key or
            else its position, ``"backbone.fpn:*"`` every one; items of items follow with colons (``"neck:input:2"``,
            ``":output:pred_boxes"``). ``"head.cls_logits#2"`` is the third call in a pass of a layer that several
            levels share, ``#-1`` the last and ``#*`` every one.
        detach: Cut the activations from the graph, for a teacher that runs outside ``torch.no_grad()``.
        every_call: Keep each call of a layer in a pass, for :meth:`levels`; without, only layers named with ``#`` do.

    Raises:
        ValueError: If a layer is unknown (the nearest known names are given), twice, or none is named.
    """

    def __init__(
        self, model: nn.Module, layers: Iterable[str], *, detach: bool = False, every_call: bool = False
    ) -> None:
        names = [layers] if isinstance(layers, str) else list(layers)
        if not names:
            raise ValueError("layers is empty; name at least one layer to tap")
        if repeated := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"layers names {', '.join(map(repr, repeated))} more than once")
        # A layer that stands in several places (heads whose levels share convolutions) has each of their names.
        modules = dict(model.named_modules(remove_duplicate=False))
        modules.pop("")
        places = [Place.parse(name, modules) for name in names]
        targets = [(place, _find(modules, place, model)) for place in places]
        self.names = tuple(names)
        self._places = dict(zip(names, places))
        self._weighted = {place.name: any(True for _ in module.parameters()) for place, module in targets}
        self._every = every_call or any(place.call is not None for place in places)
        self._detach = detach
        self._kept: dict[str, list[list[Tensor]]] = {}
        self._handles: list[RemovableHandle] = []
        if self._every:  # a pass begins where the model's does
            self._handles.append(model.register_forward_pre_hook(self._begin))
        for place, module in targets:
            if place.is_input:
                hook = partial(self._keep_input, place)
                self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
            else:
                self._handles.append(module.register_forward_hook(partial(self._keep_output, place)))

    def __getitem__(self, name: str) -> Tensor:
        """The activation of a tapped layer; its last, if it ran several times in a pass.

        Raises:
            KeyError: If the layer is not tapped.
            KDFastError: If it has not run since the taps were set or cleared.
            ValueError: If it has levels of different sizes, of which one has to be named.
        """
        levels = self._found(name)[-1] if not self._every else self.levels(name)
        if len({level.shape[1:] for level in levels}) > 1:
            raise ValueError(
                f"layer {name!r} has {len(levels)} levels in a pass, of different sizes; name one: "
                f"{name + '#0'!r} … for its calls, {name.partition(':*')[0] + ':0'!r} … for items of its output"
            )
        return levels[-1]

    def levels(self, name: str) -> list[Tensor]:
        """The activations of a layer that several levels share, in the order of its calls.

        Every call of a layer that has weights, or whose outputs differ in size, is a level. A layer without weights
        that runs again and again (the one ReLU of a residual block) has its last output alone. ``#`` in a name
        decides by itself.

        Raises:
            KeyError: As ``taps[name]``.
            KDFastError: As ``taps[name]``, or there is no such call.
        """
        calls, call = self._found(name), self._places[name].call
        if isinstance(call, int):
            if not -len(calls) <= call < len(calls):
                raise KDFastError(f"layer {name!r} ran {len(calls)} times in a pass; there is no call {call}")
            return calls[call]
        if (
            call != EVERY
            and not self._weighted[name]
            and len({tuple(x.shape for x in c) for c in calls}) == 1
        ):
            return calls[-1]
        return [level for found in calls for level in found]

    def _found(self, name: str) -> list[list[Tensor]]:
        if name not in self._places:
            raise KeyError(f"{name!r} is not tapped; the taps are {', '.join(self.names)}")
        if not self._kept.get(name):
            raise KDFastError(f"layer {name!r} has not run yet; call the model first")
        return self._kept[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def items(self) -> list[tuple[str, Tensor]]:
        """Pairs of layer name and activation, in the order in which the layers were given."""
        return [(name, self[name]) for name in self.names]

    def clear(self) -> None:
        """Forget the activations (and with them the graph they hold); the taps stay on."""
        self._kept.clear()

    def close(self) -> None:
        """Remove every hook and forget the activations. Closing twice does nothing."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.clear()

    def _begin(self, module: nn.Module, inputs: tuple[object, ...]) -> None:
        self.clear()

    def _keep(self, place: Place, value: object) -> None:
        if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
            return  # a checkpoint that runs again within backward: no pass of the network
        if place.is_output and not place.items:
            value = logits_of(value)
        found = [x.detach() if self._detach else x for x in descend(value, place)]
        self._kept[place.name] = [*(self._kept.get(place.name, ()) if self._every else ()), found]

    def _keep_output(
        self, place: Place, module: nn.Module, inputs: tuple[object, ...], output: object
    ) -> None:
        self._keep(place, output)

    def _keep_input(
        self, place: Place, module: nn.Module, inputs: tuple[object, ...], kwargs: dict[str, object]
    ) -> None:
        # The first argument is what goes in; others (sizes, masks) are beside it.
        self._keep(place, inputs[0] if inputs else next(iter(kwargs.values()), None))


def _find(modules: dict[str, nn.Module], place: Place, model: nn.Module) -> nn.Module:
    layer = place.layer
    if not layer and place.name.startswith(":"):
        return model
    if layer in modules:
        return modules[layer]
    # A wrapped model (DistributedDataParallel, torch.compile) only prefixes its names.
    near = [known for known in modules if known.endswith(f".{layer}")][:3]
    near += [known for known in difflib.get_close_matches(layer, modules, n=5) if known not in near]
    top = [known for known, _ in model.named_children()]
    hint = f"did you mean {', '.join(near)}?" if near else f"its top layers are {', '.join(top) or 'none'}"
    raise ValueError(f"{type(model).__name__} has no layer {layer!r}; {hint}")
