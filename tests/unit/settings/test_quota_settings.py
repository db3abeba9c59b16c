"""Rates and quotas in the settings: owners, exact limits, and one clear line for each invalid value."""

import json
import pickle
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from configs import ACCOUNT, CANARY, ENV, MINIMAL, Problems, Read
from proxy.settings.schema import QuotaSettings, RateSettings, Settings, effective

SCOPES = ("org", "team_defaults", "teams.design")
"""Sections that can have quotas."""


def quota(scope: str = "org", **members: str) -> str:
    """Returns a quota of a scope in TOML; `members` are TOML values, `""` leaves one out."""
    members = {"measure": "'requests'", "limit": "100", "per": "'day'", **members}
    lines = (f"{name} = {value}\n" for name, value in members.items() if value)
    return f"[[{scope}.quotas]]\n{''.join(lines)}"


def limit(measure: str, number: Any) -> QuotaSettings:
    return QuotaSettings.model_validate({"measure": measure, "limit": number, "per": "day"})


# --- Owners -----------------------------------------------------------------------------------------------------


def test_the_default_is_a_rate_and_no_quotas(read: Read) -> None:
    settings = read()
    team = settings.teams["design"]
    assert settings.team_defaults.rate == RateSettings(per_s=50.0, burst=100)
    assert (settings.org.quotas, settings.team_defaults.quotas) == ((), ())
    assert (team.rate, team.quotas) == (None, None)
    assert settings.rate_of(team) == settings.team_defaults.rate
    assert settings.quotas_of(team) == ()


def test_a_team_has_its_own_limits_or_the_defaults(read: Read) -> None:
    settings = read(
        ACCOUNT
        + "[team_defaults]\nrate = { per_s = 5, burst = 10 }\n"
        + quota("team_defaults", per="'hour'", limit="1")
        + "[teams.plain]\n"
        + "[teams.fast]\nrate = { per_s = 0.5, burst = 1 }\n"
        + "[teams.free]\nquotas = []\n"
        + "[teams.own]\n"
        + quota("teams.own", per="'week'", limit="2")
        + quota("teams.own", per="'month'", limit="3", on_exceed="'warn'")
        + quota(limit="4")
    )

    def held(name: str) -> tuple[RateSettings, list[tuple[str, int]]]:
        team = settings.teams[name]
        return settings.rate_of(team), [(quota.per, quota.counted_limit) for quota in settings.quotas_of(team)]

    default = RateSettings(per_s=5.0, burst=10)
    assert held("plain") == (default, [("hour", 1)])
    assert held("fast") == (RateSettings(per_s=0.5, burst=1), [("hour", 1)])
    assert held("free") == (default, [])
    assert held("own") == (default, [("week", 2), ("month", 3)])
    assert [quota.on_exceed for quota in settings.quotas_of(settings.teams["own"])] == ["refuse", "warn"]
    assert [quota.counted_limit for quota in settings.org.quotas] == [4]


def test_variables_set_rates_and_quotas(read: Read) -> None:
    lists = {"org": '[{"measure":"estimated_credits","limit":12.1,"per":"minute"}]', "design": "[]"}
    settings = read(
        MINIMAL + quota() + quota("teams.design"),
        {
            f"{ENV}ORG__QUOTAS": lists["org"],
            f"{ENV}TEAM_DEFAULTS__RATE": '{"per_s":1,"burst":2}',
            f"{ENV}TEAMS__DESIGN__QUOTAS": lists["design"],
            f"{ENV}TEAMS__DESIGN__RATE__PER_S": "0.001",
            f"{ENV}TEAMS__DESIGN__RATE__BURST": "1000000",
        },
    )
    assert [quota.counted_limit for quota in settings.org.quotas] == [12_100_000]
    assert settings.team_defaults.rate == RateSettings(per_s=1.0, burst=2)
    assert settings.teams["design"].rate == RateSettings(per_s=0.001, burst=1_000_000)
    assert settings.teams["design"].quotas == ()


def test_they_survive_pickling_for_a_worker(read: Read) -> None:
    settings = read(MINIMAL + quota("teams.design", measure="'estimated_credits'", limit="0.000001"))
    again = pickle.loads(pickle.dumps(settings))  # noqa: S301 -- our own bytes; a worker gets its settings so
    assert again == settings
    assert again.quotas_of(again.teams["design"])[0].counted_limit == 1


