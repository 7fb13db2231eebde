"""YAML with the line of every key, and no key given twice."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import yaml

from ..errors import ConfigError

Path = tuple[str | int | float, ...]
"""Keys and indices from the top of the document."""


@dataclass(slots=True)
class Document:
    """Plain ``data`` of a YAML text and, by path, the lines (from 1) where its keys and items stand."""

    name: str
    data: Any
    lines: dict[Path, int]

    def line(self, path: Path) -> int:
        """The line of ``path``, or of the nearest thing around it that has one."""
        while path and path not in self.lines:
            path = path[:-1]
        return self.lines.get(path, 1)

    def at(self, path: Path) -> str:
        """``FILE:LINE: KEY`` for the start of a message."""
        key = ".".join(str(part) for part in path)
        return f"{self.name}:{self.line(path)}" + (f": {key}" if key else "")

    def rename(self, old: Path, new: Path) -> None:
        """Let ``new`` and what is under it have the lines of ``old``."""
        moved = {new + path[len(old) :]: line for path, line in self.lines.items() if path[: len(old)] == old}
        self.lines |= moved


def load_yaml(text: str, name: str) -> Document:
    """Read one document. Raises ConfigError naming ``name`` and the line: bad syntax, or a key that stands twice."""
    loader = yaml.SafeLoader(text)
    lines: dict[Path, int] = {(): 1}
    try:
        node = loader.get_single_node()
        data = None if node is None else _build(loader, node, (), lines, name, ())
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = mark.line + 1 if mark is not None else 1
        problem = getattr(error, "problem", None) or str(error)
        raise ConfigError(f"{name}:{line}: not valid YAML: {problem}") from error
    finally:
        loader.dispose()
    return Document(name, data, lines)


def _build(
    loader: yaml.SafeLoader, node: yaml.Node, path: Path, lines: dict[Path, int], name: str, around: tuple[int, ...]
) -> Any:
    if id(node) in around:
        raise ConfigError(f"{name}:{node.start_mark.line + 1}: an alias refers to what it stands in")
    around = (*around, id(node))
    match node:
        case yaml.MappingNode():
            own_keys = {id(key) for key, _ in node.value}
            loader.flatten_mapping(node)  # `<<: *alias`; what is written out here wins over what is merged
            mapping: dict[Any, Any] = {}
            own: set[Any] = set()
            for key_node, value_node in node.value:
                key = loader.construct_object(key_node, deep=True)
                line = key_node.start_mark.line + 1
                if not isinstance(key, str | int | float | bool):
                    raise ConfigError(f"{name}:{line}: a key must be a word")
                if id(key_node) in own_keys:
                    if key in own:
                        raise ConfigError(f"{name}:{line}: key {key!r} stands here twice; keep one")
                    own.add(key)
                lines[(*path, key)] = line
                mapping[key] = _build(loader, value_node, (*path, key), lines, name, around)
            return mapping
        case yaml.SequenceNode():
            items = []
            for index, item in enumerate(node.value):
                lines[(*path, index)] = item.start_mark.line + 1
                items.append(_build(loader, item, (*path, index), lines, name, around))
            return items
        case _:
            return loader.construct_object(node, deep=True)
