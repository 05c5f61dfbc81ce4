"""YAML that somebody wrote: bounded before it is built, and every mistake named with its line."""

from __future__ import annotations

from typing import Any

from kdfast.documents import shown
from kdfast.errors import ConfigError, require

#: Bytes of a recipe; PyYAML reads some 100 kB a second, and the longest table of recipes has 20 kB.
MAX_RECIPE = 128 << 10
_DEEPEST = 16


def parse_yaml(text: str, *, what: str) -> Any:
    """One YAML document.

    Args:
        text: The document.
        what: What to call it in messages.

    Raises:
        ConfigError: It is not YAML, is too long or nested too deep, holds a key twice, a value that is not what it
            looks like (``2020-99-99``), or an alias, of which a few lines make billions of values.
    """
    yaml = require("yaml", extra="train", feature="reading a recipe")
    if len(text) > MAX_RECIPE:
        raise ConfigError(f"{what}: has {len(text)} letters, accepted: at most {MAX_RECIPE}")
    try:
        _check_shape(yaml, text, what)
        loader = _loader(yaml)(text)
        try:
            return loader.get_single_data()
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        words = " ".join(str(error).replace("<unicode string>", "the text").split())
        raise ConfigError(f"{what}: is not YAML: {words[:500]}") from error


def _check_shape(yaml: Any, text: str, what: str) -> None:
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        line = event.start_mark.line + 1
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
            raise ConfigError(f"{what}: line {line}: got an anchor or alias (& or *), accepted: plain values")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > _DEEPEST:
            raise ConfigError(f"{what}: line {line}: is nested too deep, accepted: {_DEEPEST} levels")


def _loader(yaml: Any) -> Any:
    class Loader(yaml.SafeLoader):  # type: ignore[misc]
        """Names the line of what PyYAML lets through as Python's own exceptions, and keys that come twice."""

        def construct_object(self, node: Any, deep: bool = False) -> Any:
            try:
                return super().construct_object(node, deep)
            except yaml.YAMLError:
                raise
            except Exception as error:
                got = shown(getattr(node, "value", None))
                kind = str(node.tag).rpartition(":")[2]
                raise yaml.constructor.ConstructorError(
                    None, None, f"got {got}, which is no {kind} ({error})", node.start_mark
                ) from error

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            made = super().construct_mapping(node, deep)
            if len(made) != len(node.value):
                keys: set[Any] = set()
                for key, _ in node.value:
                    if key.value in keys:
                        raise yaml.constructor.ConstructorError(
                            None, None, f"key {shown(key.value)} comes twice", key.start_mark
                        )
                    keys.add(key.value)
            return made

    return Loader


def dump_yaml(values: Any) -> str:
    """Values as YAML, in their order, short lists on a line."""
    yaml = require("yaml", extra="train", feature="writing a recipe")
    text: str = yaml.safe_dump(
        values, sort_keys=False, allow_unicode=True, default_flow_style=None, width=1000
    )
    return text
