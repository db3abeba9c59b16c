"""Quotas over HTTP, with a real ledger and the simulator as upstream."""

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from decimal import Decimal
from zoneinfo import ZoneInfo

import pytest

from gateway_fixture import DESIGN, MARKETING, RETIRED, GatewayFixture, cache_status
from gateway_process import Tree
from proxy.auth import digest_of
from quota_fixture import (
    ADMIN,
    FLUX,
    ONE,
    Limited,
    end_of,
    exceeded,
    field,
    left,
    limits,
    quota,
    rate,
    requests,
    row,
    shown,
    team,
    usage,
    used,
)

pytestmark = pytest.mark.usefixtures("within_a_minute")

MORNING = "UTC" if datetime.now(UTC).hour < 12 else "Etc/GMT+12"
"""A time zone in which no day ends within the next hours."""

SCOPES = ["team", "org"]


def limiting(limited: Limited, scope: str, *quotas: Tree, **sections: Tree) -> GatewayFixture:
    return limited(*quotas, **sections) if scope == "team" else limited(org={"quotas": list(quotas)}, **sections)


class TestQuotas:
    @pytest.mark.parametrize("scope", SCOPES)
    @pytest.mark.parametrize(("measure", "status"), [("requests", 429), ("estimated_credits", 402)])
    def test_a_used_up_quota_refuses(self, scope: str, measure: str, status: int, limited: Limited) -> None:
        gateway = limiting(limited, scope, quota(2, "month", measure), org_quota := requests(50, "week"))
        assert [gateway.ask(ONE).status_code for _ in range(2)] == [200, 200]
        for body in (ONE, FLUX):
            problem = exceeded(gateway.ask(body), status)
            own = {key: problem["quota"][key] for key in ("scope", "measure", "per", "limit", "used")}
            assert own == {"scope": scope, "measure": measure, "per": "month", "limit": 2, "used": 2}
            name = ("org-" if scope == "org" else "") + ("requests" if measure == "requests" else "credits")
            assert problem["violated-policies"] == [f"{name}-month"]
            assert problem["detail"].startswith("0 of the ")
        assert used(gateway) == [2, 2], org_quota
        assert usage(gateway) == row(2, 2, refused=2, hit=1, miss=1, quota_exceeded=2)
        assert gateway.simulator.calls == 1
        other = gateway.ask(ONE, x_api_key=MARKETING)
        assert other.status_code == (200 if scope == "team" else status)

    @pytest.mark.parametrize("scope", SCOPES)
    @pytest.mark.parametrize("measure", ["requests", "estimated_credits"])
    def test_a_warning_quota_counts_marks_and_admits(self, scope: str, measure: str, limited: Limited) -> None:
        gateway = limiting(limited, scope, quota(2, "month", measure, "warn"), quota(100, "day"))
        answers_ = [gateway.ask(ONE) for _ in range(4)]
        assert [answer.status_code for answer in answers_] == [200] * 4
        name = ("org-" if scope == "org" else "") + ("requests-month" if measure == "requests" else "credits-month")
        warnings = [answer.headers.get("estimate-proxy-warning") for answer in answers_]
        assert warnings == [None, None, f'"{name}"', f'"{name}"'], "a quota is exceeded if more than its limit is used"
        assert field(answers_[3], "estimate-proxy-warning") == {name: {}}
        assert [left(answer)[name] for answer in answers_] == [1, 0, 0, 0]
        assert used(gateway) == [4, 4]
        assert usage(gateway) == row(4, 4, hit=3, miss=1)

    @pytest.mark.parametrize("per", ["minute", "hour", "day", "week", "month"])
    def test_a_refusal_has_the_windows_end_and_retry_after_only_within_the_hour(
        self, per: str, limited: Limited
    ) -> None:
        gateway = limited(requests(1, per), org={"timezone": MORNING})
        now = datetime.now(ZoneInfo(MORNING))
        gateway.ask()
        refused = gateway.ask()
        quota = exceeded(refused, 429)["quota"]
        end = end_of(per, now)
        assert (datetime.fromisoformat(quota["resets_at"]), quota["requested"]) == (end, 1)
        seconds = round((end - now).total_seconds())
        assert seconds - 3 <= limits(refused)[f"requests-{per}"]["t"] <= seconds + 1
        if per in {"minute", "hour"}:
            assert int(refused.headers["retry-after"]) == limits(refused)[f"requests-{per}"]["t"]
        else:
            assert "retry-after" not in refused.headers

    def test_a_refusal_for_credits_has_no_retry_after(self, limited: Limited) -> None:
        gateway = limited(quota(1, "minute"))
        assert [gateway.ask(ONE).status_code, gateway.ask(ONE).status_code] == [200, 402]
        assert "retry-after" not in gateway.ask(ONE).headers

    @pytest.mark.parametrize("scope", SCOPES)
    @pytest.mark.parametrize(("measure", "status"), [("requests", 429), ("estimated_credits", 402)])
    def test_a_limit_of_0_refuses_all(self, scope: str, measure: str, status: int, limited: Limited) -> None:
        limited().ask(FLUX, x_api_key=MARKETING)
        gateway = limiting(limited, scope, quota(0, "day", measure))
        calls = gateway.simulator.calls
        assert [gateway.ask(body).status_code for body in (FLUX, ONE)] == [status] * 2
        assert exceeded(gateway.ask(FLUX), status)["quota"]["limit"] == 0
        assert gateway.simulator.calls == calls
        assert used(gateway)[0] == (0 if scope == "team" else 1 if measure == "requests" else Decimal("2.75"))

    def test_a_limit_of_0_that_warns_admits(self, limited: Limited) -> None:
        gateway = limited(quota(0, on_exceed="warn"), requests(0, on_exceed="warn"))
        answer = gateway.ask(ONE)
        assert answer.status_code == 200
        assert list(field(answer, "estimate-proxy-warning")) == ["credits-month", "requests-month"]

    def test_a_hit_that_would_exceed_it_is_refused_and_shows_only_its_own_price(self, limited: Limited) -> None:
        gateway = limited(quota(5), requests(10))
        assert gateway.ask(FLUX).status_code == 200
        refused = gateway.ask(FLUX)
        problem = exceeded(refused)
        assert problem["quota"] == {
            "scope": "team",
            "measure": "estimated_credits",
            "per": "month",
            "limit": 5,
            "used": Decimal("2.75"),
            "requested": Decimal("2.75"),
            "resets_at": end_of("month", datetime.now(UTC)).isoformat(),
        }
        assert problem["detail"].startswith("2.25 of the team's 5 estimated credits per month are left until ")
        assert problem["detail"].endswith(", and this estimate needs 2.75.")
        assert {"cache-status", "age", "estimate-proxy-balance-age"}.isdisjoint(refused.headers)
        assert "balance" not in refused.text
        assert used(gateway) == [Decimal("2.75"), 1]

    def test_a_miss_that_exceeds_it_is_not_debited_and_its_price_is_stored(self, limited: Limited) -> None:
        gateway = limited(quota(2), requests(10))
        problem = exceeded(refused := gateway.ask(FLUX))
        assert (problem["quota"]["used"], problem["quota"]["requested"]) == (0, Decimal("2.75"))
        assert left(refused) == {"credits-month": 2, "requests-month": 10}
        assert (gateway.simulator.calls, used(gateway)) == (1, [0, 0])
        assert usage(gateway) == row(refused=1, quota_exceeded=1)
        assert cache_status(gateway.ask(FLUX, x_api_key=MARKETING)).startswith("hit; ")
        assert [gateway.ask(ONE).status_code for _ in range(3)] == [200, 200, 402]
        assert (gateway.simulator.calls, used(gateway)) == (2, [2, 2])

    def test_a_miss_calls_upstream_unless_nothing_is_left(self, limited: Limited) -> None:
        gateway = limited(quota(2.75))
        assert gateway.ask(FLUX).status_code == 200, "the very last credit may be used"
        problem = exceeded(gateway.ask(ONE))
        assert (problem["quota"]["used"], problem["quota"]["requested"]) == (Decimal("2.75"), None)
        assert gateway.simulator.calls == 1

    def test_a_refused_request_uses_no_quota(self, limited: Limited) -> None:
        org = {"quotas": [quota(3), requests(9, "day", "warn")]}
        gateway = limited(requests(9, "week"), quota(9, "day"), org=org)
        assert gateway.ask(ONE).status_code == 200
        for body in (FLUX, FLUX):  # a miss, then a hit
            assert exceeded(gateway.ask(body))["violated-policies"] == ["org-credits-month"]
        assert used(gateway) == [1, 1, 1, 1]

    def test_all_violated_quotas_are_named_and_the_teams_first_is_explained(self, limited: Limited) -> None:
        org = {"quotas": [requests(2, "day"), quota(2, "week", on_exceed="warn"), quota(2)]}
        gateway = limited(quota(2), requests(5), requests(2, "week"), org=org)
        assert [gateway.ask(ONE).status_code for _ in range(2)] == [200, 200]
        problem = exceeded(gateway.ask(ONE))
        expected = ["credits-month", "requests-week", "org-requests-day", "org-credits-month"]
        assert problem["violated-policies"] == expected
        assert (problem["quota"]["scope"], problem["quota"]["per"]) == ("team", "month")

    def test_a_teams_quotas_replace_the_defaults(self, limited: Limited) -> None:
        defaults = {"rate": rate(100), "quotas": [requests(1)]}
        teams = {"marketing": {"tokens": [digest_of(MARKETING)]}, "retired": team(RETIRED)}
        gateway = limited(quota(100), team_defaults=defaults, teams=teams)
        assert [gateway.ask().status_code for _ in range(2)] == [200, 200]
        assert [gateway.ask(x_api_key=MARKETING).status_code for _ in range(2)] == [200, 429]
        assert [gateway.ask(x_api_key=RETIRED).status_code for _ in range(2)] == [200, 200], (
            "it has no quotas of its own"
        )

    def test_the_organisations_quota_counts_all_teams(self, limited: Limited) -> None:
        gateway = limited(org={"quotas": [quota(6), requests(100)]})
        assert [gateway.ask(FLUX, x_api_key=token).status_code for token in (DESIGN, MARKETING)] == [200, 200]
        for token in (DESIGN, MARKETING):
            assert exceeded(gateway.ask(FLUX, x_api_key=token))["quota"]["used"] == Decimal("5.5")
        assert used(gateway) == used(gateway, MARKETING) == [Decimal("5.5"), 2]
        rows = {row["team"]: row["estimated_credits"] for row in shown(gateway, "/v1/usage?by=team", ADMIN)["rows"]}
        assert rows == {"design": Decimal("2.75"), "marketing": Decimal("2.75")}
        assert usage(gateway, ADMIN) == row(2, Decimal("5.5"), refused=2, hit=1, miss=1, quota_exceeded=2)

    @pytest.mark.parametrize("measure", ["requests", "estimated_credits"])
    def test_many_simultaneous_requests_do_not_exceed_it(self, measure: str, limited: Limited) -> None:
        gateway = limited(quota(20, "month", measure), store={"timeout_s": 10})
        with ThreadPoolExecutor(50) as pool, gateway.simulator.hold() as hold:
            asked = [pool.submit(gateway.ask, b'[{"seed":%d}]' % (number % 40)) for number in range(200)]
            assert gateway.simulator.arrived(20)
            hold.release()
            statuses = Counter(future.result().status_code for future in asked)
        assert statuses == {200: 20, 429 if measure == "requests" else 402: 180}
        assert used(gateway) == [20]
        total = usage(gateway)
        assert (total["requests"], total["refused"], total["estimated_credits"]) == (20, 180, 20)
