"""What a method trains: one list for every optimizer, a look whether it moves, and one module for several ranks."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

__all__ = ["OWN", "Learning", "StepModule"]

#: The group of what a method has beside the student.
OWN = "the method's own"


class Learning:
    """:meth:`parameters_to_train` and :meth:`check_optimizer` of a method, and warnings that come by themselves.

    A method that is a module trains its own parameters, the student's among them; any other trains its student's.
    """

    _moved: dict[str, int] | None = None
    _told: frozenset[str] = frozenset()

    def __repr__(self) -> str:
        """Who learns from whom, and the settings; a method that is a module shows its layers, as modules do."""
        if isinstance(self, nn.Module):
            return nn.Module.__repr__(self)
        networks = [
            f"{role}={type(network).__name__} of {sum(p.numel() for p in network.parameters()):,} parameters"
            for role in ("student", "teacher")
            if isinstance(network := getattr(self, role, None), nn.Module)
        ]
        return f"{type(self).__name__}({', '.join([*networks, repr(getattr(self, 'config', None))])})"

    def _trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        owner: Any = self
        if not isinstance(owner, nn.Module):
            owner = owner.student
        if owner is None:
            raise ValueError("student: got None, accepted: a network, when the method is made")
        return ((name, p) for name, p in owner.named_parameters() if p.requires_grad)

    def parameters_to_train(self) -> list[nn.Parameter]:
        """What an optimizer has to move: the student's parameters, and what the method has of its own.

        Raises:
            ValueError: The method was made without a student.
        """
        return [p for _, p in self._trained()]

    def check_optimizer(self, optimizer: torch.optim.Optimizer) -> list[str]:
        """Names of trainable parameters that the optimizer does not have; warns if there are any.

        Raises:
            ValueError: The method was made without a student.
        """
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        missing = [name for name, p in self._trained() if id(p) not in held]
        if missing:
            warnings.warn(
                f"the optimizer lacks {len(missing)} parameters ({', '.join(missing[:3])}, …): make it after the "
                "method, over method.parameters_to_train()",
                stacklevel=2,
            )
        return missing

    def _watch(self, student: Iterable[nn.Parameter], own: Mapping[str, Iterable[nn.Parameter]]) -> None:
        """Warn, once each, when an optimizer moves the student and nothing of one of ``own``, or ranks part.

        Every in-place change counts up a tensor's version; reading it waits for nothing.
        """
        if not torch.is_grad_enabled():
            return
        groups = {"": student, **own}
        trained = {name: [p for p in group if p.requires_grad] for name, group in groups.items()}
        now = {name: sum(p._version for p in group) for name, group in trained.items() if group}
        before, self._moved = self._moved, now
        if before is not None and now.get("") != before.get(""):
            for name in own:
                if name in now and now[name] == before.get(name):
                    self._tell(
                        name,
                        f"an optimizer moved the student, but none of {name} parameters: make it after the "
                        "method, over method.parameters_to_train()",
                    )
        if OWN in now:
            self._watch_ranks()

    def _watch_ranks(self) -> None:
        if (
            not (distributed.is_available() and distributed.is_initialized())
            or distributed.get_world_size() == 1
        ):
            return
        if getattr(DistributedDataParallel, "_active_ddp_module", None) is None:
            self._tell(
                "ranks",
                "the method's own parameters are trained outside of a DistributedDataParallel wrapper, so their "
                "gradients are not averaged over ranks: wrap StepModule(method) and call that",
            )

    def _tell(self, what: str, message: str) -> None:
        if what not in self._told:
            self._told = self._told | {what}
            warnings.warn(message, stacklevel=5)


class StepModule(nn.Module):
    """A method's whole step as a forward pass, for wrappers that look at forward passes: DDP, FSDP, Accelerate.

    Args:
        method: With a ``step`` that takes a batch, and trainable parts of its own: ``DiffKD``, ``Kdiffusion``,
            ``FitNet`` and the like.

    Example:
        >>> wrapped = DistributedDataParallel(StepModule(method))      # doctest: +SKIP
        >>> wrapped(images, labels).backward()                        # doctest: +SKIP
    """

    def __init__(self, method: Any) -> None:
        super().__init__()
        self.method = method

    def forward(self, images: Tensor, target: Tensor | None = None) -> Tensor:
        """The loss of ``method.step``, 0-d."""
        loss: Tensor = self.method.step((images, target))
        return loss
