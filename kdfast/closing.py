"""What is closed at the end of a ``with``."""

from __future__ import annotations

from types import TracebackType
from typing import TypeVar

__all__ = ["Closing"]

_Own = TypeVar("_Own", bound="Closing")


class Closing:
    """A context that ends in :meth:`close`, or, where an error ends it, in :meth:`abandon`."""

    def close(self) -> None:
        """Give back what is held."""
        raise NotImplementedError

    def abandon(self) -> None:
        """The same, of something that is not finished."""
        self.close()

    def __enter__(self: _Own) -> _Own:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        else:
            self.abandon()
