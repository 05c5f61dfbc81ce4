"""What a result was measured on: without it a number says nothing."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from kdfast.version import __version__

_PACKAGES = (
    *("torch", "triton", "numpy", "diffusers", "liger-kernel", "cpprb", "torchrl", "tensordict"),
    *("nvidia-dali-cuda130", "nvidia-dali-cuda120", "pillow", "webdataset", "simplejpeg"),
)

#: What bench/gpu_prepare.sh writes the revision into, since a copy of the tree has no history.
REVISION = "REVISION"


def describe(device: str) -> dict[str, Any]:
    """Machine, versions and revision; no host name, no path."""
    found: dict[str, Any] = {
        "kdfast": __version__,
        "commit": commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": _cpu(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "packages": {name: version for name in _PACKAGES if (version := _version(name))},
    }
    if hasattr(os, "getloadavg"):
        found["load_average"] = [round(value, 2) for value in os.getloadavg()]
    if device == "cuda":
        found |= _gpu()
    return found


def device_name(device: str) -> str:
    """What the table is titled with."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    # Clouds hide the model, and half of what a loop takes is how wide the registers are.
    return f"{_cpu()}, {torch.backends.cpu.get_cpu_capability()}"


def commit() -> str | None:
    """The checkout's revision, with ``+`` when files differ from it; of a copy what its :data:`REVISION` says."""
    if os.environ.get("KDFAST_COMMIT"):
        return os.environ["KDFAST_COMMIT"]
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        try:
            return (root / REVISION).read_text().strip() or None
        except OSError:
            return None
    try:
        git = ["git", "-C", str(root)]
        head = subprocess.run(
            [*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True, timeout=10
        )
        dirty = subprocess.run(
            [*git, "diff", "--quiet", "HEAD"], capture_output=True, check=False, timeout=30
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return head.stdout.strip() + ("+" if dirty.returncode else "")


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.lower().startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def smi_id(properties: Any, index: int) -> str:
    """How nvidia-smi, which does not know CUDA_VISIBLE_DEVICES, is asked about torch's device ``index``."""
    uuid = getattr(properties, "uuid", None)
    if uuid is not None:
        return f"GPU-{str(uuid).removeprefix('GPU-')}"
    visible = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return visible[index] if index < len(visible) else str(index)


def _gpu() -> dict[str, Any]:
    index = torch.cuda.current_device()
    properties = torch.cuda.get_device_properties(index)
    found: dict[str, Any] = {
        "gpu": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "l2_bytes": l2_bytes(),
        "cuda": torch.version.cuda,
    }
    query = "driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit,temperature.gpu"
    try:
        answer = subprocess.run(
            [
                "nvidia-smi",
                f"--query-gpu={query}",
                "--format=csv,noheader",
                f"--id={smi_id(properties, index)}",
            ],
            capture_output=True,
            text=True,
            check=True,
            timeout=20,
        )
        found |= dict(zip(query.split(","), map(str.strip, answer.stdout.split(","))))
    except (OSError, subprocess.SubprocessError):
        found["driver_version"] = None
    return found


def l2_bytes() -> int:
    """The GPU's L2 cache; 64 MiB where the driver does not say."""
    return int(getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 0) or 64 << 20)


def turns_for(working_set: int, device: str) -> int:
    """How many rotating inputs of ``working_set`` bytes outgrow the cache twice: 2 to 64 of them.

    A CPU's last level is taken for 32 MiB. Inputs so small that 64 of them stay in it are measured warm, which is
    how a training step meets them too.
    """
    cache = l2_bytes() if device == "cuda" else 32 << 20
    return max(2, min(64, -(-2 * cache // max(1, working_set))))
