"""The usage and quota endpoints for teams and operators, with a real ledger."""

import csv
import logging
from datetime import datetime, timedelta
from io import StringIO
from typing import Any
from zoneinfo import ZoneInfo

import httpx2
import pytest

from gateway_fixture import DESIGN, EXPIRED, MARKETING, PATH, RETIRED, GatewayFixture, OpenGateway, code_of
from proxy.auth import digest_of, token_of
from proxy.quota.counters import LedgerKeys
from proxy.quota.credits import MICRO, percent_text
from proxy.quota.upstream_time import LOOK_BACK_DAYS
from proxy.quota.windows import window_of
from serving import NO_TLS, free_port, wait_until

ADMIN = token_of("a" * 32)
UTC = ZoneInfo("UTC")
KEYS = LedgerKeys("default")
FLUX, SEGMENT = b'[{"model":"Flux"}]', b'[{"segment":{}}]'
HUGE = 2**53 + 1
VIEWER = token_of("v" * 32)


def quota(measure: str, limit: float, per: str, on_exceed: str = "refuse") -> dict[str, Any]:
    return {"measure": measure, "limit": limit, "per": per, "on_exceed": on_exceed}


@pytest.fixture
def gateway(open_gateway: OpenGateway) -> GatewayFixture:
    return open_gateway(
        admin={"tokens": [digest_of(ADMIN)]},
        viewer={"tokens": [digest_of(VIEWER)]},
        org={"quotas": [quota("requests", 1000, "week", "warn")]},
        teams={
            "design": {
                "name": "The Designers",
                "tokens": [digest_of(DESIGN), {"sha256": digest_of(EXPIRED), "expires": "2026-01-31"}],
                "rate": {"per_s": 50, "burst": 100},
                "quotas": [quota("estimated_credits", 5000.25, "month")],
            },
            "retired": {"tokens": [digest_of(RETIRED)], "disabled": True, "rate": {"per_s": 0.5, "burst": 1}},
        },
    )


def get(gateway: GatewayFixture, path: str, token: str = DESIGN, **headers: str) -> httpx2.Response:
    return gateway.client.get(path, headers={"x-api-key": token, **headers})


def shown(response: httpx2.Response) -> Any:
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "application/json"
    assert response.headers["cache-control"] == "no-store"
    return response.json()


def make_requests(gateway: GatewayFixture) -> float:
    """Requests four estimates, three of them as `design`, and returns the credits of `design`."""
    answers = [gateway.ask(FLUX), gateway.ask(FLUX), gateway.ask(SEGMENT)]
    assert gateway.ask(FLUX, x_api_key=MARKETING).status_code == 200
    return sum(float(answer.json()["data"]["estimated"]) for answer in answers)


def test_a_viewer_only_reads(gateway: GatewayFixture) -> None:
    documents = shown(get(gateway, "/v1/quota", VIEWER))["teams"]
    assert [document["team"] for document in documents] == ["design", "marketing", "retired"]
    assert shown(get(gateway, "/v1/quota?team=marketing", VIEWER))["team"] == "marketing"
    for path, body in (
        ("/v1/cache/purge", b'{"account":"default","all":true}'),
        ("/v1/explain", FLUX),
        (PATH, FLUX),
    ):
        refused = gateway.client.post(path, content=body, headers={"x-api-key": VIEWER})
        assert (refused.status_code, code_of(refused)) == (403, "forbidden")
        assert "viewer" in refused.json()["detail"]
    refused = get(gateway, "/metrics", VIEWER)
    assert (refused.status_code, code_of(refused)) == (403, "forbidden")
    assert refused.json()["detail"] == "This needs a metrics token or an admin token; you sent a viewer token."


# --- Usage -----------------------------------------------------------------------------------------------------------


def test_a_team_sees_its_own_usage(gateway: GatewayFixture) -> None:
    planned = make_requests(gateway)
    document = shown(get(gateway, "/v1/usage?by=model"))
    flux, segment = document["rows"]
    assert (flux["model"], flux["requests"], flux["outcomes"]) == ("Flux", 2, {"hit": 1, "miss": 1})
    assert (segment["model"], segment["requests"], segment["outcomes"]) == ("segment", 1, {"miss": 1})
    total = document["total"]
    assert (total["requests"], total["refused"], total["estimated_credits"]) == (3, 0, planned)
    assert total["outcomes"] == {"hit": 1, "miss": 2}
    assert (document["timezone"], document["by"]) == ("UTC", ["model"])
    assert shown(get(gateway, "/v1/usage?by=model&team=design")) == document, "its own name is allowed"


