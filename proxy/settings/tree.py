"""Settings as nested tables, before they are validated: any value may be of a wrong type."""

from collections.abc import Iterator, Mapping
from typing import Any

Tree = dict[str, Any]
KeyPath = tuple[str, ...]


def nested(path: KeyPath, value: Any) -> Tree:
    """`value` in the tables of its path."""
    *parents, last = path
    tree = {last: value}
    for key in reversed(parents):
        tree = {key: tree}
    return tree


def merge(tree: Tree, layer: Tree) -> None:
    """Overwrites `tree` with `layer`, table by table."""
    for key, value in layer.items():
        if isinstance(value, dict) and isinstance(tree.get(key), dict):
            merge(tree[key], value)
        else:
            tree[key] = value


def leaves(tree: Mapping[str, Any], parents: KeyPath = ()) -> Iterator[tuple[KeyPath, Any]]:
    """All values that are not tables, each with its path."""
    for key, value in tree.items():
        path = (*parents, key)
        if isinstance(value, dict):
            yield from leaves(value, path)
        else:
            yield path, value


def tables_of(tree: Tree, section: str) -> dict[str, Tree]:
    """The tables in a section, such as the teams in `teams`; what is not a table is left out."""
    tables = tree.get(section)
    return {k: v for k, v in tables.items() if isinstance(v, dict)} if isinstance(tables, dict) else {}


def items_of(table: object, key: str) -> list[Any]:
    """The list at `key`; empty if there is none."""
    items = table.get(key) if isinstance(table, dict) else None
    return items if isinstance(items, list) else []
