"""What made a result: releases, the commit of a checkout, the machine's device, and when."""

from __future__ import annotations

import platform
import subprocess
from datetime import datetime, timezone
from pathlib import Path

import torch

from kdfast.version import __version__

#: Beside ``metrics.json``, in a file of its own: two runs of the same recipe have the same metrics.
PROVENANCE = "provenance.json"


def provenance(device: torch.device) -> dict[str, str]:
    """``kdfast``, ``commit`` (of a checkout; with ``+`` where files differ from it), ``torch``, ``python``, ``device``,
    ``date`` (UTC, to the second).
    """
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    found = {
        "kdfast": __version__,
        "commit": _commit(Path(__file__).parents[1]),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": f"{device.type}, {name}",
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }
    return {key: value for key, value in found.items() if value}


def _commit(folder: Path) -> str:
    """Short, of the checkout that the package lies in; empty for an installed one."""
    if not (folder.parent / ".git").exists():
        return ""

    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, timeout=10)
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        commit = git("rev-parse", "--short=12", "HEAD")
        return f"{commit}+" if commit and git("status", "--porcelain", "--untracked-files=no") else commit
    except (OSError, subprocess.TimeoutExpired):
        return ""
