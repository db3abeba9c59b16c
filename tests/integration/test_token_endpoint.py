"""`GET /v1/token`: what a token may see."""

from datetime import UTC, datetime
from typing import Any

import pytest

from gateway_fixture import DESIGN, EXPIRED, MARKETING, RETIRED, GatewayFixture, OpenGateway, code_of
from proxy.auth import digest_of, token_of
from quota_fixture import ADMIN, exactly, get

VIEWER, METRICS = token_of("v" * 32), token_of("m" + "e" * 31)
PATH = "/v1/token"
UNKNOWN = {"account": "default", "balance": None, "balance_age_s": None}


@pytest.fixture
def gateway(open_gateway: OpenGateway) -> GatewayFixture:
    return open_gateway(
        admin={"tokens": [digest_of(ADMIN)]},
        viewer={"tokens": [digest_of(VIEWER)]},
        metrics={"tokens": [digest_of(METRICS)]},
        teams={
            "design": {
                "name": "The Designers",
                "tokens": [
                    {"sha256": digest_of(DESIGN), "label": "ci", "expires": "2999-12-31"},
                    {"sha256": digest_of(EXPIRED), "expires": "2026-01-31"},
                ],
            },
            "retired": {"tokens": [digest_of(RETIRED)], "disabled": True},
            "marketing": {"tokens": [digest_of(MARKETING)], "account": "second"},
        },
    )


def shown(gateway: GatewayFixture, token: str) -> Any:
    response = get(gateway, PATH, token)
    assert response.status_code == 200, response.text
    document = exactly(response)
    assert document.pop("timezone") == "UTC"
    assert document.pop("today") == datetime.now(UTC).date().isoformat()
    return document


def test_a_teams_token_shows_the_team_and_its_account(gateway: GatewayFixture) -> None:
    assert shown(gateway, DESIGN) == {
        "role": "team",
        "team": "design",
        "team_name": "The Designers",
        "token_label": "ci",
        "token_expires": "2999-12-31",
        "accounts": [UNKNOWN],
    }
    assert shown(gateway, RETIRED)["team"] == "retired"
    assert shown(gateway, MARKETING)["token_expires"] is None
    assert [account["account"] for account in shown(gateway, MARKETING)["accounts"]] == ["second"]


def test_viewers_and_admins_see_all_accounts(gateway: GatewayFixture) -> None:
    accounts = [UNKNOWN, {**UNKNOWN, "account": "second"}]
    assert shown(gateway, VIEWER) == {"role": "viewer", "accounts": accounts}
    assert shown(gateway, ADMIN) == {"role": "admin", "accounts": accounts}


def test_the_balance_is_the_newest_that_rendernet_has_told(gateway: GatewayFixture) -> None:
    balance = gateway.ask().json()["data"]["balance"]
    (account,) = shown(gateway, DESIGN)["accounts"]
    assert account.pop("balance_age_s") in range(10)
    assert account == {"account": "default", "balance": balance}


@pytest.mark.parametrize(
    ("token", "status", "code"),
    [(EXPIRED, 401, "unknown-token"), ("ep_x", 401, "unknown-token"), (METRICS, 403, "forbidden")],
)
def test_other_tokens_are_refused(gateway: GatewayFixture, token: str, status: int, code: str) -> None:
    response = get(gateway, PATH, token)
    assert (response.status_code, code_of(response)) == (status, code)
