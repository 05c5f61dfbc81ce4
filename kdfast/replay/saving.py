"""How a replay buffer is saved and loaded; the part of it that users meet as its methods."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import torch

from kdfast.errors import CheckpointError
from kdfast.reference.replay import Meta, ReplayState
from kdfast.replay import snapshot

if TYPE_CHECKING:
    from typing_extensions import Self


class Saving:
    """State in and out: a dict in memory, or a file."""

    beta: float
    _state: ReplayState
    _seed: int
    _filled: bool
    _largest: bool

    def _order_streams(self) -> None:
        raise NotImplementedError

    def _config(self) -> dict[str, Any]:
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """Everything: settings, rows, priorities, slots, counters, seed and draw counter; copies, nothing shared."""
        self._order_streams()
        return {"config": self._config(), **snapshot.tensors_of(self._state)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where ``state`` was taken: the next draws are the ones that the source would have made.

        Args:
            state: From :meth:`state_dict` of a buffer with the same capacity, sample shape, dtype, classes, α, ε,
                scale and eviction; β, seed and draw counter come from it.

        Raises:
            CheckpointError: The state is incomplete, inconsistent, or of other settings. The buffer is as before.
        """
        snapshot.check_config(state.get("config"), self._config())
        found = snapshot.check_tensors(self._state, state)
        self._order_streams()
        rows = found.pop("rows")
        for name, tensor in found.items():
            getattr(self._state, name).copy_(tensor)
        self._state.rows[: len(rows)].copy_(rows)
        self._state.foreign_writes = True
        self.beta = float(state["config"]["beta"])
        self._seed = int(state["config"]["seed"])
        self._filled = bool(found["meta"][Meta.LIVE] > 0)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a snapshot file: versioned, a checksum for each section, replaced as a whole or not at all.

        Raises:
            OSError: The disk is full, the folder is missing or not writable. An older file is still whole then.
        """
        state = self.state_dict()
        config = {**state.pop("config"), "used_slots": len(state["rows"])}
        snapshot.write(path, config, state)

    @classmethod
    def load(cls, path: str | os.PathLike[str], device: torch.device | str | None = None) -> Self:
        """A buffer from a snapshot file.

        Args:
            path: Written by :meth:`save`.
            device: Where to put it; default: the kind of device it was saved from, the CPU where there is none.

        Raises:
            CheckpointError: The file is missing, of another version, truncated, damaged or inconsistent.
        """
        config, tensors = snapshot.read(path)
        settings: dict[str, Any] = {key: config.get(key) for key in cls._SETTINGS}
        try:
            if device is None:
                device = "cuda" if config["device"] == "cuda" and torch.cuda.is_available() else "cpu"
            settings |= {"dtype": snapshot.DTYPES[config["dtype"]], "device": device}
            buffer = cls(**settings)
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{os.fspath(path)}: settings cannot be used ({error})") from error
        buffer.load_state_dict({"config": config, **tensors})
        return buffer

    _SETTINGS = (
        *("capacity", "sample_shape", "dtype", "num_classes", "alpha", "beta", "eps", "eviction"),
        *("seed", "strict", "scale", "duplicates"),
    )