def test_hits_save_a_call_and_the_mean_time_of_the_organisations_misses(gateway: GatewayFixture) -> None:
    make_requests(gateway)
    today = datetime.now(UTC).date()
    booked: Any = gateway.store.hgetall(KEYS.upstream(today))
    assert booked[b"calls"] == b"2"
    assert int(booked[b"us"]) > 0
    gateway.store.hset(KEYS.upstream(today), "us", 500_000)
    assert saved(gateway) == {"design": (1, 0.25), "marketing": (1, 0.25), None: (2, 0.5)}
    gateway.store.rename(KEYS.upstream(today), KEYS.upstream(today - timedelta(days=LOOK_BACK_DAYS)))
    assert saved(gateway)[None] == (2, 0.5), "the last known mean, on a day without a miss"
    gateway.store.flushall()
    gateway.store.hset(KEYS.usage("design", today), "Flux:hit:requests", 3)
    gateway.store.sadd(KEYS.teams, "design")
    assert saved(gateway) == {"design": (3, None), None: (3, None)}, "no mean is known"


def saved(gateway: GatewayFixture) -> dict[str | None, tuple[int, float | None]]:
    """Saved calls and seconds by team, and of all teams."""
    document = shown(get(gateway, "/v1/usage?by=team", ADMIN))
    rows = [*document["rows"], {"team": None, **document["total"]}]
    return {row["team"]: (row["upstream_calls_saved"], row["upstream_seconds_saved"]) for row in rows}


def test_a_team_without_usage(gateway: GatewayFixture) -> None:
    document = shown(get(gateway, "/v1/usage"))
    assert (document["rows"], document["total"]["requests"]) == ([], 0)


@pytest.mark.parametrize("query", ["team=marketing", "team=nobody", "by=team", "by=day,team", "by=team&team=design"])
def test_a_team_does_not_see_other_teams(gateway: GatewayFixture, query: str) -> None:
    refused = get(gateway, f"/v1/usage?{query}")
    assert (refused.status_code, code_of(refused)) == (403, "forbidden")
    assert "'design'" in refused.json()["detail"]
    assert "admin token" in refused.json()["detail"]


@pytest.mark.parametrize("token", [ADMIN, VIEWER])
def test_operators_and_viewers_see_all_teams(gateway: GatewayFixture, token: str) -> None:
    make_requests(gateway)
    rows = shown(get(gateway, "/v1/usage?by=team", token))["rows"]
    assert [(row["team"], row["requests"]) for row in rows] == [("design", 3), ("marketing", 1)]
    one = shown(get(gateway, "/v1/usage?by=team,model&team=marketing", ADMIN))
    assert [(row["team"], row["model"], row["requests"]) for row in one["rows"]] == [("marketing", "Flux", 1)]
    assert shown(get(gateway, "/v1/usage?team=retired", ADMIN))["rows"] == [], "configured, but never used"


def test_a_team_that_was_removed_still_has_usage(gateway: GatewayFixture) -> None:
    today = datetime.now(UTC).date()
    gateway.store.hset(KEYS.usage("gone", today), mapping={"Flux:hit:requests": 2, "Flux:hit:credits": HUGE})
    unknown = get(gateway, "/v1/usage?team=gone", ADMIN)
    assert (unknown.status_code, code_of(unknown)) == (400, "invalid-query")
    gateway.store.sadd(KEYS.teams, "gone")
    text = get(gateway, f"/v1/usage?team=gone&from={today}", ADMIN).text
    assert '"estimated_credits":9007199254.740993,' in text, "the digits, beyond what a double holds"


