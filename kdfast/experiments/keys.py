"""The keys that a command takes, with their defaults and what they mean: read from the config's dataclasses."""

from __future__ import annotations

import importlib
import inspect
import re
import textwrap
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import annotated_types as at

from kdfast.errors import ConfigError

#: A command's config, by the command; a method's own keys stand beside distill's.
SCHEMAS = {
    "teach": "kdfast.experiments.teach.config:TeachConfig",
    "distill": "kdfast.experiments.distill.config:DistillConfig",
    "synth": "kdfast.experiments.synth.config:SynthConfig",
    "select": "kdfast.experiments.select.config:SelectConfig",
    "data-report": "kdfast.experiments.data_report.config:DataReportConfig",
    "label": "kdfast.experiments.label.config:LabelConfig",
    "teach-generator": "kdfast.experiments.diffusion_model.config:DiffusionConfig",
    "demo": "kdfast.experiments.demo.config:DemoConfig",
}
_GROUPS = {
    "How long, how fast": "epochs iterations batch_size accumulate optimizer lr weight_decay momentum nesterov "
    "schedule milestones lr_decay decay_epochs warmup_epochs min_lr clip_grad_norm ema_decay",
    "Images and networks": "augment stem width",
    "The machine": "precision seed device workers",
    "What is written": "eval_every checkpoint_every checkpoint_steps keep log_every tensorboard",
}
_ROLE = re.compile(r":\w+:`~?(?:[\w.]+\.)?(\w+)`")
_WIDTH = 80


@dataclass(frozen=True)
class Key:
    """One key of a recipe.

    Attributes:
        name: As it is written in a recipe or as ``KEY=VALUE``.
        default: As YAML would say it; ``required`` where there is none.
        accepted: What values it takes.
        text: What it means, in Markdown.
        group: What it stands beside in a list.
    """

    name: str
    default: str
    accepted: str
    text: str
    group: str

    @property
    def first_sentence(self) -> str:
        """The text up to its first full stop, without Markdown."""
        return re.split(r"(?<=[^.][.])\s", self.text.replace("`", ""), maxsplit=1)[0].rstrip(".")


def keys_of_command(command: str) -> list[Key]:
    """The keys of a command that has any; for ``distill`` those that all methods share.

    Raises:
        ConfigError: There is no such command, or it takes no keys.
    """
    if command not in SCHEMAS:
        raise ConfigError(f"command: got {command!r}, accepted: {', '.join(SCHEMAS)}")
    module, _, name = SCHEMAS[command].partition(":")
    return keys_of(getattr(importlib.import_module(module), name))


def keys_of_method(name: str) -> list[Key]:
    """The keys that a method of ``distill`` has of its own."""
    from kdfast.experiments.distill.methods import METHODS, get_method

    if name not in METHODS:
        raise ConfigError(f"method: got {name!r}, accepted: {', '.join(METHODS)}")
    return keys_of(get_method(name).CONFIG, group=f"Method {name}")


def keys_of(schema: type, *, group: str = "What, and on what") -> list[Key]:
    """The fields of a dataclass, its own before those that it inherits.

    Args:
        schema: The dataclass; its docstring, and those of its bases, have an ``Attributes:`` section.
        group: What to call the fields that have no group of their own.
    """
    texts: dict[str, str] = {}
    for base in reversed(schema.__mro__):
        texts |= attributes_of(base)
    hints = get_type_hints(schema, include_extras=True)
    grouped = {name: title for title, names in _GROUPS.items() for name in names.split()}
    own = getattr(schema, "__annotations__", {})
    found = [
        Key(
            entry.name,
            _default(entry),
            _accepted(hints[entry.name]),
            texts.get(entry.name, ""),
            grouped.get(entry.name, group),
        )
        for entry in fields(schema)
    ]
    order = {title: number for number, title in enumerate([group, *_GROUPS])}
    return sorted(found, key=lambda key: (order[key.group], key.name not in own, key.default != "required"))


