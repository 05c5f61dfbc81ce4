"""How a replay buffer is saved, loaded, copied and sent to other processes; users meet it as its methods."""

from __future__ import annotations

import os
from multiprocessing.context import get_spawning_popen  # as torch itself asks
from typing import TYPE_CHECKING, Any

import torch

from kdfast.errors import CheckpointError
from kdfast.reference.replay import Meta, ReplayState, forks
from kdfast.replay import snapshot

if TYPE_CHECKING:
    from typing_extensions import Self


class Saving:
    """State in and out: a dict in memory, a file, or a pickle."""

    _beta: float
    _state: ReplayState

    def _config(self) -> dict[str, Any]:
        raise NotImplementedError

    def _construct(self, **settings: Any) -> None:
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """Everything: settings, rows, priorities, slots, counters, seed and draw counter; copies, nothing shared.

        All of it is of one moment, whatever other threads do meanwhile (they wait while it is copied).
        """
        tensors = snapshot.tensors_of(self._state)
        seed = int(tensors["meta"][Meta.SEED]) % (1 << 64)
        return {"config": {**self._config(), "seed": seed}, **tensors}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where ``state`` was taken: the next draws are the ones that the source would have made.

        It is replaced at once: other threads see the buffer as it was, or as ``state`` is.

        Args:
            state: From :meth:`state_dict` of a buffer with the same capacity, sample shape, dtype, classes, α, ε,
                scale and eviction; β, seed and draw counter come from it.

        Raises:
            CheckpointError: The state is incomplete, inconsistent, or of other settings. The buffer is as before.
        """
        config = snapshot.check_config(state, self._config())
        found = snapshot.check_tensors(self._state, state)
        snapshot.check_seed(config["seed"], found["meta"])
        self._state.load(found, config["seed"])
        self._beta = float(config["beta"])

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a snapshot file: versioned, a checksum for each section, replaced as a whole or not at all.

        Threads and processes may save to one path: each writes a temporary of its own beside it, and the last to
        finish stays. What a killed process left (``PATH.tmp-…``) is removed by the next ``save`` to the path.

        Raises:
            OSError: The disk is full, the folder is missing or not writable. An older file is still whole then.
            ValueError: The path has a NUL in it.
        """
        state = self.state_dict()
        snapshot.write(path, state.pop("config"), state)

    @classmethod
    def load(cls, path: str | os.PathLike[str], device: torch.device | str | None = None) -> Self:
        """A buffer from a snapshot file, which is looked at before any memory is taken for it.

        Args:
            path: Written by :meth:`save`.
            device: Where to put it; default: the kind of device it was saved from, the CPU where there is none.

        Raises:
            CheckpointError: The file is missing, no regular file, of another version, truncated, damaged,
                inconsistent, or of a buffer that this machine's memory cannot hold.
        """
        config, tensors = snapshot.read(path)
        try:
            return cls.from_state_dict({"config": config, **tensors}, device)
        except CheckpointError as error:
            raise CheckpointError(f"{os.fspath(path)}: {error}") from error

    @classmethod
    def from_state_dict(cls, state: dict[str, Any], device: torch.device | str | None = None) -> Self:
        """A buffer that goes on where ``state`` was taken, of its settings.

        Args:
            state: From :meth:`state_dict`.
            device: As in :meth:`load`.

        Raises:
            CheckpointError: The state is incomplete, inconsistent, or of settings that no buffer has.
        """
        try:
            buffer = cls(**_settings(state["config"], device))
            buffer.load_state_dict(state)
        except (KeyError, TypeError, ValueError, OverflowError, MemoryError) as error:
            raise CheckpointError(f"settings cannot be used ({error})") from error
        return buffer

    def __getstate__(self) -> dict[str, Any]:
        """A snapshot: ``pickle`` and ``copy`` give a buffer that goes on as this one would.

        The copy that a starting process is given (``spawn``, ``forkserver``) draws with a seed of its own.
        """
        state = self.state_dict()
        config = state.pop("config")
        if get_spawning_popen() is not None:
            config["seed"] = forks.child_seed(self._state)
            state["meta"][Meta.SEED] = forks.signed(config["seed"])
        others = {name: value for name, value in self.__dict__.items() if name not in _OWN}
        return {"snapshot": snapshot.encode(config, state), "attributes": others}

    def __setstate__(self, pickled: dict[str, Any]) -> None:
        config, tensors = snapshot.decode(pickled["snapshot"])
        self._construct(**_settings(config, None))
        self.load_state_dict({"config": config, **tensors})
        self.__dict__.update(pickled["attributes"])


#: Attributes that a snapshot stands for; what subclasses add travels beside it.
_OWN = frozenset({"_affine", "_beta", "_largest", "_num_classes", "_state"})

_SETTINGS = (
    *("capacity", "sample_shape", "num_classes", "alpha", "beta", "eps", "eviction"),
    *("seed", "strict", "scale", "duplicates"),
)


def _settings(config: dict[str, Any], device: torch.device | str | None) -> dict[str, Any]:
    """A buffer's arguments from its config."""
    if device is None:
        device = "cuda" if config["device"] == "cuda" and torch.cuda.is_available() else "cpu"
    settings = {key: config[key] for key in _SETTINGS}
    return {**settings, "dtype": snapshot.DTYPES[config["dtype"]], "device": device}
