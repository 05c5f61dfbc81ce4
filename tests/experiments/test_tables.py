"""Tables of recipes: every shipped one resolves, says the paper's values, and says how to make what it needs."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from kdfast.cli.app import app
from kdfast.errors import ConfigError
from kdfast.experiments.common.recipe import build_config, check_keys, load_recipe, parse_overrides
from kdfast.experiments.common.tables import Need, load_table, table_names, tables
from kdfast.experiments.diffusion_model.config import DiffusionConfig
from kdfast.experiments.distill import run as distill
from kdfast.experiments.recipes import as_text, describe, is_there, listing
from kdfast.experiments.select.config import SelectConfig
from kdfast.experiments.synth.config import SynthConfig
from kdfast.experiments.teach.config import TeachConfig

PAPERS = json.loads((Path(__file__).parent / "papers.json").read_text())
TABLES = list(tables())
SCHEMAS: dict[str, Any] = {
    "teach": TeachConfig,
    "synth": SynthConfig,
    "select": SelectConfig,
    "teach-generator": DiffusionConfig,
}
#: Fetched, or part of scikit-learn: nobody makes them.
FETCHED = ("timm:", "torchvision:", "hf:", "digits")


def test_there_is_a_file_a_table_and_not_a_file_a_cell() -> None:
    assert len(table_names()) <= 70
    assert sum(len(table.cells) for table in TABLES) >= 428
    methods = {table.name.partition("/")[0] for table in TABLES if table.small_cells}
    assert methods == {"dmkd", "surrogate", "ssdkd", "diffkd", "kdiffusion"}


def test_the_papers_values_are_those_of_the_checked_in_list() -> None:
    found = {}
    for table in TABLES:
        load_table(table.name)  # checked as a user's own is
        values = {cell: paper for cell in table.cells if (paper := table.paper(cell))}
        if values:
            found[table.name] = {
                c: p[table.metric] if set(p) == {table.metric} else p for c, p in values.items()
            }
    assert found == PAPERS


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.name)
def test_every_cell_resolves_and_says_what_it_needs(table: Any) -> None:
    assert table.title
    assert table.source
    commands = {}
    for small in (False, True):
        for cell in table.small_cells if small else table.cells:
            values = table.resolve(cell, small=small)
            distill.parse(values, source=f"{table.name}/{cell}")
            needs = {need.path: need for need in table.needs(values, small=small)}
            for key in ("teacher", "data", "test_data"):
                path = values.get(key)
                assert path is None or path in needs or path.startswith(FETCHED), (cell, key)
            commands |= {need.path: need for need in needs.values()}
    for need in commands.values():
        check_commands(need)


def check_commands(need: Need) -> None:
    """What makes a path has options that exist and values that are valid, and writes there."""
    assert bool(need.commands) != bool(need.bring), need
    for words in need.words:
        assert words[0] in ("kdfast", "hf", "python")
        if words[0] != "kdfast":
            continue
        command = getattr(get_command(app), "commands")[words[1]]  # noqa: B009 - a click group
        with command.make_context(words[1], words[2:]) as context:
            given = {
                k: v for k, v in context.params.items() if v not in (None, False, ()) and k != "overrides"
            }
        assert need.path == str(given["out"]) or need.path.startswith(f"{given['out']}/"), need
        values = parse_overrides(context.params["overrides"] or [])
        if recipe := given.pop("recipe", None):
            values = {**load_recipe(recipe), **values}
        schema = SCHEMAS[words[1]]
        values |= {k: str(v) if isinstance(v, Path) else v for k, v in given.items()}
        if words[1] in ("teach", "teach-generator"):
            del values["out"]
        check_keys(values, schema, source=shlex.join(words))
        build_config(schema, values, source=shlex.join(words))


def test_what_a_table_chose_itself_is_in_it() -> None:
    for table in TABLES:
        keys = {key for cell in table.cells for key in table.resolve(cell)}
        for key in table.ours:
            assert key in keys or " " in key or key in ("attack", "augmentation", "teachers"), (
                table.name,
                key,
            )


def test_old_names_and_paths_find_their_cells() -> None:
    assert load_recipe("recipes/dmkd/table6-s4-t250.yaml") == load_recipe("dmkd/table-6", "s4-t250")
    assert load_recipe("ssdkd/cifar10-wrn_40_2-wrn_16_1-fast2") == load_recipe(
        "ssdkd/table-1", "cifar10-wrn_40_2-wrn_16_1-fast2"
    )
    assert load_recipe("dmkd/figure6")["temperature"] == 10
    assert load_recipe("diffkd/digits")["method"] == "diffkd"
    assert load_recipe("surrogate/table6-cifar10-shaders-attack")["attack"] is True


TABLE = """
common: {method: dmkd, lr: 0.1, teacher: runs/t-resnet8}
parts: {fast: {lr: 0.2, epochs: 3}, long: {epochs: 9}}
cells:
  one: {use: [fast, long], paper: 50.5}
  two: {lr: 0.3, student: resnet8, data: data/x}