def attributes_of(schema: type) -> dict[str, str]:
    """A class's ``Attributes:`` section by name, its roles as plain code."""
    text = inspect.cleandoc(schema.__doc__ or "")
    _, found, section = text.partition("Attributes:\n")
    if not found:
        return {}
    entries: dict[str, str] = {}
    name = ""
    for line in section.splitlines():
        if line and not line.startswith(" "):
            break
        if match := re.fullmatch(r" {4}(\w+(?:, \w+)*): (.*)", line):
            name, words = match[1], match[2]
            for one in name.split(", "):
                entries[one] = words
        elif name and line.strip():
            for one in name.split(", "):
                entries[one] += " " + line.strip()
    return {name: _ROLE.sub(r"``\1``", words).replace("``", "`") for name, words in entries.items()}


def as_text(keys: Sequence[Key], *, brief: bool = False, width: int = _WIDTH) -> str:
    """The keys as a table for a terminal, group by group.

    Args:
        keys: In their order.
        brief: One line a key: the first sentence, cut to the width.
        width: Columns.
    """
    names = min(max(len(key.name) for key in keys), 20)
    values = min(max(len(key.default) for key in keys), 14)
    start = names + values + 6
    lines: list[str] = []
    group = ""
    for key in keys:
        if key.group != group:
            group = key.group
            lines += ["", f"{group}:"]
        head = f"  {key.name:<{names}}  {key.default:<{values}}  "
        if brief:
            lines.append(head + textwrap.shorten(key.first_sentence, width - len(head), placeholder=" …"))
            continue
        plain = key.text.replace("`", "")
        said = key.accepted in plain or key.accepted in ("text", "text, or null", "true, false")
        words = plain if said else f"{plain} Accepted: {key.accepted}."
        lines += textwrap.wrap(words, width, initial_indent=head, subsequent_indent=" " * start) or [head]
    return "\n".join(lines[1:])


def as_markdown(keys: Sequence[Key]) -> str:
    """The same as a Markdown table a group."""
    lines: list[str] = []
    group = ""
    for key in keys:
        if key.group != group:
            group = key.group
            lines += ["", f"**{group}**", "", "| Key | Default | Accepted | |", "|---|---|---|---|"]
        cells = (f"`{key.name}`", f"`{key.default}`", key.accepted, key.text)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines[1:])


def _default(entry: Any) -> str:
    if entry.default is MISSING and entry.default_factory is MISSING:
        return "required"
    value = entry.default if entry.default is not MISSING else entry.default_factory()
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, (tuple, list)):
        return f"[{', '.join(map(str, value))}]"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _accepted(hint: Any) -> str:
    """A type hint in words: ``whole number ≥ 1``; ``sgd, adamw``; ``text or null``."""
    origin, parts = get_origin(hint), get_args(hint)
    if hasattr(hint, "__metadata__"):
        bounds = [words for mark in hint.__metadata__ if (words := _bound(mark))]
        return " ".join([_accepted(hint.__origin__), " and ".join(bounds)]).rstrip()
    if origin is Literal:
        return ", ".join(map(str, parts))
    if origin is Union or type(hint).__name__ == "UnionType":
        return ", or ".join(_accepted(part) for part in parts)
    if origin in (tuple, list):
        inner = [part for part in parts if part is not Ellipsis]
        return f"list of {_accepted(inner[0])}" if inner else "list"
    if hint is type(None):
        return "null"
    names: dict[Any, str] = {int: "whole number", float: "number", bool: "true, false", str: "text"}
    return names.get(hint, getattr(hint, "__name__", str(hint)))


def _bound(mark: Any) -> str:
    for kind, sign, name in ((at.Gt, ">", "gt"), (at.Ge, "≥", "ge"), (at.Lt, "<", "lt")):
        if isinstance(mark, kind):
            value: float = getattr(mark, name)
            return f"{sign} {value:g}" if value < 2**31 else ""
    return ""
