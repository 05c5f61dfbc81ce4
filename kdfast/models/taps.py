"""Named activations of any module, through hooks that are removed again."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from functools import partial
from types import TracebackType

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from kdfast.errors import KDFastError
from kdfast.models.outputs import logits_of

_INPUT = ":input"
_OUTPUT = ":output"


class FeatureTaps:
    """What named layers of a network put out in its last forward pass.

    ::

        with FeatureTaps(model, ["layer2", "layer3"]) as taps:
            logits = model(images)
            features = taps["layer3"]        # [B, C, h, w], attached to the graph

    The taps are on from construction until :meth:`close` (or the end of the ``with`` block), so a training
    loop can keep one for its whole length. Each forward pass overwrites the last one's activations; a layer
    that runs several times in one pass keeps its last output.

    Args:
        model: Any module.
        layers: Dotted names as in ``model.named_modules()``. ``"NAME:input"`` taps what goes into the layer
            instead: ``"layer3.0.relu2:input"`` is the sum before the activation. ``":output"`` alone taps the logits
            that the model itself puts out.
        detach: Cut the activations from the graph, for a teacher that runs outside ``torch.no_grad()``.

    Raises:
        ValueError: If a layer is unknown (the nearest known names are given), twice, or none is named.
    """

    def __init__(self, model: nn.Module, layers: Iterable[str], *, detach: bool = False) -> None:
        names = [layers] if isinstance(layers, str) else list(layers)
        if not names:
            raise ValueError("layers is empty; name at least one layer to tap")
        if repeated := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"layers names {', '.join(map(repr, repeated))} more than once")
        modules = dict(model.named_modules())
        modules[_OUTPUT] = modules.pop("")
        targets = [(name, _find(modules, name, model)) for name in names]
        self.names = tuple(names)
        self._detach = detach
        self._kept: dict[str, Tensor] = {}
        self._handles: list[RemovableHandle] = []
        for name, module in targets:
            if name.endswith(_INPUT):
                hook = partial(self._keep_input, name)
                self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
            else:
                self._handles.append(module.register_forward_hook(partial(self._keep_output, name)))

    def __getitem__(self, name: str) -> Tensor:
        """The activation of a tapped layer.

        Raises:
            KeyError: If the layer is not tapped.
            KDFastError: If it has not run since the taps were set or cleared.
        """
        if name not in self.names:
            raise KeyError(f"{name!r} is not tapped; the taps are {', '.join(self.names)}")
        if name not in self._kept:
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

    def __enter__(self) -> FeatureTaps:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _keep(self, name: str, value: object) -> None:
        if name == _OUTPUT:
            value = logits_of(value)
        # Hugging Face modules return tuples and output classes whose first entry is the activation.
        if isinstance(value, dict):
            value = next(iter(value.values()), None)
        while isinstance(value, (tuple, list)) and value:
            value = value[0]
        if not isinstance(value, Tensor):
            raise TypeError(f"layer {name!r} gave a {type(value).__name__}; only tensors can be tapped")
        self._kept[name] = value.detach() if self._detach else value

    def _keep_output(self, name: str, module: nn.Module, inputs: tuple[object, ...], output: object) -> None:
        self._keep(name, output)

    def _keep_input(
        self, name: str, module: nn.Module, inputs: tuple[object, ...], kwargs: dict[str, object]
    ) -> None:
        self._keep(name, inputs or kwargs)


def _find(modules: dict[str, nn.Module], name: str, model: nn.Module) -> nn.Module:
    layer = name.removesuffix(_INPUT)
    if layer in modules:
        return modules[layer]
    modules = {known: module for known, module in modules.items() if known != _OUTPUT}
    # A wrapped model (DistributedDataParallel, torch.compile) only prefixes its names.
    near = [known for known in modules if known.endswith(f".{layer}")][:3]
    near += [known for known in difflib.get_close_matches(layer, modules, n=5) if known not in near]
    top = [known for known, _ in model.named_children()]
    hint = f"did you mean {', '.join(near)}?" if near else f"its top layers are {', '.join(top) or 'none'}"
    raise ValueError(f"{type(model).__name__} has no layer {layer!r}; {hint}")