teacher:
  runs/t-{model}: kdfast teach --data digits --model {model} --out runs/t-{model}
data:
  data/x: kdfast select data/y runs/t-resnet8 --out data/x
  data/y: {bring: pictures}
ours: {lr: because}
miniature:
  map: {resnet8: resnet14}
  common: {epochs: 1}
  cells: [two]
  data: {data/x: python -m x}
"""


@pytest.fixture
def table(tmp_path: Path) -> Path:
    (tmp_path / "t.yaml").write_text(TABLE)
    return tmp_path / "t.yaml"


def test_common_parts_and_own_keys_in_order(table: Path) -> None:
    assert load_recipe(table, "one") == {
        "method": "dmkd",
        "lr": 0.2,
        "teacher": "runs/t-resnet8",
        "epochs": 9,
    }
    assert load_recipe(table, "two")["lr"] == 0.3
    found = load_table(table)
    assert found.paper("one") == {"accuracy": 50.5}
    assert found.paper("two") == {}
    assert found.resolve("two", small=True) == {**found.resolve("two"), "student": "resnet14", "epochs": 1}


def test_needs_come_after_what_they_are_made_from(table: Path) -> None:
    needs = load_table(table).needs(load_recipe(table, "two"))
    assert [need.path for need in needs] == ["runs/t-resnet8", "data/y", "data/x"]
    assert needs[0].commands == ("kdfast teach --data digits --model resnet8 --out runs/t-resnet8",)
    assert needs[1].bring == "pictures"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "cells: {a: {use: [x]}}",
            r"cells: a: use: got \['x'\], accepted: a list of parts \(there are none\)",
        ),
        ("cells: {a: 3}", "cells: a: got 3, accepted: a name with keys and values"),
        ("cells: {a: {paper: high}}", "cells: a: paper: got 'high', accepted: a number"),
        ("cels: 3\ncells: {a: {}}", "keys: got 'cels', accepted: cells, common"),
        ("cells: {a: {}}\nminiature: {cell: [a]}", "miniature: keys: got 'cell', accepted: cells"),
        ("cells: {a: {}}\nminiature: {cells: [b]}", "miniature: cells: got 'b', accepted: a"),
        ("cells: {a: {}}\ncommon: 3", "common: got 3, accepted: keys and values"),
    ],
)
def test_what_is_no_table_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "t.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_recipe(tmp_path / "t.yaml", "a")


def test_a_cell_has_to_be_named_and_to_exist(table: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has 2 cells, name one with --cell: one, two"):
        load_recipe(table)
    with pytest.raises(ConfigError, match=r"--cell: .*t\.yaml has no cell 'tow'; did you mean two"):
        load_recipe(table, "tow")
    (tmp_path / "flat.yaml").write_text("lr: 1")
    with pytest.raises(ConfigError, match=r"--cell: got 'one', but recipe .*flat\.yaml is no table"):
        load_recipe(tmp_path / "flat.yaml", "one")
    with pytest.raises(ConfigError, match="got a flat recipe, accepted: a table"):
        load_table(tmp_path / "flat.yaml")
    with pytest.raises(ConfigError, match=r"no recipe of that name; did you mean .*dmkd/table-2"):
        load_recipe("dmkd/tabel-2")
    with pytest.raises(ConfigError, match="has no miniature, accepted: full"):
        load_table("dmkd/table-2").resolve("wrn_40_2-wrn_16_1", small=True)


def test_the_listing_and_one_recipe_in_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert {row["name"].partition("/")[0] for row in listing("dmkd")} == {"dmkd"}
    with pytest.raises(ConfigError, match=r"recipes: got 'dmdk', accepted: .*dmkd"):
        listing("dmdk")
    found = describe("dmkd/table-2", "wrn_40_2-wrn_16_1")
    assert [need["there"] for need in found["needs"]] == [False, False, False]
    (tmp_path / "runs/cifar100-wrn_40_2").mkdir(parents=True)
    (tmp_path / "runs/cifar100-wrn_40_2/metrics.json").write_text("{}")
    text = as_text(describe("dmkd/table-2", "wrn_40_2-wrn_16_1"))
    assert "the paper: 56.29 %" in text
    assert "# needs runs/cifar100-wrn_40_2 (there)" in text
    assert "# needs data/dit-imagenet-s2-t100-50k (missing)" in text
    (tmp_path / "flat.yaml").write_text(text)
    assert load_recipe(tmp_path / "flat.yaml") == load_recipe("dmkd/table-2", "wrn_40_2-wrn_16_1")
    assert "s1-t100 " in as_text(describe("dmkd/table-6"))


def test_what_is_half_done_is_not_there(tmp_path: Path) -> None:
    assert not is_there(tmp_path / "none")
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    assert not is_there(tmp_path / "run")
    (tmp_path / "run" / "metrics.json").write_text("{}")
    assert is_there(tmp_path / "run")
    (tmp_path / "folder" / "cat").mkdir(parents=True)
    assert is_there(tmp_path / "folder")