def test_usage_by_week_and_month(gateway: GatewayFixture) -> None:
    make_requests(gateway)
    today = datetime.now(UTC).date()
    (row,) = shown(get(gateway, f"/v1/usage?from={today}&by=month,week,team", ADMIN))["rows"][:1]
    assert (row["month"], row["week"]) == (f"{today:%Y-%m}", str(today - timedelta(days=today.weekday())))
    assert (row["team"], row["team_name"]) == ("design", "The Designers")


def test_usage_of_an_earlier_id_is_shown_under_the_current_one(open_gateway: OpenGateway) -> None:
    gateway = open_gateway(
        admin={"tokens": [digest_of(ADMIN)]}, teams={"design": {"tokens": [digest_of(DESIGN)], "was": ["old"]}}
    )
    gateway.ask(FLUX)
    today = datetime.now(UTC).date()
    gateway.store.hset(KEYS.usage("old", today), mapping={"Flux:hit:requests": 2, "Flux:hit:credits": 1})
    gateway.store.sadd(KEYS.teams, "old")
    assert shown(get(gateway, f"/v1/usage?from={today}"))["total"]["requests"] == 3, "the team itself sees it too"
    for query in ("", "&team=old", "&team=design"):
        (row,) = shown(get(gateway, f"/v1/usage?from={today}&by=team{query}", ADMIN))["rows"]
        assert (row["team"], row["requests"]) == ("design", 3)


def test_usage_as_csv(gateway: GatewayFixture) -> None:
    planned = make_requests(gateway)
    answer = get(gateway, "/v1/usage?by=day,model", accept="text/csv")
    assert answer.headers["content-type"] == "text/csv; charset=utf-8; header=present"
    assert "accept" in answer.headers["vary"].lower()
    assert answer.text == get(gateway, "/v1/usage?by=day,model&format=csv", accept="application/json").text
    rows = list(csv.DictReader(StringIO(answer.text, newline="")))
    assert [(row["model"], row["hit"], row["miss"]) for row in rows] == [("Flux", "1", "1"), ("segment", "0", "1")]
    assert sum(float(row["estimated_credits"]) for row in rows) == planned
    assert shown(get(gateway, "/v1/usage?format=json", accept="text/csv"))


def test_money_is_derived_from_credits(open_gateway: OpenGateway) -> None:
    gateway = open_gateway(org={"currency": {"code": "EUR", "per_credit": "0.002"}})
    planned = make_requests(gateway)
    document = shown(get(gateway, "/v1/usage?by=month"))
    assert document["currency"] == {"code": "EUR", "per_credit": 0.002}
    assert sum(row["derived_cost"] for row in document["rows"]) == pytest.approx(planned * 0.002)
    assert document["total"]["derived_cost"] == pytest.approx(planned * 0.002)
    assert "derived_cost_EUR" in get(gateway, "/v1/usage?format=csv").text.split("\r\n")[0]


def test_csv_for_spreadsheets_with_a_decimal_comma(gateway: GatewayFixture) -> None:
    today = datetime.now(UTC).date()
    gateway.store.hset(KEYS.usage("1-2", today), mapping={"Flux:hit:requests": 1, "Flux:hit:credits": 2_500_000})
    gateway.store.sadd(KEYS.teams, "1-2")
    answer = get(gateway, f"/v1/usage?from={today}&by=day,team&dialect=excel-semicolon", ADMIN)
    assert answer.headers["content-type"] == "text/csv; charset=utf-8; header=present"
    header, row, _ = answer.content.decode().split("\r\n")
    assert header.startswith("\ufeffday;team;requests;refused;estimated_credits;")
    assert row.startswith(f"{today};'1-2;1;0;2,5;1;")


@pytest.mark.parametrize("query", ["from=yesterday", "by=hour", "form=x", "team=", "from=2020-01-01", "dialect=xls"])
def test_an_invalid_query_is_refused_with_a_reason(gateway: GatewayFixture, query: str) -> None:
    for token in (DESIGN, ADMIN):
        refused = get(gateway, f"/v1/usage?{query}", token)
        assert (refused.status_code, code_of(refused)) == (400, "invalid-query")
        assert refused.json()["detail"].endswith(".")