def test_they_are_listed_among_the_effective_settings(read: Read) -> None:
    text = MINIMAL + quota("teams.design", measure="'estimated_credits'", limit="12.1") + quota(limit="0")
    rows = dict(effective(read(text)))
    assert rows["team_defaults.rate.per_s"] == 50.0
    assert rows["team_defaults.rate.burst"] == 100
    assert rows["team_defaults.quotas"] == ()
    assert rows["teams.design.rate"] is None
    assert rows["org.quotas"][0]["limit"] == 0
    (shown,) = rows["teams.design.quotas"]
    assert {name: str(value) for name, value in shown.items()} == {
        "measure": "estimated_credits",
        "limit": "12.1",
        "per": "day",
        "on_exceed": "refuse",
    }


# --- Exact limits -----------------------------------------------------------------------------------------------


@given(st.decimals(0, 9 * 10**9, places=6))
def test_credits_are_exactly_the_written_number(number: Decimal) -> None:
    """A TOML parser reads decimals as doubles, but a limit must be exact to a micro-credit."""
    if number > 2**33 and number % 1:
        with pytest.raises(ValidationError, match="its decimals would be inexact"):
            limit("estimated_credits", float(number))
    else:
        assert limit("estimated_credits", float(number)).counted_limit == number * 1_000_000


@given(st.integers(0, 9 * 10**9))
def test_whole_credits_are_read_as_whole_numbers(number: int) -> None:
    assert limit("estimated_credits", number).counted_limit == number * 1_000_000
    assert limit("estimated_credits", float(number)).counted_limit == number * 1_000_000
    assert str(limit("estimated_credits", number).limit) == str(number)


@given(st.integers(0, 10**12))
def test_requests_are_read_as_whole_numbers(number: int) -> None:
    assert limit("requests", number).counted_limit == number
    assert limit("requests", float(number)).counted_limit == number


@given(st.decimals(0, 8 * 10**9, places=6))
def test_a_limit_is_shown_as_a_number_that_can_be_read_again(number: Decimal) -> None:
    shown = str(limit("estimated_credits", float(number)).limit)
    assert Decimal(shown) == number
    assert limit("estimated_credits", json.loads(shown)).counted_limit == number * 1_000_000


@pytest.mark.parametrize(
    ("measure", "text", "counted"),
    [
        ("requests", "0", 0),
        ("requests", "1_000", 1000),
        ("requests", "1e6", 1_000_000),
        ("requests", "1000000000000", 10**12),
        ("estimated_credits", "0", 0),
        ("estimated_credits", "0.0", 0),
        ("estimated_credits", "0.1", 100_000),
        ("estimated_credits", "12.1", 12_100_000),
        ("estimated_credits", "1e-6", 1),
        ("estimated_credits", "8589934591.999999", 8_589_934_591_999_999),
        ("estimated_credits", "9000000000.0", 9 * 10**15),
        ("estimated_credits", "9_000_000_000", 9 * 10**15),
    ],
)
def test_valid_limits_are_accepted(read: Read, measure: str, text: str, counted: int) -> None:
    (found,) = read(MINIMAL + quota(measure=f"'{measure}'", limit=text)).org.quotas
    assert found.counted_limit == counted
    assert counted < 2**53


def test_a_limit_given_as_a_decimal_keeps_all_its_digits() -> None:
    """Dumped settings contain decimals."""
    dumped = limit("estimated_credits", Decimal("8999999999.999999")).model_dump()
    assert QuotaSettings.model_validate(dumped).counted_limit == 8_999_999_999_999_999


# --- Invalid values ---------------------------------------------------------------------------------------------

