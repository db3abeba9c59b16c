"""Output of the results: tables on a terminal, tab-separated in a pipe, JSON, and sections of the docs."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from bench.machine import ROOT
from bench.parts import Part, Table
from proxy.cli.tables import to_tsv

FORMAT = 1
DOCS = ROOT / "docs" / "performance.md"
PLOT = ROOT / "docs" / "performance-growth.svg"


def print_part(part: Part, console: Console) -> None:
    """Prints aligned tables on a terminal, tab-separated ones to a pipe."""
    console.print(Text(part.how))
    for note in part.notes:
        console.print(Text(note))
    for why in part.failures.values():
        console.print(Text(f"No number: {why}"), style="red")
    for table in part.all_tables():
        if console.is_terminal:
            console.print(_rich(table))
        else:
            console.out(to_tsv([table.columns, *table.rows]), highlight=False)


def document(facts: Mapping[str, Any], parts: Sequence[Part]) -> dict[str, Any]:
    """Returns the JSON: the machine, then each part's results and targets."""
    return {
        "format": FORMAT,
        "machine": dict(facts),
        "parts": {
            part.name: {
                "how": part.how,
                "notes": list(part.notes),
                "failures": dict(part.failures),
                "targets": [
                    {"text": t.text, "bound": t.bound, "at_least": t.at_least, "measured": t.measured, "met": t.met}
                    for t in part.targets
                ],
                "raw": part.raw,
            }
            for part in parts
        },
    }


def written_json(path: Path, facts: Mapping[str, Any], parts: Sequence[Part]) -> None:
    path.write_text(json.dumps(document(facts, parts), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def markdown(part: Part, facts: Mapping[str, Any]) -> str:
    """Returns a section of the docs."""
    where = f"{facts['cpu']}, {facts['cores']} cores, {facts['kernel']}, Python {facts['python']}"
    lines = [f"{facts['date'][:10]}, commit {facts['commit']}: {where}; {facts['setting']}; {part.how}.", ""]
    for note in [*part.notes, *(f"No number: {why}." for why in part.failures.values())]:
        lines += [note, ""]
    for table in part.all_tables():
        lines += [f"**{table.title}**", "", *_markdown_table(table), ""]
    return "\n".join(lines).rstrip() + "\n"


def write_docs(parts: Sequence[Part], facts: Mapping[str, Any], path: Path = DOCS) -> None:
    """Writes each part between its markers; parts that were not measured stay."""
    text = path.read_text(encoding="utf-8")
    for part in parts:
        begin, end = f"<!-- bench {part.name} -->\n", f"<!-- end of bench {part.name} -->"
        pattern = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
        section = begin + "\n" + markdown(part, facts) + "\n" + end
        text = pattern.sub(lambda _, section=section: section, text)  # type: ignore[misc]
    path.write_text(text, encoding="utf-8")


def _rich(table: Table) -> RichTable:
    made = RichTable(title=Text(table.title), title_justify="left", box=None, pad_edge=False)
    for index, column in enumerate(table.columns):
        made.add_column(column, justify="right" if index else "left", overflow="fold")
    for row in table.rows:
        made.add_row(*map(Text, row))
    return made


def _markdown_table(table: Table) -> list[str]:
    rule = ["---", *["---:"] * (len(table.columns) - 1)]
    return [f"| {' | '.join(cells)} |" for cells in (table.columns, rule, *table.rows)]