def test_days_are_those_of_the_organisations_zone(open_gateway: OpenGateway) -> None:
    for name in ("Pacific/Kiritimati", "Pacific/Niue"):  # the two zones never have the same day
        gateway = open_gateway(org={"timezone": name})
        gateway.ask()
        today = datetime.now(ZoneInfo(name)).date()
        document = shown(get(gateway, "/v1/usage"))
        assert (document["from"], document["to"]) == (str(today.replace(day=1)), str(today))
        assert document["timezone"] == name
        assert str(today) in [row["day"] for row in document["rows"]]


def test_a_refused_request_is_shown_as_refused(open_gateway: OpenGateway) -> None:
    team = {"tokens": [digest_of(DESIGN)], "quotas": [quota("requests", 1, "month")]}
    gateway = open_gateway(teams={"design": team})
    assert [gateway.ask().status_code for _ in range(3)] == [200, 429, 429]
    total = shown(get(gateway, "/v1/usage"))["total"]
    assert (total["requests"], total["refused"]) == (1, 2)
    assert total["outcomes"] == {"miss": 1, "quota-exceeded": 2}
    (own,) = shown(get(gateway, "/v1/quota"))["quotas"]
    assert (own["used"], own["remaining"]) == (1, 0)


# --- Quotas ----------------------------------------------------------------------------------------------------------


def test_a_teams_quotas(gateway: GatewayFixture) -> None:
    before, planned = datetime.now(UTC).timestamp(), make_requests(gateway)
    document = shown(get(gateway, "/v1/quota"))
    month, week = (window_of(per, int(before), UTC) for per in ("month", "week"))
    instants = [datetime.fromtimestamp(at, UTC).isoformat() for at in (month.start_s, month.end_s)]
    assert document["team"] == "design"
    assert document["rate"]["per_s"] == 50
    assert document["rate"]["burst"] == 100
    assert 97 <= document["rate"]["remaining"] <= 100
    own, org = document["quotas"]
    assert own == {
        "scope": "team",
        "measure": "estimated_credits",
        "per": "month",
        "limit": 5000.25,
        "used": planned,
        "remaining": 5000.25 - planned,
        "on_exceed": "refuse",
        "window_start": instants[0],
        "resets_at": instants[1],
        "used_percent": float(percent_text(round(planned * MICRO), 5_000_250_000)),
    }
    assert document["team_name"] == "The Designers"
    assert (org["scope"], org["measure"], org["per"], org["on_exceed"]) == ("org", "requests", "week", "warn")
    assert (org["limit"], org["used"], org["remaining"]) == (1000, 4, 996), "of both teams together"
    assert datetime.fromisoformat(org["resets_at"]).timestamp() == week.end_s
    assert shown(get(gateway, "/v1/quota?team=design"))["quotas"] == document["quotas"]


def test_an_exceeded_warning_quota(open_gateway: OpenGateway) -> None:
    team = {"tokens": [digest_of(DESIGN)], "quotas": [quota("requests", 1, "day", "warn")]}
    gateway = open_gateway(teams={"design": team})
    assert [gateway.ask().status_code for _ in range(3)] == [200, 200, 200]
    (own,) = shown(get(gateway, "/v1/quota"))["quotas"]
    assert (own["limit"], own["used"], own["remaining"]) == (1, 3, 0)


def test_quotas_equal_the_headers_of_an_answer(gateway: GatewayFixture) -> None:
    limits = gateway.ask().headers["ratelimit"]
    own, org = shown(get(gateway, "/v1/quota"))["quotas"]
    assert f'"credits-month";r={int(own["remaining"])};' in limits
    assert f'"org-requests-week";r={org["remaining"]};' in limits


def test_views_use_nothing(gateway: GatewayFixture) -> None:
    team = get(gateway, "/v1/quota", RETIRED)
    for _ in range(5):
        assert get(gateway, "/v1/quota", RETIRED).json() == team.json(), "its rate of one would be used up"
        assert get(gateway, "/v1/usage", RETIRED).status_code == 200
    assert shown(get(gateway, "/v1/usage", ADMIN))["total"]["requests"] == 0
    assert not gateway.store.exists(KEYS.rate("retired"))


def test_a_rate_of_fractions(gateway: GatewayFixture) -> None:
    document = shown(get(gateway, "/v1/quota", RETIRED))
    assert document["rate"] == {"per_s": 0.5, "burst": 1, "remaining": 1}


