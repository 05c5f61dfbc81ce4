"""``kdfast recipes``: what there is to reproduce, and what each of it needs."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kdfast.data.manifest import MANIFEST, is_shard_folder, read_manifest
from kdfast.experiments.common.recipe import load_recipe
from kdfast.experiments.common.results import METRICS
from kdfast.experiments.common.tables import Need, Table, is_table, load_table, open_recipe, table_names
from kdfast.yaml_documents import dump_yaml


def listing(method: str | None = None) -> list[dict[str, Any]]:
    """The recipes that come with kdfast: ``name``, ``source``, ``title``, ``cells`` and ``small``, a dictionary each.

    Raises:
        ConfigError: There are none of this method.
    """
    found = []
    for name in table_names(method):
        _, document, _ = open_recipe(name)
        table = Table(name, document)
        many = is_table(document)
        found.append(
            {
                "name": name,
                "source": table.source if many else "",
                "title": table.title if many else f"images for kdfast synth --recipe {name}",
                "cells": len(table.cells) if many else 0,
                "small": bool(many and table.small_cells),
            }
        )
    return found


def is_there(path: str | Path) -> bool:
    """Whether a teacher or a set of images is finished: its metrics, all shards, or any file."""
    place = Path(path)
    if is_shard_folder(place):
        return read_manifest(place).complete
    if (place / METRICS).exists() or not place.is_dir():
        return place.exists()
    if (place / "parts").is_dir() or any(place.glob(f"*/{MANIFEST}")):
        return all(read_manifest(each.parent).complete for each in place.glob(f"*/{MANIFEST}"))
    # Checkpoints without metrics are a run that was cut short; anything else was brought by somebody.
    return not (place / "checkpoints").exists() and any(place.iterdir())


def describe(name: str, cell: str | None = None) -> dict[str, Any]:
    """A recipe, and what it needs.

    Args:
        name: Of a table or a flat recipe, or its file.
        cell: Which one of a table; ``None`` describes the table.

    Returns:
        Of a cell ``recipe``, ``paper``, ``needs`` (each with ``path``, ``commands`` or ``bring``, and ``there``) and
        ``command``; of a table its ``cells`` with the paper's values.

    Raises:
        ConfigError: There is no such recipe or cell.
    """
    label, document, former = open_recipe(name)
    if not is_table(document):
        return {"name": label, "recipe": load_recipe(name, cell)}
    table, cell = load_table(label), cell or former
    about: dict[str, Any] = {
        "name": label,
        "source": table.source,
        "title": table.title,
        "notes": list(table.notes),
    }
    about |= {"ours": dict(table.ours), "small": list(table.small_cells)}
    if cell is None and len(table.cells) > 1:
        return about | {"cells": {each: table.paper(each) for each in table.cells}}
    cell = cell or table.cells[0]
    values = table.resolve(cell)
    return about | {
        "cell": cell,
        "paper": table.paper(cell),
        "recipe": values,
        "needs": [_need(need) for need in table.needs(values)],
        "command": f"kdfast distill --recipe {label} --cell {cell} --out runs/{cell}",
    }


def as_text(found: Mapping[str, Any]) -> str:
    """What :func:`describe` found, as a flat recipe with comments, or a list of cells."""
    lines = []
    if "source" in found:
        lines += [f"# {found['source']}: {found['title']}"]
        lines += [f"# {note}" for note in found["notes"]]
        lines += [f"# ours: {key} ({why})" for key, why in found["ours"].items()]
    if "cells" in found:
        width = max(map(len, found["cells"]))
        lines += [f"{cell:<{width}}  {reported(paper)}" for cell, paper in found["cells"].items()]
        return "\n".join(lines)
    if "cell" in found:
        lines += [f"# cell {found['cell']}; the paper: {reported(found['paper'])}"]
    lines += [dump_yaml(found["recipe"]).rstrip()]
    for need in found.get("needs", ()):
        lines += [f"# needs {need['path']} ({'there' if need['there'] else 'missing'})"]
        lines += [f"#   {command}" for command in need["commands"]]
        lines += [f"#   bring: {need['bring']}"] if need["bring"] else []
    if "command" in found:
        lines += ["# then", f"#   {found['command']}"]
    return "\n".join(lines)


def reported(paper: Mapping[str, float]) -> str:
    """The paper's values in words."""
    units = {"accuracy": " %", "top5_accuracy": " % top-5", "hours": " h", "miou": " mIoU"}
    words = [
        f"{value:.3f} mIoU" if k == "miou" else f"{value:.2f}{units.get(k, f' {k}')}"
        for k, value in paper.items()
    ]
    return ", ".join(words) or "no number"


def _need(need: Need) -> dict[str, Any]:
    return {
        "path": need.path,
        "commands": [shlex.join(words) for words in need.words],
        "bring": need.bring,
        "there": is_there(need.path),
    }
