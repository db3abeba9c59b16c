"""Reports on quotas: forecasts in words, in cells and in JSON."""

from dataclasses import replace
from datetime import datetime
from typing import Any
from zoneinfo import ZoneInfo

import orjson
import pytest

from proxy.quota.credits import MICRO
from proxy.quota.forecast import Forecast
from proxy.quota.quota_report import QUOTA_COLUMNS, QuotaUse, quota_document, quota_lines, reached_text
from proxy.quota.quotas import Quota, QuotaState, Rate, TeamLimits
from proxy.quota.team_directory import NO_NAMES
from proxy.quota.windows import Period, window_of

ZONE = ZoneInfo("Europe/Berlin")
QUOTA = Quota("team", "estimated_credits", "month", 5000 * MICRO, refuse=True)


def at(text: str) -> int:
    return int(datetime.fromisoformat(text).replace(tzinfo=ZONE).timestamp())


FOUND = Forecast(
    6120 * MICRO,
    5400 * MICRO,
    7000 * MICRO,
    at("2026-11-24T15:30"),
    at("2026-11-21T01:00"),
    at("2026-11-28T23:59:59"),
    "weekday means of 90 days, corrected by 63 backtests",
)


def use(found: Forecast | None, *, used: int = 2000 * MICRO, per: Period = "month") -> QuotaUse:
    window = window_of(per, at("2026-11-24T00:00"), ZONE)
    return QuotaUse("design", replace(QUOTA, per=per), used, window, found)


def times(at_text: str | None, from_text: str | None, until_text: str | None) -> Forecast:
    at_s, from_s, until_s = (
        None if text is None else at(f"2026-{text}T12:00") for text in (at_text, from_text, until_text)
    )
    return replace(FOUND, reached_at_s=at_s, reached_from_s=from_s, reached_until_s=until_s)


class TestWords:
    def test_a_day_and_a_range(self) -> None:
        assert reached_text(use(FOUND), ZONE) == "reached about 24 November (between 21 and 28)"

    @pytest.mark.parametrize(
        ("found", "text"),
        [
            (times("11-24", "11-24", "11-24"), "reached about 24 November"),
            (times("11-30", "11-28", "12-02"), "reached about 30 November (between 28 November and 2 December)"),
            (times("12-01", "11-30", "12-02"), "reached about 1 December (between 30 November and 2 December)"),
            (
                times("11-24", "11-21", None),
                "reached about 24 November (21 November at the earliest, or not this week)",
            ),
            (times(None, "11-28", None), "probably not reached this week, 28 November at the earliest"),
            (times(None, None, None), "not reached this week"),
        ],
    )
    def test_ranges(self, found: Forecast, text: str) -> None:
        assert reached_text(use(found, per="week"), ZONE) == text

    def test_of_the_past(self) -> None:
        assert reached_text(use(FOUND, used=5000 * MICRO), ZONE) == "reached on 24 November"

    def test_days_are_those_of_the_time_zone(self) -> None:
        found = replace(FOUND, reached_at_s=at("2026-11-24T00:30"), reached_from_s=at("2026-11-24T00:10"))
        assert reached_text(use(found), ZONE) == "reached about 24 November (between 24 and 28)"
        assert reached_text(use(found), ZoneInfo("UTC")) == "reached about 23 November (between 23 and 28)"

    def test_without_a_forecast(self) -> None:
        assert reached_text(use(None), ZONE) == ""


def document(*quotas: Quota) -> tuple[Any, list[list[str]]]:
    """The JSON document and the cells of quotas, of which the first has a forecast."""
    now_s = at("2026-11-12T12:00")
    windows = {quota.per: window_of(quota.per, now_s, ZONE) for quota in quotas}
    limits = TeamLimits("design", Rate(1, 1), quotas)
    state = QuotaState(limits, windows, now_s * 1_000_000, 0, [2000 * MICRO] * len(quotas))
    forecasts = {("design", quotas[0]): FOUND}
    _, *lines = quota_lines([state], forecasts, ZONE, NO_NAMES)
    return orjson.loads(orjson.dumps(quota_document(state, forecasts, ZONE, NO_NAMES))), lines


def test_documents_and_cells() -> None:
    shown, lines = document(QUOTA, replace(QUOTA, per="week"))
    first, second = shown["quotas"]
    assert first["forecast"] == {
        "at_end": 6120,
        "low": 5400,
        "high": 7000,
        "reached_at": "2026-11-24T15:30:00+01:00",
        "reached_from": "2026-11-21T01:00:00+01:00",
        "reached_until": "2026-11-28T23:59:59+01:00",
        "method": "weekday means of 90 days, corrected by 63 backtests",
    }
    assert "forecast" not in second
    cells = [dict(zip(QUOTA_COLUMNS, line, strict=True)) for line in lines]
    assert [cells[0][f"forecast_{name}"] for name in ("at_end", "low", "high")] == ["6120", "5400", "7000"]
    assert [cells[0][f"reached_{name}"] for name in ("at", "from", "until")] == [
        first["forecast"][f"reached_{name}"] for name in ("at", "from", "until")
    ]
    assert lines[1][-6:] == [""] * 6