NO_REQUESTS = "must be a whole number of requests, at most 1000000000000"
NO_CREDITS = "must be a number of credits with at most six decimals, at most 9000000000"


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize(
    ("members", "where", "message"),
    [
        ({"measure": "'credits'"}, ".measure", "must be 'requests' or 'estimated_credits'"),
        ({"measure": "3"}, ".measure", "must be 'requests' or 'estimated_credits'"),
        ({"measure": ""}, ".measure", "is missing"),
        ({"per": "'year'"}, ".per", "must be 'minute', 'hour', 'day', 'week' or 'month'"),
        ({"per": "'Day'"}, ".per", "must be 'minute', 'hour', 'day', 'week' or 'month'"),
        ({"per": "[1]"}, ".per", "must be 'minute', 'hour', 'day', 'week' or 'month'"),
        ({"per": ""}, ".per", "is missing"),
        ({"on_exceed": "'pass'"}, ".on_exceed", "must be 'refuse' or 'warn'"),
        ({"limit": ""}, ".limit", "is missing"),
        ({"limt": "1"}, ".limt", "is not a setting: did you mean limit?"),
        ({"colour": "1"}, ".colour", "is not a setting; expected one of: measure, limit, per, on_exceed"),
        # limits of any measure
        ({"limit": "-1"}, ".limit", "must be greater than or equal to 0"),
        ({"limit": "-0.000001"}, ".limit", "must be greater than or equal to 0"),
        ({"limit": "true"}, ".limit", "must be a number, not true or false"),
        ({"limit": "nan"}, ".limit", "must be a finite number"),
        ({"limit": "inf"}, ".limit", "must be a finite number"),
        ({"limit": "-inf"}, ".limit", "must be a finite number"),
        ({"limit": f"'{CANARY}'"}, ".limit", "must be a number"),
        ({"limit": "'12'"}, ".limit", "must be a number"),
        ({"limit": "[1]"}, ".limit", "must be a number"),
        ({"limit": "{ a = 1 }"}, ".limit", "must be a number"),
        ({"limit": "2027-06-30"}, ".limit", "must be a number"),
        # of requests
        ({"limit": "0.5"}, ".limit", NO_REQUESTS),
        ({"limit": "1e-9"}, ".limit", NO_REQUESTS),
        ({"limit": "1000000000001"}, ".limit", NO_REQUESTS),
        ({"limit": "1e300"}, ".limit", NO_REQUESTS),
        ({"limit": "0x" + "f" * 6000}, ".limit", NO_REQUESTS),
        # of credits
        ({"measure": "'estimated_credits'", "limit": "0.0000001"}, ".limit", NO_CREDITS),
        ({"measure": "'estimated_credits'", "limit": "12.1000001"}, ".limit", NO_CREDITS),
        ({"measure": "'estimated_credits'", "limit": "9000000001"}, ".limit", NO_CREDITS),
        ({"measure": "'estimated_credits'", "limit": "9000000000.5"}, ".limit", NO_CREDITS),
        ({"measure": "'estimated_credits'", "limit": "1e300"}, ".limit", NO_CREDITS),
        ({"measure": "'estimated_credits'", "limit": "8999999999.5"}, ".limit", "must be a whole number above 858993"),
    ],
)
def test_an_invalid_quota_is_refused(
    problems_of: Problems, scope: str, members: dict[str, str], where: str, message: str
) -> None:
    found = problems_of(MINIMAL + quota(scope, per="'hour'") + quota(scope, **members))
    assert list(found) == [f"{scope}.quotas[1]{where}"]
    assert found[f"{scope}.quotas[1]{where}"].startswith(message)


@pytest.mark.parametrize("number", ["1e999999999", "1e-999999999", "NaN", "sNaN", "-Infinity"])
@pytest.mark.parametrize("measure", ["requests", "estimated_credits"])
def test_odd_decimals_are_refused_without_a_crash(measure: str, number: str) -> None:
    with pytest.raises(ValidationError):
        limit(measure, Decimal(number))


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize(
    ("value", "where", "message"),
    [
        ("3", "", "must be a list (in the environment: as JSON)"),
        ("{ measure = 'requests' }", "", "must be a list"),
        (f"['{CANARY}']", "[0]", "must be a table"),
        ("[[]]", "[0]", "must be a table"),
    ],
)
def test_quotas_that_are_not_a_list_of_tables_are_refused(
    problems_of: Problems, scope: str, value: str, where: str, message: str
) -> None:
    section = "" if scope == "teams.design" else f"[{scope}]\n"
    found = problems_of(f"{MINIMAL}{section}quotas = {value}")
    assert list(found) == [f"{scope}.quotas{where}"]
    assert found[f"{scope}.quotas{where}"].startswith(message)


@pytest.mark.parametrize("scope", SCOPES)
def test_a_second_limit_for_the_same_measure_and_period_is_refused(problems_of: Problems, scope: str) -> None:
    text = MINIMAL + quota(scope) + quota(scope, per="'week'") + quota(scope, limit="7", on_exceed="'warn'")
    repeated = f"repeats {scope}.quotas[0]: keep one limit for this measure and window"
    assert problems_of(text) == {f"{scope}.quotas[2]": repeated}
    assert problems_of(text + quota(scope)) == {f"{scope}.quotas[2]": repeated, f"{scope}.quotas[3]": repeated}


def test_a_repeated_quota_does_not_hide_other_problems(problems_of: Problems) -> None:
    text = MINIMAL + quota(limit="-1") + quota(limit="true") + quota(measure="[]") + quota(per="[]") + quota(measure="")
    assert list(problems_of(text)) == [
        "org.quotas[1]",
        "org.quotas[0].limit",
        "org.quotas[1].limit",
        "org.quotas[2].measure",
        "org.quotas[3].per",
        "org.quotas[4].measure",
    ]


