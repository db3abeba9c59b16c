"""`usage` and `quota`: reports of a ledger on a real store, for programs and for people."""

import csv
import json
import re
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import redis
from click.testing import Result

from command_line import CONFIG, LEDGER, Run, fields, on_terminal, printed, refusal
from past_usage import put_past_usage
from proxy.embedded.stores import EmbeddedStores
from proxy.quota.price_changes import PriceChange
from proxy.quota.usage_report import LATER_OUTCOMES, OUTCOMES, SAVED_COLUMNS
from proxy.quota.windows import window_of
from serving import free_port

DAY = datetime.now(UTC).date() - timedelta(days=3)
NAME = 'name = "The Designers"\n'
LIMITS = """
[teams.other]
[[org.quotas]]
measure = "requests"
limit = 1000
per = "day"
[[teams.design.quotas]]
measure = "estimated_credits"
limit = 9000000000
per = "month"
on_exceed = "warn"
"""


@pytest.fixture
def ledger(valkey_url: str) -> None:
    """A ledger with usage of two teams three days ago, and counters of the current windows."""
    Path("estimate-proxy.toml").write_text(f'{CONFIG}{NAME}{LIMITS}[store]\nurl = "{valkey_url}"\n')
    with redis.Redis.from_url(valkey_url) as client:
        client.flushall()
        for team, model in (("design", "-1-1"), ("gone", "Flux")):
            rows = {f"{model}:hit:requests": 2, f"{model}:hit:credits": 2**53 + 1, "-:rate-limited:refused": 3}
            client.hset(LEDGER.usage(team, DAY), mapping=dict(rows.items()))
            client.sadd(LEDGER.teams, team)
        month, day = (window_of(per, int(time.time()), UTC) for per in ("month", "day"))
        for key in (LEDGER.counter("design", "month", month), LEDGER.counter(None, "day", day)):
            client.hset(key, mapping={"requests": 7, "credits": 2**53 + 1})


def reported(result: Result) -> str:
    """Returns the output of `usage`. The period and the total are on standard error."""
    assert result.exit_code == 0
    assert re.fullmatch(r"estimate-proxy: \S+ to \S+, UTC: \d+ requests, .* estimated credits\n", result.stderr)
    return result.stdout


@pytest.mark.usefixtures("ledger")
def test_usage_when_piped(run: Run) -> None:
    header, *rows = fields(reported(run("usage", "--from", str(DAY))))
    amounts = ("requests", "refused", "estimated_credits", *OUTCOMES, "share_percent")
    assert header == ["team", *amounts, "team_name", *SAVED_COLUMNS, *LATER_OUTCOMES]
    assert [row[:5] for row in rows] == [[team, "2", "3", "9007199254.740993", "2"] for team in ("design", "gone")]
    assert [row[-6:-2] for row in rows] == [["50", "The Designers", "2", ""], ["50", "", "2", ""]]
    header, row = fields(reported(run("usage", "--from", str(DAY), "--team", "gone")))
    assert [header[0], row[0]] == ["day", str(DAY)], "a team that was removed from the settings, by day"
    _, *rows = fields(reported(run("usage", "--from", str(DAY), "--to", str(DAY), "--by", "model,team")))
    assert [row[:3] for row in rows] == [
        ["-", "design", "0"],
        ["-", "gone", "0"],
        ["-1-1", "design", "2"],
        ["Flux", "gone", "2"],
    ]
    assert fields(reported(run("usage", "--to", str(DAY - timedelta(days=1))))) == [
        ["team", *amounts, "team_name", *SAVED_COLUMNS, *LATER_OUTCOMES]
    ]


@pytest.mark.usefixtures("ledger")
def test_usage_as_json_equals_the_endpoint(run: Run) -> None:
    printed_json = reported(run("usage", "--from", str(DAY), "--by", "team", "--format", "json"))
    document = json.loads(printed_json)
    assert '"estimated_credits":18014398509.481986,' in printed_json
    assert (document["from"], document["timezone"], len(document["rows"])) == (str(DAY), "UTC", 2)
    result = run("usage", "--from", str(DAY), "--by", "model", "--format", "csv")
    lines = result.stdout_bytes.split(b"\r\n")
    assert lines[0].startswith(b"model,requests,refused,estimated_credits,hit,")
    assert lines[2].startswith(b"'-1-1,2,0,9007199254.740993,2,"), "formulas of spreadsheets are escaped"


