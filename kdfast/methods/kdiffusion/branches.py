"""m re-parameterised branches of one layer, as one wide layer; and back into one plain layer."""

from __future__ import annotations

import copy
import warnings
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from kdfast.models import FeatureTaps

__all__ = ["Branches", "Init", "convert", "merge"]

Init = Literal["random", "copies"]


class Branches(nn.Module):
    """m copies of a convolution or linear layer, each with a batch norm of its own; their mean goes on.

    They are stacked: one layer with m·C outputs and one batch norm over m·C channels compute exactly what m
    pairs would. The first branch starts from the given layer's weights, the others as ``init`` says.

    Args:
        op: ``nn.Conv2d`` (any groups, stride, padding) or ``nn.Linear`` on ``[B, features]``.
        norm: The batch norm after it, or None.
        m: Branches, at least 1.
        init: The others' weights: ``"random"`` normals of the first's standard deviation, or ``"copies"`` of it, which
            leave what a pretrained network computes as it is.

    Attributes:
        stacked: What the branches put out in the last forward pass, ``[m, B, C, …]``, attached to the graph;
            None before the first.
        mean_var: With a norm: running variance of the branches' mean, ``[C]``, by the norm's momentum. The layer that
            they merge into has its batch norm measure exactly that.

    Raises:
        TypeError: Another kind of layer or of norm.
        ValueError: m < 1, an unknown start, or a norm that does not fit the layer.
    """

    stacked: Tensor | None
    mean_var: Tensor

    def __init__(self, op: nn.Module, norm: nn.Module | None, m: int, *, init: Init = "random") -> None:
        super().__init__()
        if not isinstance(m, int) or m < 1:
            raise ValueError(f"m: got {m!r}; an int of at least 1 is needed")
        if init not in get_args(Init):
            raise ValueError(f"init: got {init!r}, accepted: {', '.join(get_args(Init))}")
        if not isinstance(op, (nn.Conv2d, nn.Linear)):
            raise TypeError(f"op: got {type(op).__name__}; nn.Conv2d or nn.Linear is needed")
        if norm is not None and not isinstance(norm, (nn.BatchNorm1d, nn.BatchNorm2d)):
            raise TypeError(
                f"norm: got {type(norm).__name__}; nn.BatchNorm1d, nn.BatchNorm2d or None is needed"
            )
        self.m, self.groups = m, op.groups if isinstance(op, nn.Conv2d) else 1
        self.channels = op.out_channels if isinstance(op, nn.Conv2d) else op.out_features
        if norm is not None and norm.num_features != self.channels:
            raise ValueError(f"norm: has {norm.num_features} features; the layer has {self.channels} outputs")
        if norm is not None and norm.running_mean is None:
            raise ValueError("norm: keeps no running statistics, so the branches could not be merged")
        self.op, self.norm = self._widened(op), None if norm is None else self._widened(norm)
        if init == "random":
            with torch.no_grad():
                others = self._by_branch(self.op.weight)[1:]
                others.copy_(torch.randn_like(others) * op.weight.std(correction=0))
        if norm is not None:
            self.register_buffer("mean_var", self._first_variance(norm))
        self.stacked = None

    @staticmethod
    @torch.no_grad()
    def _first_variance(norm: Any) -> Tensor:
        """Of what the norm itself puts out."""
        gain = norm.weight.square() if norm.affine else 1.0
        variance: Tensor = gain * norm.running_var / (norm.running_var + norm.eps)
        return variance.clone()

    @torch.no_grad()
    def _track(self, mean: Tensor) -> None:
        """The running variance, as the batch norm beside it counts its own: unbiased, by its momentum."""
        norm: Any = self.norm
        variance = mean.detach().to(self.mean_var.dtype).var([0, *range(2, mean.dim())])
        momentum = norm.momentum
        if momentum is None:  # a cumulative average; the count stays on its device
            momentum = norm.num_batches_tracked.to(variance.dtype).reciprocal()
        self.mean_var.lerp_(variance, momentum)

    def _widened(self, layer: Any) -> Any:
        """A copy with m·C outputs, every branch the same."""
        wide = copy.deepcopy(layer)
        for key, value in [*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False)]:
            if value.dim() == 0:  # num_batches_tracked
                continue
            grouped = value.detach().unflatten(0, (self.groups, 1, -1))
            repeated = grouped.expand(-1, self.m, *[-1] * (grouped.dim() - 2)).flatten(0, 2).clone()
            setattr(wide, key, nn.Parameter(repeated) if isinstance(value, nn.Parameter) else repeated)
        for key in ("out_channels", "out_features", "num_features"):
            if hasattr(wide, key):
                setattr(wide, key, self.m * getattr(layer, key))
        return wide

    def _by_branch(self, wide: Tensor) -> Tensor:
        """``[m·C, …]`` as ``[m, groups, C/groups, …]``; a view. Groups come first in a grouped convolution."""
        shape = (self.groups, self.m, self.channels // self.groups, *wide.shape[1:])
        return wide.view(shape).transpose(0, 1)

    def forward(self, x: Tensor) -> Tensor:
        """The mean of the branches, ``[B, C, …]``; :attr:`stacked` keeps them apart.

        Raises:
            ValueError: A batch norm in training mode gets a single value a channel, or a linear layer's branches get
                something other than ``[B, features]``.
        """
        if isinstance(self.op, nn.Linear) and x.dim() != 2:
            raise ValueError(f"x: got shape {tuple(x.shape)}; branches of nn.Linear take [B, features]")
        out: Tensor = self.op(x)
        tracks = self.norm is not None and self.norm.training
        if self.norm is not None:
            if tracks and out.numel() == out.shape[1]:
                raise ValueError(
                    f"x: got shape {tuple(x.shape)}, one value a channel; batch norm in training needs at least 2"
                )
            out = self.norm(out)
        shape = (out.shape[0], self.groups, self.m, self.channels // self.groups, *out.shape[2:])
        grouped = out.view(shape).movedim(2, 0)
        # A view without groups: the kernel takes its strides as they are.
        self.stacked = grouped.flatten(2, 3) if self.groups > 1 else grouped.squeeze(2)
        mean = self.stacked.mean(0)
        if tracks:
            self._track(mean)
        return mean

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles do without the last activations, which belong to a graph."""
        return {**self.__dict__, "stacked": None}

    @torch.no_grad()
    def folded(self) -> tuple[Tensor, Tensor]:
        """Weight and bias of the one layer that equals the branches' mean in evaluation mode.

        With g_j = γ_j/√(var_j + eps): W = (1/m) Σ g_j·W_j and b = (1/m) Σ (β_j − g_j·μ_j + g_j·bias_j), summed in
        float64.
        """
        weight = self._by_branch(self.op.weight).flatten(1, 2).double()
        bias = weight.new_zeros(weight.shape[:2])
        if self.op.bias is not None:
            bias = self._by_branch(self.op.bias).flatten(1, 2).double()
        if self.norm is not None:
            var, shift = (
                self._by_branch(t).flatten(1, 2).double()
                for t in (self.norm.running_var, self.norm.running_mean)
            )
            gain = (var + self.norm.eps).rsqrt()
            offset = torch.zeros_like(bias)
            if self.norm.affine:
                gain = gain * self._by_branch(self.norm.weight).flatten(1, 2)
                offset = self._by_branch(self.norm.bias).flatten(1, 2).double()
            bias = offset + gain * (bias - shift)
            weight = weight * gain.view(*gain.shape, *[1] * (weight.dim() - 2))
        dtype = self.op.weight.dtype
        return weight.mean(0).to(dtype), bias.mean(0).to(dtype)

    def plain(self, *, bias: Tensor | None, weight: Tensor) -> nn.Module:
        """The layer with one branch's outputs, holding ``weight`` and ``bias``."""
        layer = copy.deepcopy(self.op)
        for key in ("out_channels", "out_features"):
            if hasattr(layer, key):
                setattr(layer, key, self.channels)
        layer.weight = nn.Parameter(weight)
        layer.bias = None if bias is None else nn.Parameter(bias)
        return layer  # type: ignore[no-any-return]


class _Absorbed(nn.Sequential):
    """Stands where a batch norm was that the branches took over, and remembers what it looked like.

    Does what a norm of timm's does besides, in the same module: dropout and activation.
    """

    def __init__(self, norm: nn.Module, op: str) -> None:
        super().__init__(*_behind(norm))
        self.training = norm.training
        self.op = op
        self.kept = (copy.deepcopy(norm),)  # in a tuple: no part of the state dict


def _behind(norm: Any) -> list[nn.Module]:
    """What timm's ``BatchNormAct2d`` runs after the normalisation; nothing for a plain batch norm."""
    return [norm.drop, norm.act] if hasattr(norm, "drop") and hasattr(norm, "act") else []


def _bare(norm: Any) -> Any:
    """The normalisation alone: the very module, or a plain one that holds a ``BatchNormAct2d``'s values."""
    if norm is None or not _behind(norm):
        return norm
    plain = nn.BatchNorm2d(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
    plain.load_state_dict(norm.state_dict())
    plain.training = norm.training
    held = norm.running_mean  # without one the branches refuse the norm
    return plain if held is None else plain.to(held.device, held.dtype)


def convert(
    model: nn.Module, op: str, norm: str | None = None, *, m: int = 10, init: Init = "random"
) -> Branches:
    """Replace a layer of a model by m branches, in place.

    Args:
        model: Any module.
        op: Name of the ``nn.Conv2d`` or ``nn.Linear``, as in ``model.named_modules()``.
        norm: Name of the batch norm that runs right after it, which the branches take over; None: none.
        m: Branches.
        init: Where all but the first begin: ``"random"``, or ``"copies"`` for a pretrained model.

    Returns:
        The branches, in the model's place ``op``, in the modes that the two layers were in. Parameters are new: make
        the optimizer after this.

    Raises:
        ValueError: A name that does not exist (the nearest are given), m < 1, layers that do not fit.
        TypeError: Layers of another kind.
    """
    with FeatureTaps(model, [op] if norm is None else [op, norm]):  # refuses unknown names
        pass
    old_norm = None if norm is None else model.get_submodule(norm)
    old = model.get_submodule(op)
    branches = Branches(old, _bare(old_norm), m, init=init)
    branches.training = old.training
    model.set_submodule(op, branches)
    if norm is not None and old_norm is not None:
        model.set_submodule(norm, _Absorbed(old_norm, op))
    return branches


@torch.no_grad()
def merge(module: nn.Module) -> nn.Module:
    """Fold all branches into plain layers that compute the same.

    :class:`Branches` alone become one biased layer, which is returned. A converted model is changed in place and
    returned with the layers, and the names in its state dict, that it had before :func:`convert`. Where a batch norm
    followed a layer, one does again: its running statistics are those of what the merged layer puts out, and its weight
    and bias give back the branches' mean, so that the model can be trained on (fine-tuned, quantised, its statistics
    recomputed). In evaluation mode this is exact; in training mode the statistics of a batch take the running ones'
    place, as in any network. A batch norm without weight has no place for the scale: there it holds in evaluation mode
    alone, and a warning says so.

    Raises:
        ValueError: There are no branches in the module.
    """
    if isinstance(module, Branches):
        weight, bias = module.folded()
        return module.plain(weight=weight, bias=bias)
    absorbed = {a.op: (name, a) for name, a in module.named_modules() if isinstance(a, _Absorbed)}
    found = [(name, b) for name, b in module.named_modules() if isinstance(b, Branches)]
    if not found:
        raise ValueError(f"module: got a {type(module).__name__} without branches; nothing to merge")
    for name, branches in found:
        weight, bias = branches.folded()
        held = branches.op.bias is not None
        norm_name, norm = absorbed.get(name, (None, None))
        if norm_name is None or norm is None:
            module.set_submodule(name, branches.plain(weight=weight, bias=bias if held else None))
            continue
        module.set_submodule(
            name, branches.plain(weight=weight, bias=torch.zeros_like(bias) if held else None)
        )
        module.set_submodule(norm_name, _carrier(norm_name, norm.kept[0], branches, bias))
    return module


def _carrier(name: str, norm: Any, branches: Branches, bias: Tensor) -> nn.Module:
    """A batch norm of the old one's kind that adds ``bias`` to what the merged layer puts out.

    Its statistics are those of its input. The branches' mean has mean E = mean(β_j), since each of them is normalised,
    and variance :attr:`Branches.mean_var`; its input is that less the bias.
    """
    carrier = copy.deepcopy(norm).to(bias.device)
    wide: Any = branches.norm
    carrier.train(wide.training)
    carrier.num_batches_tracked.copy_(wide.num_batches_tracked)
    if norm.affine:
        centre = branches._by_branch(wide.bias).flatten(1, 2).double().mean(0)
        carrier.running_mean.copy_(centre - bias)
        carrier.running_var.copy_(branches.mean_var)
        carrier.weight.copy_((branches.mean_var.double() + norm.eps).sqrt())
        carrier.bias.copy_(centre)
        return carrier  # type: ignore[no-any-return]
    # The mean is all there is to shift with; the scale is undone where it is 1/√(1 + eps).
    carrier.running_var.fill_(1 - norm.eps)
    carrier.running_mean.copy_(-bias)
    warnings.warn(
        f"merge: the batch norm {name!r} has no weight (affine=False), so the merged model equals the branches in "
        "evaluation mode alone; do not train it on",
        stacklevel=4,
    )
    return carrier  # type: ignore[no-any-return]
