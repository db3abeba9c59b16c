"""Writes reports as CSV that is safe to open in a spreadsheet."""

import csv
from collections.abc import Collection, Sequence
from io import StringIO

from proxy.problems import NO_NAME

FORMULA_CHARACTERS = "=+-@\t\r\n"
"""Spreadsheets may run a cell that begins with one of these (OWASP, CSV Injection)."""


def write_csv(lines: Sequence[Sequence[str]], *, names: Collection[str]) -> bytes:
    """Lines of cells as CSV (RFC 4180), the header first. `names`: the columns whose cells users can choose."""
    header, *rows = lines
    text = StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(header)
    for row in rows:
        cells = zip(header, row, strict=True)
        writer.writerow([_escape_formula(cell) if column in names else cell for column, cell in cells])
    return text.getvalue().encode()


def _escape_formula(cell: str) -> str:
    """A cell that no spreadsheet runs, as OWASP advises. A single `-` is not a formula, and stays as it is."""
    is_formula = cell.startswith(tuple(FORMULA_CHARACTERS)) and cell != NO_NAME
    return f"'{cell}" if is_formula else cell
