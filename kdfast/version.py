"""The version, in a file below all others: whoever writes it into a result needs nothing else of the package."""

from __future__ import annotations

__version__ = "0.1.0"