@pytest.mark.usefixtures("ledger")
def test_usage_on_a_terminal() -> None:
    text = on_terminal("usage", "--from", str(DAY), columns=125)
    title, header, design, gone, total = text.split("\r\n")[:-1]
    assert title.rstrip() == f"{DAY} to {datetime.now(UTC).date()}, UTC"
    assert re.split("  +| (?=hit|estimated|rate|refused|share|calls|seconds)", header.strip()) == [
        *("team", "name", "requests", "refused", "estimated credits", "share %", "hit", "rate-limited"),
        *("calls saved", "seconds saved"),
    ]
    assert design.split() == ["design", "The", "Designers", "2", "3", "9007199254.740993", "50", "2", "3", "2", "-"]
    assert gone.split()[:2] == ["gone", "2"]
    assert total.split() == ["total", "4", "6", "18014398509.481986", "4", "6", "4", "-"]
    assert {line.rindex(cell) + len(cell) for line, cell in ((design, "740993"), (total, "481986"))} == {
        header.rindex("credits") + len("credits")
    }, "numbers are right-aligned"


@pytest.mark.parametrize("columns", [80, 60, 50])
@pytest.mark.parametrize("by", ["team", "day,team,model"])
@pytest.mark.usefixtures("ledger")
def test_a_narrow_terminal_hides_columns_and_names_them(by: str, columns: int) -> None:
    text = on_terminal("usage", "--from", str(DAY), "--by", by, columns=columns)
    assert max(map(len, text.splitlines())) <= columns
    assert "18014398509.481986" in text
    table, _, hidden = text.partition("Not shown, for lack of width: ")
    words = " ".join(table.split())
    for header in ("name", "requests", "refused", "share", "hit", "rate-limited"):
        assert (f" {header} " in words) is (header not in hidden), "each column is shown or named, and no word is split"
    assert not set(hidden.split()) & {"team,", "credits,"}
    assert not hidden or hidden.endswith(".\r\n")


@pytest.fixture
def price_changes(valkey_url: str, ledger: None) -> None:  # noqa: ARG001 -- in its store
    """Two price changes three days ago, and one that was not kept."""
    at_s = int(datetime.combine(DAY, datetime.min.time(), UTC).timestamp()) + 3600
    flux = PriceChange(at_s, "default", "Flux", "0123456789abcdef", "2.75", "3", "audit")
    mixed = PriceChange(at_s + 60, "gone", "mixed", "1234567890123456", "5", "4.5", "ask")
    with redis.Redis.from_url(valkey_url) as client:
        client.hset(LEDGER.price_changes(DAY), "found", 3)
        client.hset(LEDGER.price_changes(DAY), "b", mixed.encoded())
        client.hset(LEDGER.price_changes(DAY), "a", flux.encoded())


@pytest.mark.usefixtures("price_changes")
def test_price_changes_when_piped(run: Run) -> None:
    result = run("prices", "changed", "--from", str(DAY))
    today = datetime.now(UTC).date()
    assert fields(result.stdout) == [
        ["at", "account", "model", "key", "old", "new", "found_by"],
        [f"{DAY}T01:00:00+00:00", "default", "Flux", "0123456789abcdef", "2.75", "3", "audit"],
        [f"{DAY}T01:01:00+00:00", "gone", "mixed", "1234567890123456", "5", "4.5", "ask"],
    ]
    assert result.stderr.splitlines() == [
        f"estimate-proxy: {DAY} to {today}, UTC: 2 price changes",
        "estimate-proxy: 1 more were found, of all accounts: a day keeps the first 500",
    ]
    result = run("prices", "changed", "--from", str(DAY + timedelta(days=1)))
    assert (len(fields(result.stdout)), result.stderr.splitlines()[1:]) == (1, [])