@pytest.mark.parametrize("team", ["marketing", "nobody"])
def test_a_team_does_not_see_quotas_of_others(gateway: GatewayFixture, team: str) -> None:
    refused = get(gateway, f"/v1/quota?team={team}")
    assert (refused.status_code, code_of(refused)) == (403, "forbidden")


def test_the_operator_sees_all_quotas(gateway: GatewayFixture) -> None:
    make_requests(gateway)
    documents = shown(get(gateway, "/v1/quota", ADMIN))["teams"]
    assert [document["team"] for document in documents] == ["design", "marketing", "retired"]
    assert shown(get(gateway, "/v1/quota?team=design", ADMIN))["quotas"] == documents[0]["quotas"]
    assert len({str(document["quotas"][-1]) for document in documents}) == 1, "the organisation's is the same for all"
    for query in ("team=nobody", "teem=design", "team=design&team=design", "team="):
        refused = get(gateway, f"/v1/quota?{query}", ADMIN)
        assert (refused.status_code, code_of(refused)) == (400, "invalid-query")


# --- Access, and an unreachable ledger -------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/v1/usage", "/v1/quota"])
def test_access_depends_on_the_token(gateway: GatewayFixture, path: str) -> None:
    assert get(gateway, path, RETIRED).status_code == 200, "a disabled team can read its usage, but get no estimates"
    assert code_of(gateway.ask(x_api_key=RETIRED)) == "team-disabled"
    for token in (EXPIRED, token_of("x" * 32), "nonsense"):
        refused = get(gateway, f"{path}?nonsense", token)
        assert (refused.status_code, code_of(refused)) == (401, "unknown-token"), "before the query is checked"
        assert refused.headers["www-authenticate"] == "Bearer"
    with httpx2.Client(base_url=gateway.url, trust_env=False, verify=NO_TLS) as anonymous:
        assert anonymous.get(path).status_code == 401
        assert anonymous.get(path, headers={"authorization": f"Bearer {ADMIN}"}).status_code == 200
    wrong = gateway.client.post(path, content=b"[]")
    assert (wrong.status_code, wrong.headers["allow"]) == (405, "GET, HEAD")


@pytest.mark.parametrize("path", ["/v1/usage", "/v1/quota"])
def test_head_answers_like_get_without_the_body(gateway: GatewayFixture, path: str) -> None:
    answer = gateway.client.head(path)
    assert (answer.status_code, answer.content) == (200, b"")
    assert answer.headers["content-type"] == "application/json"


@pytest.mark.parametrize("path", ["/v1/usage", "/v1/usage?format=csv", "/v1/quota"])
def test_an_unreachable_ledger_is_a_503(open_gateway: OpenGateway, path: str) -> None:
    url = f"redis://127.0.0.1:{free_port()}"
    gateway = open_gateway(store={"url": url, "on_outage": "admit"}, admin={"tokens": [digest_of(ADMIN)]})
    for token in (DESIGN, ADMIN):
        refused = get(gateway, path, token)
        assert (refused.status_code, code_of(refused)) == (503, "store-unavailable")
        assert refused.headers["retry-after"] == "1"


def test_a_report_that_takes_too_long_is_a_503(open_gateway: OpenGateway) -> None:
    gateway = open_gateway(server={"request_timeout_s": 1e-6})
    refused = get(gateway, f"/v1/usage?from={datetime.now(UTC).date() - timedelta(days=300)}")
    assert (refused.status_code, code_of(refused)) == (503, "store-unavailable")
    assert "fewer days" in refused.json()["detail"]


def test_the_log_line_has_the_team(gateway: GatewayFixture, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "proxy.http.responses"):
        get(gateway, "/v1/usage", RETIRED)
        wait_until(lambda: caplog.records)
        get(gateway, "/v1/quota", ADMIN)
        wait_until(lambda: len(caplog.records) == 2)  # the line is written after the answer
    facts = [record.__dict__["facts"] for record in caplog.records]
    assert [(fact["team"], fact["operation"]) for fact in facts] == [("retired", "other"), ("-", "other")]