def test_the_same_limit_of_another_owner_or_period_is_accepted(read: Read) -> None:
    text = MINIMAL + "[teams.other]\n" + "".join(quota(scope) for scope in (*SCOPES, "teams.other"))
    settings = read(text + quota(measure="'estimated_credits'") + quota(per="'month'"))
    assert len(settings.org.quotas) == 3


@pytest.mark.parametrize("team", ["org", "quotas", "team_defaults"])
def test_a_team_can_have_the_name_of_a_section(problems_of: Problems, team: str) -> None:
    if "_" in team:
        assert list(problems_of(f"{MINIMAL}[teams.{team}]")) == [f"teams.{team}"]
    else:
        found = problems_of(f"{MINIMAL}[teams.{team}]\n" + quota(f"teams.{team}") * 2)
        assert list(found) == [f"teams.{team}.quotas[1]"]


@pytest.mark.parametrize("scope", SCOPES[1:])
@pytest.mark.parametrize(
    ("value", "where", "message"),
    [
        ("3", "", "must be a table"),
        (f"'{CANARY}'", "", "must be a table"),
        ("[{ per_s = 1, burst = 1 }]", "", "must be a table"),
        ("{ per_s = 1 }", ".burst", "is missing"),
        ("{ burst = 1 }", ".per_s", "is missing"),
        ("{ per_s = 1, burst = 1, bust = 1 }", ".bust", "is not a setting: did you mean burst?"),
        ("{ per_s = 1, burst = 1, x = 1 }", ".x", "is not a setting; expected one of: per_s, burst"),
        ("{ per_s = 0, burst = 1 }", ".per_s", "must be greater than or equal to 0.001"),
        ("{ per_s = 0.0009, burst = 1 }", ".per_s", "must be greater than or equal to 0.001"),
        ("{ per_s = -1, burst = 1 }", ".per_s", "must be greater than or equal to 0.001"),
        ("{ per_s = 100001, burst = 1 }", ".per_s", "must be less than or equal to 100000"),
        ("{ per_s = nan, burst = 1 }", ".per_s", "must be a finite number"),
        ("{ per_s = inf, burst = 1 }", ".per_s", "must be a finite number"),
        ("{ per_s = true, burst = 1 }", ".per_s", "must be a number, not true or false"),
        (f"{{ per_s = '{CANARY}', burst = 1 }}", ".per_s", "must be a number"),
        ("{ per_s = 1, burst = 0 }", ".burst", "must be greater than or equal to 1"),
        ("{ per_s = 1, burst = 1000001 }", ".burst", "must be less than or equal to 1000000"),
        ("{ per_s = 1, burst = 1.5 }", ".burst", "must be a whole number"),
        ("{ per_s = 1, burst = true }", ".burst", "must be a number, not true or false"),
        (f"{{ per_s = 1, burst = '{CANARY}' }}", ".burst", "must be a whole number"),
    ],
)
def test_an_invalid_rate_is_refused(problems_of: Problems, scope: str, value: str, where: str, message: str) -> None:
    section = "" if scope == "teams.design" else f"[{scope}]\n"
    found = problems_of(f"{MINIMAL}{section}rate = {value}")
    assert list(found) == [f"{scope}.rate{where}"]
    assert found[f"{scope}.rate{where}"].startswith(message)


@pytest.mark.parametrize("per_s", [0.001, 0.5, 1, 100_000])
@pytest.mark.parametrize("burst", [1, 1_000_000])
def test_valid_rates_are_accepted(read: Read, per_s: float, burst: int) -> None:
    settings = read(f"{MINIMAL}rate = {{ per_s = {per_s}, burst = {burst} }}")
    assert settings.rate_of(settings.teams["design"]) == RateSettings(per_s=per_s, burst=burst)


def test_the_organisation_has_quotas_but_no_rate(problems_of: Problems) -> None:
    found = problems_of(MINIMAL + "[org]\nrate = { per_s = 1, burst = 1 }")
    assert found == {"org.rate": "is not a setting; expected one of: id, timezone, quotas, currency"}


def test_an_unknown_team_default_is_refused_with_the_valid_ones(problems_of: Problems) -> None:
    found = problems_of(MINIMAL + "[team_defaults]\ndisabled = true\nquota = []\n[team_default]")
    assert found == {
        "team_defaults.disabled": "is not a setting; expected one of: rate, quotas",
        "team_defaults.quota": "is not a setting: did you mean quotas?",
        "team_default": "is not a setting: did you mean team_defaults?",
    }


def test_quotas_are_frozen(read: Read) -> None:
    settings: Settings = read(MINIMAL + quota())
    for section, field in ((settings.org.quotas[0], "limit"), (settings.team_defaults.rate, "burst")):
        with pytest.raises(ValidationError):
            setattr(section, field, 1)
