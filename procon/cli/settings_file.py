"""Settings in a YAML file, by the names that the flags have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from procon.errors import ProConError


class _SettingsLoader(yaml.BaseLoader):
    """Every scalar as it is written, for argparse to read as it reads flags: YAML itself reads 2e-4 as a text and
    ``save_strategy: no`` for a false. A key that is given twice is an error: otherwise the last one would win."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for name, mark in [(key.value, key.start_mark) for key, _ in node.value if isinstance(key, yaml.ScalarNode)]:
            if name in seen:
                raise yaml.MarkedYAMLError(None, None, f"{name!r:.60} is given twice", mark)
            seen.add(name)
        return super().construct_mapping(node, deep)

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):  # a few of them within each other stand for more than memory holds
            raise yaml.MarkedYAMLError(None, None, "aliases are not read", self.peek_event().start_mark)
        return super().compose_node(parent, index)


def read_settings(file: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The settings as they are written, and as YAML reads them; names with underscores.

    Raises:
        ProConError: if there is no such file, or it holds no settings.
    """
    try:
        text = file.read_text(encoding="utf-8")
        written = yaml.load(text, Loader=_SettingsLoader) or {}  # noqa: S506  # it builds texts alone
        read = yaml.safe_load(text) or {}
    except FileNotFoundError:
        raise ProConError(f"config file {str(file)!r} does not exist: check the path") from None
    except Exception as error:  # PyYAML has errors of its own, and lets through those of Python's types
        raise ProConError(
            f"config file {str(file)!r} cannot be read as YAML: {error or type(error).__name__}"
        ) from error
    if not isinstance(written, dict) or not isinstance(read, dict):
        raise ProConError(f"config file {str(file)!r} holds no 'name: value' lines: write one setting per line")
    return _underscored(written, file), _underscored(read, file)


def _underscored(settings: dict[Any, Any], file: Path) -> dict[Any, Any]:
    """Names with dashes as flags have them are read as those with underscores."""
    found: dict[Any, Any] = {}
    for name, value in settings.items():
        plain = name.replace("-", "_") if isinstance(name, str) else name
        if plain in found:
            raise ProConError(f"config file {str(file)!r} cannot be read as YAML: {plain!r:.60} is given twice")
        found[plain] = value
    return found