@pytest.mark.usefixtures("price_changes")
def test_price_changes_in_other_formats(run: Run) -> None:
    document = json.loads(run("prices", "changed", "--account", "gone", "--format", "json").stdout)
    (change,) = document["changes"]
    assert (change["old"], change["new"], document["not_kept"]) == (5, 4.5, 1)
    lines = run("prices", "changed", "--csv-dialect", "excel-semicolon").stdout.splitlines()
    assert lines[2] == f"{DAY}T01:01:00+00:00;gone;mixed;'1234567890123456;5;4,5;ask"
    table = on_terminal("prices", "changed", columns=80)
    assert re.search(rf"{DAY} 01:00 +default +Flux +2.75 +3 +audit +0123456789abcdef", table)


@pytest.mark.usefixtures("price_changes")
@pytest.mark.parametrize(
    ("options", "line"),
    [
        ("--account nobody", "--account 'nobody' is not in the settings, and has no price change: check the name"),
        ("--from yesterday", "--from must be a date, such as 2026-11-01."),
        ("--from 2999-01-01", "--from must not be after today, which is "),
    ],
)
def test_a_bad_query_of_price_changes_is_refused(run: Run, options: str, line: str) -> None:
    assert refusal(run("prices", "changed", *options.split())).startswith(line)


@pytest.mark.usefixtures("ledger")
def test_csv_for_spreadsheets_with_a_decimal_comma(run: Run, valkey_url: str) -> None:
    with redis.Redis.from_url(valkey_url) as client:
        client.hset(LEDGER.usage("1-2", DAY), "2026-01:hit:requests", 1)
        client.sadd(LEDGER.teams, "1-2")
    for options in (["--csv-dialect", "excel-semicolon"], ["--csv-dialect", "excel-semicolon", "--format", "csv"]):
        text = reported(run("usage", "--from", str(DAY), "--by", "day,team,model", *options))
        assert text.startswith("\ufeffday;team;model;requests;refused;estimated_credits;hit;")
        lines = text.splitlines()
        assert lines[1].startswith(f"{DAY};'1-2;'2026-01;1;0;0;1;")
        assert lines[3].startswith(f"{DAY};design;'-1-1;2;0;9007199254,740993;2;")
    text = printed(run("quota", "--csv-dialect", "excel-semicolon"))
    assert ";month;9000000000;9007199254,740993;0;warn;" in text
    assert ";100,1;The Designers;" in text
    for command in ("usage", "quota"):
        line = refusal(run(command, "--csv-dialect", "excel-semicolon", "--format", "json"))
        assert line == "--csv-dialect is only for CSV: leave it out, or use --format csv"


@pytest.mark.usefixtures("ledger")
def test_money_is_derived_from_credits(run: Run) -> None:
    assert "derived" not in run("usage", "--from", str(DAY)).output
    path = Path("estimate-proxy.toml")
    path.write_text(f'{path.read_text()}[org.currency]\ncode = "EUR"\nper_credit = "0.002"\n')
    header, *rows = fields(reported(run("usage", "--from", str(DAY))))
    assert header[-6:-4] == ["team_name", "derived_cost_EUR"]
    assert [row[-5] for row in rows] == ["18014398.509481986"] * 2
    document = json.loads(reported(run("usage", "--from", str(DAY), "--format", "json")))
    assert document["currency"] == {"code": "EUR", "per_credit": 0.002}
    assert document["total"]["derived_cost"] == 36028797.018963972
    _, header_line, design, _, total, _ = on_terminal("usage", "--from", str(DAY), columns=120).split("\r\n")
    assert " derived EUR " in header_line
    assert " 18014398.51 " in design
    assert " 36028797.02 " in total


@pytest.mark.usefixtures("ledger")
def test_usage_by_week_and_month(run: Run) -> None:
    monday = DAY - timedelta(days=DAY.weekday())
    _, *rows = fields(reported(run("usage", "--from", str(DAY), "--by", "month,week,team")))
    assert [row[:3] for row in rows] == [[f"{DAY:%Y-%m}", str(monday), team] for team in ("design", "gone")]


@pytest.mark.usefixtures("ledger")
def test_usage_can_be_sorted(run: Run, valkey_url: str) -> None:
    with redis.Redis.from_url(valkey_url) as client:
        client.hincrby(LEDGER.usage("gone", DAY), "Flux:hit:credits", 1)
    for sort, teams_shown in (("names", ["design", "gone"]), ("credits", ["gone", "design"])):
        _, *rows = fields(reported(run("usage", "--from", str(DAY), "--sort", sort)))
        assert [row[0] for row in rows] == teams_shown


