"""The replay buffer's priority tree as a sampler of torchrl's buffers."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import torch

from kdfast.errors import require
from kdfast.reference.replay import extension
from kdfast.replay import PrioritizedReplayBuffer

__all__ = ["PrioritySampler", "torchrl_sampler"]


class PrioritySampler:
    """kdfast's priority tree behind the methods of torchrl's samplers; the storage keeps the rows.

    :func:`torchrl_sampler` makes one that torchrl accepts. Slots are those that torchrl's default writer fills,
    one after another and round again; a writer that chooses slots otherwise is refused.

    Args:
        capacity: Slots of the storage.
        alpha: α of P ∝ (|δ| + ε)^α.
        beta: β of the weights.
        eps: ε.
        max_normalize: Divide weights by the batch's largest; otherwise they are (N·P)^−β as they are. torchrl's
            own divides by the storage's largest possible.
        seed: Of the draws; a generator given to torchrl's buffer is not used.
        device: Where the tree lives: that of the storage.
    """

    def __init__(
        self,
        capacity: int,
        *,
        alpha: float = 0.6,
        beta: float = 0.4,
        eps: float = 1e-6,
        max_normalize: bool = False,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        self._options: dict[str, Any] = {
            "alpha": alpha,
            "beta": beta,
            "eps": eps,
            "seed": seed,
            "device": device,
        }
        self.capacity, self.max_normalize = capacity, max_normalize
        self._rng: torch.Generator | None = None  # torchrl's buffer sets it
        self._empty()

    def _empty(self) -> None:
        self.tree = PrioritizedReplayBuffer(self.capacity, (0,), **self._options)
        self._next = 0

    def sample(self, storage: Any, batch_size: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Slots int64 ``[batch_size]``, and their ``priority_weight``."""
        drawn = self.tree.sample(batch_size, max_normalize=self.max_normalize)
        return drawn.index, {"priority_weight": drawn.weight}

    def add(self, index: int | torch.Tensor) -> None:
        """A row was written."""
        self.extend(torch.as_tensor(index).reshape(-1))

    def extend(self, index: Any) -> None:
        """Rows were written; they get the largest priority given so far.

        Raises:
            ValueError: Slots that do not follow those written last.
        """
        if isinstance(index, tuple):
            raise ValueError("index: got a tuple; a storage of one dimension is needed")
        got = torch.as_tensor(index).reshape(-1).cpu()
        if not len(got):
            return
        # A batch longer than the storage leaves its last rows, and says so by repeating slots.
        expected = (self._next + torch.arange(len(got))) % self.capacity
        if not torch.equal(got, expected):
            raise ValueError(
                f"index: got {got[:3].tolist()}…; {expected[:3].tolist()}… follows what was written last. Use a writer "
                "that fills slots in turn (RoundRobinWriter)"
            )
        self.tree.extend(torch.empty(len(got), 0, dtype=torch.uint8, device=self.tree.device))
        self._next = int(got[-1] + 1) % self.capacity

    def update_priority(self, index: Any, priority: Any, *, storage: Any = None) -> None:
        """Re-score slots: the raw |δ|, as α and ε are applied here. One number does for all slots."""
        device = self.tree.device
        slots = torch.as_tensor(index, device=device).reshape(-1)
        scores = torch.as_tensor(priority, dtype=torch.float32, device=device).reshape(-1)
        self.tree.update_priority(slots, scores.expand(len(slots)).contiguous())

    def mark_update(self, index: Any, *, storage: Any = None) -> None:
        """Nothing: a written row's priority is set when it is written."""

    @property
    def default_priority(self) -> float:
        """The largest priority given so far, 1 before the first."""
        largest = self.tree.stats().max_priority
        return 1.0 if math.isnan(largest) else largest

    @property
    def ran_out(self) -> bool:
        """Never."""
        return False

    def state_dict(self) -> dict[str, Any]:
        """A copy of the tree."""
        return {"tree": self.tree.state_dict(), "next": self._next}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Put it back."""
        self.tree.load_state_dict(state_dict["tree"])
        self._next = int(state_dict["next"])

    def dumps(self, path: str | Path) -> None:
        """Write the tree into a folder, which is made."""
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        self.tree.save(folder / f"sampler-{self._next}.kdfast")
        for other in folder.glob("sampler-*.kdfast"):
            if other.name != f"sampler-{self._next}.kdfast":
                other.unlink()
        for left in folder.glob("sampler-*.kdfast.tmp-*"):  # by writers that were killed
            extension().sweep_snapshot(os.fsencode(folder / left.name.split(".tmp-")[0]))

    def loads(self, path: str | Path) -> None:
        """Read it back."""
        (found,) = Path(path).glob("sampler-*.kdfast")
        self.tree = PrioritizedReplayBuffer.load(found, device=self.tree.device)
        self._next = int(found.stem.removeprefix("sampler-"))


def torchrl_sampler(capacity: int, **options: Any) -> Any:
    """A sampler for ``torchrl.data.ReplayBuffer``: ``ReplayBuffer(storage=…, sampler=torchrl_sampler(n))``.

    The same draws on a CPU and on a GPU for one seed, weights of the distribution really drawn from, no rebuild on
    update. It needs none of torchrl's compiled trees, which load beside one release of torch only.

    Args:
        capacity: Slots of the storage.
        options: As for :class:`PrioritySampler`, which it is.

    Raises:
        MissingExtraError: torchrl cannot be imported.
    """
    theirs = require("torchrl.data.replay_buffers.samplers", extra="bench", feature="torchrl_sampler").Sampler
    return type("TorchRLPrioritySampler", (PrioritySampler, theirs), {})(capacity, **options)
