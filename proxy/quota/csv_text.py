"""Writes reports as CSV that is safe to open in a spreadsheet.

* `rfc4180` is for programs, and for spreadsheets in countries with a decimal point.
* `excel-semicolon` is for spreadsheets in countries with a decimal comma: semicolons between cells, decimal commas, a
  byte order mark, without which Excel reads UTF-8 as another encoding, and an apostrophe before names that a
  spreadsheet would turn into a number or a date. Dates stay ISO 8601, which spreadsheets read in every country.
"""

import csv
import re
from collections.abc import Collection, Sequence
from io import StringIO
from typing import Literal, get_args

from proxy.problems import NO_NAME

Dialect = Literal["rfc4180", "excel-semicolon"]
DIALECTS: tuple[Dialect, ...] = get_args(Dialect)

FORMULA_CHARACTERS = "=+-@\t\r\n"
"""Spreadsheets may run a cell that begins with one of these (OWASP, CSV Injection)."""

_MONTHS = (
    " january february march april may june july august september october november december "
    "januar februar märz mrz mai juni juli oktober dezember "  # codespell:ignore
    "janvier février mars avril juin juillet août septembre octobre novembre décembre "
    "enero febrero marzo abril mayo junio julio agosto septiembre octubre noviembre diciembre "
    "gennaio febbraio aprile maggio giugno luglio settembre ottobre dicembre "
    "janeiro fevereiro março maio junho julho setembro outubro novembro dezembro "
    "januari februari maart mrt mei augustus december augusti "
    "styczeń luty marzec kwiecień maj czerwiec lipiec sierpień wrzesień październik listopad grudzień"
)
"""English, German, French, Spanish, Italian, Portuguese, Dutch, Swedish and Polish, with the abbreviations that are not
the beginning of a name. A space stands before each, so that a search finds whole beginnings."""

_NUMBER_PARTS = r"[\d\s.,:/'%()€$£+-]*"
_NUMBER_OR_DATE = re.compile(rf"({_NUMBER_PARTS})([^\W\d_]*){_NUMBER_PARTS}")
_AFTER_A_NUMBER = ("e", "a", "p", "am", "pm")
"""An exponent or a time of day."""

_DECIMAL = re.compile(r"-?\d+\.\d+")


def write_csv(lines: Sequence[Sequence[str]], *, names: Collection[str], dialect: Dialect = "rfc4180") -> bytes:
    """Lines of cells as CSV, the header first. `names`: the columns whose cells users can choose."""
    header, *rows = lines
    for_excel = dialect == "excel-semicolon"
    text = StringIO(newline="")
    writer = csv.writer(text, delimiter=";" if for_excel else ",")
    writer.writerow(header)
    for row in rows:
        cells = zip(header, row, strict=True)
        writer.writerow([_name(cell, dialect) if column in names else _value(cell, dialect) for column, cell in cells])
    return text.getvalue().encode("utf-8-sig" if for_excel else "utf-8")


def _name(cell: str, dialect: Dialect) -> str:
    """A cell that no spreadsheet runs, as OWASP advises. A single `-` is not a formula, and stays as it is."""
    is_formula = cell.startswith(tuple(FORMULA_CHARACTERS)) and cell != NO_NAME
    return f"'{cell}" if is_formula or (dialect == "excel-semicolon" and _is_converted(cell)) else cell


def _value(cell: str, dialect: Dialect) -> str:
    return cell.replace(".", ",") if dialect == "excel-semicolon" and _DECIMAL.fullmatch(cell) else cell


def _is_converted(cell: str) -> bool:
    """Whether a spreadsheet may read a name as a number, a date or a time, such as `007`, `1e5`, `1-2` or `mar-3`."""
    found = _NUMBER_OR_DATE.fullmatch(cell)
    if found is None or not re.search(r"\d", cell):
        return False
    before, word = found[1], found[2].casefold()
    is_month = len(word) >= len("mar") and f" {word}" in _MONTHS
    return not word or is_month or (word in _AFTER_A_NUMBER and re.search(r"\d", before) is not None)
