"""Settings as nested tables, before they are validated: any value may be of a wrong type."""

from typing import Any

Tree = dict[str, Any]


def tables_of(tree: Tree, section: str) -> dict[str, Tree]:
    tables = tree.get(section)
    return {k: v for k, v in tables.items() if isinstance(v, dict)} if isinstance(tables, dict) else {}
