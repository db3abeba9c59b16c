"""CSV for spreadsheets: separators, decimal commas, and names that would be taken for numbers, dates or formulas."""

import csv
from io import StringIO

import pytest

from proxy.quota.csv_text import Dialect, write_csv

LINES = [
    ["day", "team", "estimated_credits", "team_name"],
    ["2026-11-22", "design", "76.5", 'Design; "all"'],
    ["2026-11", "007", "-3", "="],
]


def test_rfc_4180() -> None:
    assert write_csv(LINES, names=("team", "team_name")).decode() == (
        'day,team,estimated_credits,team_name\r\n2026-11-22,design,76.5,"Design; ""all"""\r\n2026-11,007,-3,\'=\r\n'
    )


def test_semicolons_decimal_commas_and_a_byte_order_mark() -> None:
    assert write_csv(LINES, names=("team", "team_name"), dialect="excel-semicolon").decode() == (
        "\ufeffday;team;estimated_credits;team_name\r\n"
        '2026-11-22;design;76,5;"Design; ""all"""\r\n'
        "2026-11;'007;-3;'=\r\n"
    )


def name_in(dialect: Dialect, name: str) -> str:
    text = write_csv([["model"], [name]], names=("model",), dialect=dialect).decode("utf-8-sig")
    _, (written,) = csv.reader(StringIO(text, newline=""), delimiter=";")
    return written


@pytest.mark.parametrize(
    "name",
    [
        *(
            "1",
            "007",
            "1.5",
            "1,5",
            "1e5",
            "1E-5",
            "12:30",
            "10 pm",
            "1-2",
            "1-2-3",
            "2026-11",
            "1/2",
            "50%",
            "(5)",
            "5 €",
        ),
        *("3-mar", "mar-3", "MARCH1", "sept2", "1 dez 26", "12.März", "mai 2026", "1-août", "maj-1", "mrt-3"),
    ],
)
def test_names_that_look_like_numbers_or_dates_are_kept_as_text(name: str) -> None:
    assert name_in("excel-semicolon", name) == f"'{name}"
    assert name_in("rfc4180", name) == name, "programs get names as they are"


@pytest.mark.parametrize(
    "name",
    [
        *(
            "-",
            "",
            "design",
            "march",
            "team-7",
            "marketing-2",
            "v2",
            "e5",
            "a1",
            "sdxl-1.0",
            "flux1",
            "3d",
            "1a2b",
            "ma-1",
        ),
        *("Stable Diffusion 1.5", "4x-upscaler", "gpt-4o", "juggernautxl-9"),
    ],
)
def test_other_names_stay_as_they_are(name: str) -> None:
    assert name_in("excel-semicolon", name) == name


def test_formulas_are_escaped_in_both_dialects() -> None:
    assert name_in("excel-semicolon", "=1+1") == name_in("rfc4180", "=1+1") == "'=1+1"
