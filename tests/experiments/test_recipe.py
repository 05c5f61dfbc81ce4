"""Recipes: every shipped one is valid; every slip is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from kdfast.errors import ConfigError
from kdfast.experiments.common.recipe import build_config, check_keys, load_recipe, parse_overrides, to_yaml
from kdfast.experiments.common.results import fingerprint, summarise
from kdfast.experiments.common.tables import table_names
from kdfast.experiments.distill import run as distill
from kdfast.experiments.distill.config import DistillConfig
from kdfast.experiments.synth.config import SynthConfig
from kdfast.experiments.teach.config import TeachConfig
from kdfast.methods import DMKDConfig
from kdfast.models import create_model
from tests.support.recipes import Cell, cells, parameters

RECIPES = cells("dmkd")
NEEDED = {"teacher": "t", "student": "resnet8", "data": "d"}


@pytest.mark.parametrize("cell", parameters(RECIPES))
def test_every_recipe_is_valid_and_its_networks_exist(cell: Cell) -> None:
    config, method = distill.parse(cell.values, source=cell.stem)
    trainer = config.trainer_config()
    assert trainer.schedule.milestones == () or trainer.schedule.milestones[-1] < trainer.epochs
    assert isinstance(method, DMKDConfig)
    if ":" not in config.student:
        create_model(config.student, 10, **config.model_options())


def test_every_cell_of_the_tables_has_a_recipe() -> None:
    stems = {cell.stem for cell in RECIPES}
    counts = {
        "table1-": 3,
        "cifar100-": 5,
        "table3-": 6,
        "table6-": 20,
        "table7-": 10,
        "table8-": 8,
        "table9-": 4,
    }
    counts |= {"table10-": 9, "figure5-": 7, "figure": 15}
    for prefix, count in counts.items():
        assert len([stem for stem in stems if stem.startswith(prefix)]) == count, prefix


@pytest.mark.parametrize("name", table_names("synth"))
def test_every_recipe_for_images_is_valid(name: str) -> None:
    config = build_config(SynthConfig, {**load_recipe(name), "out": "o"}, source=name)
    check_keys(load_recipe(name), SynthConfig, source=name)
    assert config.images >= 2000


def test_the_images_that_recipes_ask_for_have_a_name_that_says_how() -> None:
    for cell in (c for c in RECIPES if c.stem.startswith("table6")):
        _, s, t = cell.stem.split("-")
        assert cell.values["data"] == f"data/dit-imagenet-{s}-{t}-200k"


def test_the_papers_numbers() -> None:
    config, method = distill.parse(load_recipe("dmkd/table-2", "wrn_40_2-wrn_16_2"))
    assert (config.lr, config.momentum, config.weight_decay) == (0.05, 0.9, 5e-4)
    assert (config.batch_size, config.epochs, config.milestones) == (64, 240, (150, 180, 210))
    assert (method.temperature, method.labels, method.cutmix_alpha) == (10, "soft", 0.25)
    config, method = distill.parse(load_recipe("dmkd/table-6", "s2-t100"))
    assert (config.lr, config.weight_decay, config.batch_size) == (0.1, 1e-4, 256)
    assert (config.epochs, config.milestones, method.cutmix_alpha) == (100, (30, 60, 90), None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "is not YAML"),
        ("- a\n- b", "got a list, accepted: lines of 'key: value'"),
        ("", "got a NoneType"),
        ("1: 2", "accepted: lines of 'key: value'"),
        ("a:\n  b: 1", "a: got nested keys"),
    ],
)
def test_what_is_no_recipe_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(ConfigError, match=rf"r\.yaml: .*{message}"):
        load_recipe(tmp_path / "r.yaml")


def test_an_unreadable_recipe_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml: cannot be read: No such file"):
        load_recipe(tmp_path / "none.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"binary\.yaml: cannot be read"):
        load_recipe(tmp_path / "binary.yaml")


def test_unknown_keys_come_first_with_the_nearest_known_one() -> None:
    with pytest.raises(ConfigError, match=r"r: unknown key 'temprature' \(did you mean 'temperature'\?\)$"):
        distill.parse({"method": "nonsense", "temprature": 4, "epochs": "many"}, source="r")
    with pytest.raises(ConfigError, match=r"unknown key 'zzzz'; known: .*student"):
        distill.parse({"zzzz": 4}, source="r")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"epochs": "ten"}, "epochs: got 'ten', accepted: a valid integer"),
        ({"epochs": 0}, "epochs: got 0, accepted: greater than or equal to 1"),
        ({"epochs": True}, "epochs: got True, accepted: a number"),
        ({"lr": -1}, "lr: got -1, accepted: greater than 0"),
        ({"optimizer": "adam"}, "optimizer: got 'adam', accepted: 'sgd', 'adamw' or 'rmsprop'"),
        (
            {"augment": ["spin"]},
            "augment: got 'spin', accepted: 'crop', 'resized_crop', 'flip', .*'erase'",
        ),
        ({"schedule": "multistep"}, "milestones: got none"),
        ({"schedule": "multistep", "milestones": [9, 3]}, "milestones: got"),
        ({"temperature": -3}, "temperature: got -3.0, accepted: a number above 0"),
        ({"loader": "tf"}, "loader: got 'tf'"),
        ({"method": "magic"}, "method: got 'magic', accepted: at, diffkd"),
    ],
)
def test_invalid_values_say_which_what_and_what_else(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        distill.parse({**NEEDED, **values})


def test_what_is_missing_is_named() -> None:
    with pytest.raises(ConfigError, match="teacher: missing; student: missing"):
        distill.parse({"method": "dmkd"})
    with pytest.raises(ConfigError, match="data: missing; accepted: a directory of shards"):
        distill.parse({"method": "dmkd", "teacher": "t", "student": "resnet8"})


def test_overrides_are_read_as_yaml_and_numbers_as_numbers() -> None:
    values = parse_overrides(["lr=1e-4", "augment=[crop, flip]", "cutmix_alpha=null", "student=wrn_16_1"])
    config, method = distill.parse({**NEEDED, **values})
    assert (config.lr, config.augment, method.cutmix_alpha) == (1e-4, ("crop", "flip"), None)
    with pytest.raises(ConfigError, match="override: got 'epochs', accepted: KEY=VALUE"):
        parse_overrides(["epochs"])
    with pytest.raises(ConfigError, match="override a: got '\\[', which is not YAML"):
        parse_overrides(["a=["])


def test_a_written_recipe_reads_back(tmp_path: Path) -> None:
    config, method = distill.parse({**NEEDED, "lr": 0.3, "milestones": [1, 2], "schedule": "multistep"})
    (tmp_path / "recipe.yaml").write_text(to_yaml(config, method))
    assert distill.parse(load_recipe(tmp_path / "recipe.yaml")) == (config, method)


def test_where_work_happens_is_not_what_it_is() -> None:
    one, other = (build_config(DistillConfig, {**NEEDED, "device": d}, source="") for d in ("cpu", "auto"))
    assert fingerprint(one) == fingerprint(other)
    assert fingerprint(one) != fingerprint(build_config(DistillConfig, {**NEEDED, "lr": 1}, source=""))


def test_keys_of_several_schemas_count() -> None:
    check_keys({"temperature": 1, "data": 2}, TeachConfig, DMKDConfig, source="r")
    with pytest.raises(TypeError, match="accepted: a dataclass"):
        build_config(int, {}, source="r")


def test_seeds_are_summarised() -> None:
    runs = [{"accuracy": a, "seed": s, "steps": 5} for s, a in enumerate((0.5, 0.7, 0.9))]
    summary = summarise(runs)
    assert summary["accuracy"] == pytest.approx([0.5, 0.7, 0.9])
    assert (summary["accuracy_mean"], summary["accuracy_std"]) == pytest.approx((0.7, 0.2))
    assert summary["seeds"] == [0, 1, 2]
    assert "steps_mean" not in summary
