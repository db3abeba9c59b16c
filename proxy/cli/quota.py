"""`estimate-proxy quota`: reads quotas from the ledger's store. An embedded one needs a running gateway."""

from collections.abc import Sequence
from pathlib import Path
from zoneinfo import ZoneInfo

import click
import orjson

from proxy.cli.direct import from_store, read_quotas
from proxy.cli.formats import chosen_form, dialect_option, format_option
from proxy.cli.inputs import config_option, fail, load_settings
from proxy.cli.tables import Column, moment, name_columns, print_table, to_tsv
from proxy.gateway.live_config import directory_of
from proxy.quota.csv_text import Dialect, write_csv
from proxy.quota.forecast import Forecasts
from proxy.quota.quota_report import (
    QUOTA_NAME_COLUMNS,
    QuotaUse,
    quota_document,
    quota_lines,
    quota_uses,
    reached_text,
)
from proxy.quota.quotas import QuotaState
from proxy.quota.team_directory import TeamDirectory


@click.command(short_help="Show quotas, and what is left of them.")
@click.argument("team", required=False)
@config_option
@format_option
@dialect_option
def quota(team: str | None, config: Path | None, form: str | None, dialect: Dialect | None) -> None:
    """Show the quotas of TEAM, or of all teams: used, remaining, and when the next window starts.

    These figures are exact, read from the store. Quotas per week and month also have a forecast, if usage goes back 14
    days: how much will be used at the end, and when the limit will be reached. When piped, the table is tab-separated
    text.
    """
    form = chosen_form(form, dialect)
    settings = load_settings(config)
    zone, directory = settings.org.zone, directory_of(settings)
    if team not in (None, *settings.teams):
        fail(f"{team!r} is not a team in the settings: they have {', '.join(settings.teams) or 'none'}")
    quota_states, forecasts = from_store(read_quotas(settings, team))
    if not any(quota_state.limits.quotas for quota_state in quota_states):
        click.echo("estimate-proxy: no quota is set", err=True)
    match form:
        case "table":
            print_table(f"quotas on estimates, {zone.key}", _columns(quota_states, forecasts, zone, directory))
        case "csv":
            lines = quota_lines(quota_states, forecasts, zone, directory)
            click.echo(write_csv(lines, names=QUOTA_NAME_COLUMNS, dialect=dialect or "rfc4180"), nl=False)
        case "json":
            documents = [quota_document(quota_state, forecasts, zone, directory) for quota_state in quota_states]
            click.echo(orjson.dumps({"teams": documents} if team is None else documents[0]))
        case _:
            click.echo(to_tsv(quota_lines(quota_states, forecasts, zone, directory)), nl=False)


def _columns(
    quota_states: Sequence[QuotaState], forecasts: Forecasts, zone: ZoneInfo, directory: TeamDirectory
) -> list[Column]:
    """Quotas for people; the organisation's once, without a team."""
    uses = quota_uses(quota_states, forecasts)
    limits, used, remaining = zip(*(use.amounts for use in uses), strict=True) if uses else ((), (), ())
    resets_at = [moment(use.window.end_s, zone) for use in uses]
    return [
        Column("team", [use.team for use in uses], is_text=True),
        *name_columns([directory.name_of(use.team) for use in uses], rank=6),
        Column("quota", [use.quota.policy for use in uses], is_text=True),
        Column("limit", limits, rank=2),
        Column("used", used, rank=3),
        Column("used %", [use.used_percent for use in uses]),
        Column("remaining", remaining, rank=1),
        Column("on exceed", [use.on_exceed for use in uses], rank=5, is_text=True),
        Column("resets at", resets_at, rank=4, is_text=True),
        *_forecast_columns(uses, zone),
    ]


def _forecast_columns(uses: Sequence[QuotaUse], zone: ZoneInfo) -> list[Column]:
    """What will be used at the end of the window, and when the limit is reached; none without any forecast."""
    if not any(use.forecast for use in uses):
        return []
    ends = [at_end and f"{at_end} ({low} to {high})" for at_end, low, high in (use.forecast_amounts for use in uses)]
    return [
        Column("at the end", ends, rank=5),
        Column("forecast", [reached_text(use, zone) for use in uses], rank=1, is_text=True, wraps=True),
    ]