@pytest.mark.usefixtures("ledger")
def test_usage_of_last_month(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("proxy.cli.usage.time", lambda: datetime(2026, 12, 15, tzinfo=UTC).timestamp())
    assert run("usage", "--last-month").stderr.startswith("estimate-proxy: 2026-11-01 to 2026-11-30, UTC: ")
    assert run("usage").stderr.startswith("estimate-proxy: 2026-12-01 to 2026-12-15, UTC: ")
    assert refusal(run("usage", "--last-month", "--to", "2026-12-01")) == (
        "--last-month cannot be combined with --from or --to: leave one of them out"
    )


@pytest.mark.usefixtures("ledger")
def test_on_the_first_of_a_month_usage_shows_the_month_before(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("proxy.cli.usage.time", lambda: datetime(2026, 12, 1, tzinfo=UTC).timestamp())
    for options in ([], ["--format", "csv"], ["--format", "json"]):
        assert run("usage", *options).stderr.startswith(
            "estimate-proxy: 2026-11-01 to 2026-11-30, UTC (last month, because today is the first): "
        )
    assert run("usage", "--last-month").stderr.startswith("estimate-proxy: 2026-11-01 to 2026-11-30, UTC: ")
    assert run("usage", "--to", "2026-12-01").stderr.startswith("estimate-proxy: 2026-12-01 to 2026-12-01, UTC: ")


@pytest.mark.usefixtures("ledger")
def test_usage_of_an_earlier_id_is_shown_under_the_current_one(run: Run) -> None:
    path = Path("estimate-proxy.toml")
    path.write_text(path.read_text().replace(NAME, f'{NAME}was = ["gone"]\n'))
    _, row = fields(reported(run("usage", "--from", str(DAY))))
    assert row[:4] == ["design", "4", "6", "18014398509.481986"]
    for team in ("design", "gone"):
        _, row = fields(reported(run("usage", "--from", str(DAY), "--team", team)))
        assert row[:4] == [str(DAY), "4", "6", "18014398509.481986"]


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ("--from yesterday", "--from must be a date, such as 2026-11-01."),
        ("--to 2026-02-30", "--to must be a date, such as 2026-11-01."),
        ("--from 2026-11-02 --to 2026-11-01", "--from must not be after to, which is 2026-11-01."),
        ("--from 2020-01-01", "--from must not be more than 400 days before"),
        ("--by hour", "--by must be some of day, week, month, team and model, each once, joined by commas."),
        ("--team nobody", "--team: 'nobody' is not configured and never had usage: check the id."),
        ("--team \udcff", "--team: '"),
        ("--team=", "--team is empty"),
        ("--from=", "--from is empty"),
        ("--by=", "--by is empty"),
        ("--format xml", "Invalid value for '--format': 'xml' is not one of 'table', 'csv', 'json'."),
        ("design", "Got unexpected extra argument (design)"),
    ],
)
@pytest.mark.usefixtures("ledger")
def test_an_invalid_usage_query_is_refused(run: Run, options: str, line: str) -> None:
    assert refusal(run("usage", *options.split(" "))).startswith(line)


@pytest.mark.usefixtures("ledger")
def test_quota_when_piped(run: Run) -> None:
    header, org, own = fields(printed(run("quota")))  # the organisation's quota once, although both teams have it
    assert header == [
        *("scope", "team", "measure", "per", "limit", "used", "remaining", "on_exceed", "resets_at"),
        *("used_percent", "team_name"),
        *("forecast_at_end", "forecast_low", "forecast_high", "reached_at", "reached_from", "reached_until"),
    ]
    assert org[11:] == own[11:] == [""] * 6, "no history"
    assert (org[9:11], own[9:11]) == (["0.7", ""], ["100.1", "The Designers"])
    assert org[:8] == ["org", "-", "requests", "day", "1000", "7", "993", "refuse"]
    assert own[:8] == ["team", "design", "estimated_credits", "month", "9000000000", "9007199254.740993", "0", "warn"]
    assert datetime.fromisoformat(own[8]).timestamp() == window_of("month", int(time.time()), UTC).end_s
    assert fields(printed(run("quota", "design"))) == [header, org, own]
    assert refusal(run("quota", "gone")) == "'gone' is not a team in the settings: they have design, other"


