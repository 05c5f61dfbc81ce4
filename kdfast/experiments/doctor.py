"""``kdfast doctor``: what is installed, what runs each op, what is missing."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import pkgutil
import platform
import re
import textwrap
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from kdfast.backend import get_backend, resolve
from kdfast.errors import KDFastError
from kdfast.version import __version__

_CORE = ("torch", "numpy", "triton")
_REQUIREMENT = re.compile(r"^([A-Za-z0-9._-]+).*;.*extra == ['\"]([\w-]+)['\"]")
# Extras for working on kdfast itself, and the one that stands for others.
_NOT_SHOWN = ("dev", "docs", "bench", "all")
# Two builds of one library: either will do, and both together will not.
_DALI = ("dali", "dali-cu12")
#: What a user should know before installing an extra.
_BEWARE = {"models": " (torchvision brings the torch that it was built for)"}


@dataclass
class Report:
    """What the doctor found.

    Attributes:
        versions: Core packages and devices, by name.
        ops: Registered ops, each with the backend that runs it for tensors on a device.
        extras: For each extra, its packages with their versions; ``None`` for a missing one.
        problems: What is wrong with the core; empty is healthy.
        remarks: What is missing.
        command: The one command that installs everything that is missing; empty if nothing is.
    """

    versions: dict[str, str] = field(default_factory=dict)
    ops: dict[str, dict[str, str]] = field(default_factory=dict)
    extras: dict[str, dict[str, str | None]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    command: str = ""

    @property
    def healthy(self) -> bool:
        """Whether the core works."""
        return not self.problems

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "healthy": self.healthy}

    def as_text(self) -> str:
        """For a terminal."""
        width = max(map(len, (*self.versions, *self.ops, *self.extras)))
        lines = [
            line for name, value in self.versions.items() for line in _wrapped(f"  {name:<{width}}  ", value)
        ]
        lines += ["", "Ops"]
        for name, backends in self.ops.items():
            lines += _wrapped(
                f"  {name:<{width}}  ", " · ".join(f"{dev}: {how}" for dev, how in backends.items())
            )
        lines += ["", "Extras"]
        for name, packages in self.extras.items():
            shown = ", ".join(f"{package} {version or 'missing'}" for package, version in packages.items())
            lines += _wrapped(f"  {name:<{width}}  ", shown)
        lines.append("")
        for mark, said in (("! ", self.problems), ("- ", self.remarks)):
            lines += [line for one in said for line in _wrapped(mark, one)]
        if self.command:
            lines += ["", "All that is missing, in one command:", f"  {self.command}", ""]
        lines.append("The core works." if self.healthy else "The core is broken.")
        return "\n".join(lines)


def _wrapped(label: str, text: str) -> list[str]:
    """Lines of at most 80 columns behind a label; words are kept whole, as paths and commands must be."""
    return textwrap.wrap(
        text,
        80,
        initial_indent=label,
        subsequent_indent=" " * len(label),
        break_long_words=False,
        break_on_hyphens=False,
    ) or [label.rstrip()]


def run() -> Report:
    """Examine this installation; nothing is changed and nothing fetched."""
    report = Report()
    _versions(report)
    _ops(report)
    _extension(report)
    _extras(report)
    _self_test(report)
    return report


def _versions(report: Report) -> None:
    report.versions["kdfast"] = __version__
    report.versions["python"] = platform.python_version()
    for name in _CORE:
        report.versions[name] = _version(name) or "missing"
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            major, minor = torch.cuda.get_device_capability(index)
            report.versions[f"cuda:{index}"] = f"{torch.cuda.get_device_name(index)} (sm_{major}{minor})"
    else:
        report.versions["cuda"] = "no device: ops run on the reference in plain PyTorch"
    report.versions["backend"] = get_backend()
    if report.versions["triton"] == "missing":
        report.remarks.append("triton is missing, so no fused kernel runs (it is for Linux)")


def _ops(report: Report) -> None:
    """Registering is what importing a family does; which backend it takes is asked as an op would ask."""
    import kdfast.ops

    for module in pkgutil.iter_modules(kdfast.ops.__path__):
        try:
            importlib.import_module(f"kdfast.ops.{module.name}")
        except Exception as error:
            report.problems.append(f"kdfast.ops.{module.name} cannot be imported: {error}")
    names = torch._C._dispatch_get_all_op_names()
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    backends = {device: _backend(device) for device in devices}
    for name in sorted({name.partition(".")[0] for name in names if name.startswith("kdfast::")}):
        report.ops[name] = backends


def _backend(device: str) -> str:
    try:
        return resolve(torch.empty(0, device=device))
    except KDFastError as error:
        return f"none ({error})"


def _extension(report: Report) -> None:
    try:
        extension = importlib.import_module("kdfast._C")
        report.versions["C++ extension"] = f"built ({extension.__file__})"
    except ImportError as error:
        report.versions["C++ extension"] = "missing"
        report.remarks.append(
            f"kdfast._C cannot be imported ({error}): kdfast.replay is unavailable. Install a C++17 compiler, then: "
            "pip install --force-reinstall --no-deps kdfast"
        )


def _extras(report: Report) -> None:
    for requirement in _requirements():
        found = _REQUIREMENT.match(requirement)
        if found and found[2] not in _NOT_SHOWN and found[1] != "kdfast":
            report.extras.setdefault(found[2], {})[found[1]] = _version(found[1])
    complete = {name for name, packages in report.extras.items() if all(packages.values())}
    wanted = report.extras.keys() - complete - {_other_dali(report.extras, complete)}
    for name in sorted(wanted):
        gone = ", ".join(package for package, version in report.extras[name].items() if not version)
        report.remarks.append(f"{name}: {gone} missing{_BEWARE.get(name, '')}")
    parts = ["triton"] if report.versions["triton"] == "missing" and platform.system() == "Linux" else []
    parts += [f'"kdfast[{",".join(sorted(wanted))}]"'] if wanted else []
    report.command = " ".join(["pip install", *parts]) if parts else ""


def _other_dali(extras: Mapping[str, Mapping[str, str | None]], complete: Collection[str]) -> str:
    """The build of DALI that is not for this machine: not the one that is there, else not the one for torch's CUDA."""
    there = [name for name in _DALI if name in complete] or [
        name for name in _DALI if any(v for package, v in extras.get(name, {}).items() if "dali" in package)
    ]
    cuda = torch.version.cuda or ""
    mine = there[0] if there else _DALI[cuda.startswith("12")]
    return _DALI[mine == _DALI[0]]


def _requirements() -> Sequence[str]:
    try:
        return importlib.metadata.requires("kdfast") or []
    except importlib.metadata.PackageNotFoundError:
        return []


def _self_test(report: Report) -> None:
    """The main op against PyTorch's own, where this machine would run it."""
    from torch.nn import functional as F

    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        from kdfast.functional import kd_kl_div

        generator = torch.Generator().manual_seed(0)
        student, teacher = (torch.randn(4, 10, generator=generator).to(device) for _ in range(2))
        ours = kd_kl_div(student, teacher, 4.0)
        theirs = 16 * F.kl_div(
            (student / 4).log_softmax(-1), (teacher / 4).softmax(-1), reduction="batchmean"
        )
        if not torch.allclose(ours, theirs, rtol=1e-4, atol=1e-6):
            report.problems.append(
                f"kd_kl_div on {device} gives {float(ours)}, PyTorch gives {float(theirs)}"
            )
    except Exception as error:
        report.problems.append(f"kd_kl_div on {device} fails: {type(error).__name__}: {error}")


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
