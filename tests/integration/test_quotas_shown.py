"""How a team sees its rate and quotas: in response headers, explanations, and the usage endpoints."""

from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import httpx2
import pytest

from gateway_fixture import PATH, RETIRED, answers, code_of
from quota_fixture import (
    FLUX,
    ONE,
    SEGMENT,
    SLOW,
    Limited,
    end_of,
    exactly,
    exceeded,
    explained,
    field,
    get,
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


def policies(response: httpx2.Response) -> dict[str, dict[str, Any]]:
    return field(response, "ratelimit-policy")


class TestFields:
    def test_they_have_limits_and_remaining_amounts(self, limited: Limited) -> None:
        org = {"quotas": [quota(100, "week", on_exceed="warn"), requests(7, "minute")]}
        gateway = limited(requests(10, "day"), quota(10.5), rate=rate(20, per_s=0.5), org=org)
        now = datetime.now(UTC)
        first, second = gateway.ask(FLUX), gateway.ask(FLUX)
        month_s = (end_of("month", now) - end_of("month", now.replace(day=1) - timedelta(days=1))).total_seconds()
        assert policies(first) == {
            "rate": {"q": 20, "w": 40},
            "requests-day": {"q": 10, "w": 86_400},
            "credits-month": {"q": 10, "qu": "credits", "w": month_s},
            "org-credits-week": {"q": 100, "qu": "credits", "w": 7 * 86_400},
            "org-requests-minute": {"q": 7, "w": 60},
        }
        assert list(limits(first)) == list(policies(first))
        assert left(first) == {"requests-day": 9, "credits-month": 7, "org-credits-week": 97, "org-requests-minute": 6}
        assert left(second) == {"requests-day": 8, "credits-month": 5, "org-credits-week": 94, "org-requests-minute": 5}
        assert [limits(answer)["rate"]["r"] for answer in (first, second)] == [19, 18]
        assert limits(first)["rate"]["t"] == 2
        assert limits(second)["rate"]["t"] in {3, 4}
        for name, per in [("requests-day", "day"), ("org-credits-week", "week"), ("org-requests-minute", "minute")]:
            seconds = (end_of(per, now) - now).total_seconds()
            assert seconds - 3 <= limits(first)[name]["t"] <= seconds + 1

    def test_refusals_and_explanations_have_them_too(self, limited: Limited) -> None:
        gateway = limited(quota(3), requests(9), rate=rate(5))
        answered = gateway.ask(FLUX)
        refused, absent = gateway.ask(FLUX), gateway.ask(ONE, cache_control="only-if-cached")
        explained = gateway.client.post("/v1/explain", content=FLUX)
        for _ in range(2):
            gateway.client.post("/v1/explain", content=FLUX)
        limited_ = gateway.ask(FLUX)
        answers = [answered, refused, absent, explained, limited_]
        assert [answer.status_code for answer in answers] == [200, 402, 504, 200, 429]
        assert {answer.headers["ratelimit-policy"] for answer in answers} == {answered.headers["ratelimit-policy"]}
        assert [limits(answer)["rate"]["r"] for answer in answers] == [4, 4, 3, 2, 0]
        for answer in answers:
            assert left(answer) == {"credits-month": 0, "requests-month": 8}

    def test_a_warning_is_on_answers_but_not_on_refusals(self, limited: Limited) -> None:
        gateway = limited(requests(0, "day", "warn"), quota(2))
        exceeded(gateway.ask(FLUX))  # asserts that there is no warning
        gateway.simulator.script(answers(b"{}", 429, retry_after="30"))
        assert field(gateway.ask(ONE), "estimate-proxy-warning") == {"requests-day": {}}
        unasked = gateway.ask(ONE)
        assert code_of(unasked) == "upstream-busy"
        assert "estimate-proxy-warning" not in unasked.headers


class TestExplain:
    def test_it_uses_no_quota_but_counts_for_the_rate(self, limited: Limited) -> None:
        gateway = limited(quota(100), requests(2), rate=rate(5))
        gateway.ask(FLUX)
        before = usage(gateway), used(gateway)
        assert [explained(gateway)["admitted"] for _ in range(4)] == [True] * 4
        for path in ("/v1/explain", PATH):
            refused = gateway.client.post(path, content=FLUX)
            assert (refused.status_code, code_of(refused)) == (429, "rate-limited")
            assert refused.headers["retry-after"] in {"999", "1000"}
        assert used(gateway) == before[1]
        assert usage(gateway) == row(1, Decimal("2.75"), refused=1, miss=1, rate_limited=1)

    def test_it_shows_no_price_if_an_estimate_would_be_refused(self, limited: Limited) -> None:
        gateway = limited(quota(5))
        gateway.ask(FLUX)
        response = gateway.client.post("/v1/explain", content=FLUX)
        explanation = exactly(response)
        assert (explanation["stored"], explanation["admitted"]) == (True, False)
        needs_more = exceeded(gateway.ask(FLUX))["detail"].replace(" needs 2.75.", " needs more.")
        assert explanation["refusal"] == {"code": "quota-exceeded", "detail": needs_more}
        assert "estimated" not in explanation
        assert "2.75" not in response.text

    def test_an_unknown_price_is_admitted_unless_nothing_is_left(self, limited: Limited) -> None:
        gateway = limited(quota(2.75))
        assert explained(gateway, SEGMENT)["admitted"] is True
        gateway.ask(FLUX)
        explanation = explained(gateway, SEGMENT)
        assert (explanation["stored"], explanation["admitted"], explanation["refusal"]["code"]) == (
            False,
            False,
            "quota-exceeded",
        )

    def test_a_price_that_fits_is_shown(self, limited: Limited) -> None:
        gateway = limited(quota(5.5))
        gateway.ask(FLUX)
        explanation = explained(gateway)
        assert (explanation["admitted"], explanation["estimated"]) == (True, Decimal("2.75"))
        assert "refusal" not in explanation


class TestViews:
    def test_views_use_no_quota_and_do_not_count_for_the_rate(self, limited: Limited) -> None:
        gateway = limited(quota(100), requests(100), rate=rate(2))
        gateway.ask(FLUX)
        before = shown(gateway, "/v1/quota")
        for path in ("/v1/usage", "/v1/usage?by=model&format=csv", "/v1/quota"):
            response = get(gateway, path)
            assert response.status_code == 200
            assert {"ratelimit", "ratelimit-policy"}.isdisjoint(response.headers)
        assert shown(gateway, "/v1/quota") == before
        assert before["rate"] == {"per_s": Decimal(str(SLOW)), "burst": 2, "remaining": 1}

    def test_a_disabled_team_sees_its_usage(self, limited: Limited) -> None:
        retired = team(RETIRED, requests(10))
        limited(teams={"retired": retired}).ask(FLUX, x_api_key=RETIRED)
        gateway = limited(teams={"retired": {**retired, "disabled": True}})
        assert code_of(gateway.ask(FLUX, x_api_key=RETIRED)) == "team-disabled"
        assert usage(gateway, RETIRED) == row(1, Decimal("2.75"), miss=1)
        assert used(gateway, RETIRED) == [1]

    def test_a_quota_that_is_added_later_includes_earlier_usage(self, limited: Limited) -> None:
        limited().ask(FLUX)
        gateway = limited(quota(5), requests(2, "week"), org={"quotas": [quota(100, "day")]})
        assert used(gateway) == [Decimal("2.75"), 1, Decimal("2.75")]
        exceeded(gateway.ask(FLUX))