@pytest.mark.usefixtures("ledger")
def test_quota_as_csv_and_json(run: Run) -> None:
    header, *rows = csv.reader(printed(run("quota", "--format", "csv")).splitlines())
    assert [header, *rows] == fields(printed(run("quota")))
    document = json.loads(printed(run("quota", "--format", "json")))
    design, other = document["teams"]
    assert (design["team"], design["team_name"], other["team_name"]) == ("design", "The Designers", "")
    assert [quota["used_percent"] for quota in design["quotas"]] == [100.1, 0.7]
    assert json.loads(printed(run("quota", "design", "--format", "json"))) == design


@pytest.mark.usefixtures("ledger")
def test_quota_on_a_terminal() -> None:
    text = on_terminal("quota", "design", columns=120)
    _, header, org, own = text.split("\r\n")[:-1]
    assert " ".join(header.split()) == "team name quota limit used used % remaining on exceed resets at"
    assert org.split()[:7] == ["-", "org-requests-day", "1000", "7", "0.7", "993", "refuse"]
    assert own.split()[:9] == [
        *("design", "The", "Designers", "credits-month", "9000000000", "9007199254.740993", "100.1", "0", "warn")
    ]
    assert re.search(r" 20[0-9]{2}-[0-9]{2}-01 *$", own)
    for columns in (80, 60, 40):
        text = on_terminal("quota", "design", columns=columns)
        assert max(map(len, text.splitlines())) <= columns
        assert "credits-month" in text
        assert "100.1" in text
        assert "Not shown, for lack of width: " in text


@pytest.mark.usefixtures("ledger")
def test_a_forecast_on_a_terminal(valkey_url: str) -> None:
    with redis.Redis.from_url(valkey_url) as client:
        put_past_usage(client, "design", [100] * 30)
    text = on_terminal("quota", "design", columns=200)
    _, header, org, own = text.split("\r\n")[:-1]
    assert " ".join(header.split()).endswith("resets at at the end forecast")
    assert re.search(r" [0-9]+ \([0-9]+ to [0-9]+\) +reached on [0-9]+ [A-Z][a-z]+ *$", own)
    assert "reached" not in org


def test_no_quotas_are_reported_without_an_error(run: Run, valkey_url: str) -> None:
    Path("estimate-proxy.toml").write_text(f'{CONFIG}[store]\nurl = "{valkey_url}"\n')
    result = run("quota")
    assert (result.exit_code, result.stderr) == (0, "estimate-proxy: no quota is set\n")
    assert len(fields(result.stdout)) == 1


@pytest.mark.parametrize(
    "command", [["usage"], ["usage", "--team", "nobody"], ["quota"], ["quota", "design"], ["token", "list"]]
)
def test_an_unreachable_store_is_one_line(run: Run, command: list[str]) -> None:
    Path("estimate-proxy.toml").write_text(f'{CONFIG}[store]\nurl = "redis://127.0.0.1:{free_port()}"\n')
    line = refusal(run(*command))
    assert line.startswith("the store is unreachable (")
    assert line.endswith("): check that it runs, and store.url and cache.url")
    Path("estimate-proxy.toml").write_text(f'{CONFIG}[store]\ndata_dir = "data"\n')
    assert "data" in refusal(run(*command))


def test_the_embedded_ledger_of_a_running_gateway_is_read(run: Run) -> None:
    Path("estimate-proxy.toml").write_text(f'{CONFIG}{LIMITS}[store]\ndata_dir = "data"\n')
    stores = EmbeddedStores(Path("data"), ["ledger"])
    stores.start()
    try:
        with redis.Redis.from_url(stores.urls["ledger"]) as client:
            client.hset(LEDGER.usage("design", DAY), "Flux:hit:requests", 2)
            client.sadd(LEDGER.teams, "design")
        assert [row[:2] for row in fields(reported(run("usage", "--from", str(DAY))))][1:] == [["design", "2"]]
        assert len(fields(printed(run("quota")))) == 3
    finally:
        stores.stop()
