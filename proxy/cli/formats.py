"""The options `--format` and `--csv-dialect` of the commands that show reports."""

import sys

import click

from proxy.cli.inputs import fail
from proxy.quota.csv_text import DIALECTS, Dialect

format_option = click.option(
    "--format",
    "form",
    type=click.Choice(["table", "csv", "json"]),
    help="table, the default, is for people; csv and json are for programs. json is what the endpoint returns.",
)
dialect_option = click.option(
    "--csv-dialect",
    "dialect",
    type=click.Choice(DIALECTS),
    help="rfc4180, the default, is for programs, and where spreadsheets have a decimal point; excel-semicolon is for "
    "spreadsheets in countries with a decimal comma. Implies --format csv.",
)


def chosen_form(form: str | None, dialect: Dialect | None) -> str:
    """The value of `--format`, or what `--csv-dialect` implies; "tsv" for a table that is not shown on a terminal."""
    if dialect is not None:
        if form not in (None, "csv"):
            fail("--csv-dialect is only for CSV: leave it out, or use --format csv")
        return "csv"
    if form is not None and form != "table":
        return form
    return "table" if sys.stdout.isatty() else "tsv"
