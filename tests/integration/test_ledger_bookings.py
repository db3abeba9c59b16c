"""The ledger's bookings, exact amounts and model names, on Valkey and on Redis 7.0."""

import asyncio
from collections import Counter
from typing import Any

import pytest
import redis

from ledger_fixture import (
    BUSY,
    CREDIT,
    DEAREST,
    FAILED,
    HIT,
    KEYS,
    MISS,
    PLAIN,
    LedgerFixture,
    hashes,
    largest_flush,
    opened,
    quota,
    rows,
    run_scenario,
    terms,
    used,
    word,
)
from proxy.problems import Code, Outcome
from proxy.quota.counters import USAGE_KEPT_DAYS
from proxy.quota.ledger import Admitted, Denied
from proxy.quota.ledger_script import MAX_BATCH_ENTRIES, MAX_ENTRY_MICRO
from proxy.quota.model_names import MAX_MODELS
from proxy.quota.quotas import Charge, Quota, Rate, TeamLimits

DAY_MS = 86_400_000

# --- Bookings --------------------------------------------------------------------------------------------------------


def test_a_charge_counts_for_the_team_and_the_organisation(any_store_url: str, server: redis.Redis) -> None:
    async def scenario(fixture: LedgerFixture) -> None:
        for team in ("design", "design", "film"):
            assert isinstance(await fixture.ledger.charge(terms(team=team), HIT), Admitted)

    run_scenario(any_store_url, scenario)
    assert rows(server) == {"Flux:hit:requests": 2, "Flux:hit:credits": 8 * CREDIT}
    assert used(server) == (2, 8 * CREDIT)
    assert used(server, None) == (3, 12 * CREDIT)
    assert server.smembers(KEYS.teams) == {b"design", b"film"}


@pytest.mark.parametrize(
    ("charge", "row", "credits_micro"),
    [
        (MISS, {"Flux:miss:requests": 1, "Flux:miss:credits": 4 * CREDIT}, 4 * CREDIT),
        (Charge(Outcome.MISS, 0, "Flux"), {"Flux:miss:requests": 1}, 0),
        (FAILED, {"-:upstream-error:requests": 1}, 0),
        (Charge(Outcome.CANCELLED), {"-:cancelled:requests": 1}, 0),
    ],
)
def test_a_request_counts_once_whatever_its_outcome(
    any_store_url: str, server: redis.Redis, charge: Charge, row: dict[str, int], credits_micro: int
) -> None:
    async def scenario(fixture: LedgerFixture) -> None:
        admitted = await fixture.admitted()
        assert rows(server) == {"-:cancelled:requests": 1}, "it counts from its begin, even if the process ends here"
        assert used(server) == (1, 0)
        settled = await fixture.ledger.settle(admitted, charge)
        assert isinstance(settled, Admitted)
        assert settled.model == charge.model

    run_scenario(any_store_url, scenario)
    assert rows(server) == row
    assert used(server) == used(server, None) == (1, credits_micro)


def test_time_at_upstream_is_booked_with_the_result(any_store_url: str, server: redis.Redis) -> None:
    """Also if the price exceeds a quota: upstream was asked."""
    limited = terms(quota(10 * CREDIT, "estimated_credits"))

    async def scenario(fixture: LedgerFixture) -> None:
        assert isinstance(await fixture.ledger.charge(PLAIN, HIT), Admitted)
        for limits, us, expected in (
            (PLAIN, 250_000, Admitted),
            (terms(team="film"), 1, Admitted),
            (limited, 5, Denied),
        ):
            charge = Charge(Outcome.MISS, 4 * CREDIT, "Flux", upstream_us=us)
            assert isinstance(await fixture.ledger.settle(await fixture.admitted(limits), charge), expected)
        assert isinstance(await fixture.ledger.settle(await fixture.admitted(), FAILED), Admitted)

    run_scenario(any_store_url, scenario)
    ((key, held),) = hashes(server, "upstream:*").items()
    assert held == {"calls": 3, "us": 250_006}
    assert USAGE_KEPT_DAYS * DAY_MS <= server.pttl(key) <= (USAGE_KEPT_DAYS + 1) * DAY_MS


def test_an_unanswered_request_uses_no_quota(any_store_url: str, server: redis.Redis) -> None:
    limited = terms(quota(1), quota(1, scope="org"))

    async def scenario(fixture: LedgerFixture) -> None:
        for _ in range(3):
            refunded = await fixture.ledger.refund(await fixture.admitted(limited), *BUSY)
            assert word(refunded) == "upstream-busy"
            assert refunded.quota_state is not None
            assert refunded.quota_state.used == (0, 0)
            assert isinstance(await fixture.ledger.record_uncached(limited, Outcome.NOT_CACHED), Admitted)
            assert isinstance(await fixture.ledger.peek(limited, 7), Admitted)

    run_scenario(any_store_url, scenario)
    assert rows(server) == {"-:upstream-busy:refused": 3, "-:not-cached:refused": 3}
    assert used(server) == used(server, None) == (0, 0)


def test_a_denied_request_debits_nothing(any_store_url: str, server: redis.Redis) -> None:
    """The team's own quota would have admitted it."""
    limited = terms(quota(9), quota(10 * CREDIT, "estimated_credits", "day", scope="org"))

    async def scenario(fixture: LedgerFixture) -> None:
        assert isinstance(await fixture.ledger.charge(terms(*limited.org_quotas, team="film"), HIT), Admitted)
        assert isinstance(await fixture.ledger.charge(limited, HIT), Admitted)
        denied = await fixture.ledger.charge(limited, HIT)
        assert isinstance(denied, Denied)
        assert (denied.problem.status, denied.problem.members["violated-policies"]) == (402, ["org-credits-day"])
        assert denied.quota_state is not None
        assert denied.quota_state.used == (1, 8 * CREDIT)

    run_scenario(any_store_url, scenario)
    assert rows(server) == {"Flux:hit:requests": 1, "Flux:hit:credits": 4 * CREDIT, "-:quota-exceeded:refused": 1}
    assert used(server) == (1, 4 * CREDIT)
    assert used(server, None) == (2, 8 * CREDIT)


def test_a_price_that_exceeds_a_quota_refunds_its_request(any_store_url: str, server: redis.Redis) -> None:
    limited = terms(quota(2), quota(6 * CREDIT, "estimated_credits"))

    async def scenario(fixture: LedgerFixture) -> None:
        first, second = await fixture.admitted(limited), await fixture.admitted(limited)
        assert word(await fixture.ledger.charge(limited, HIT)) == "quota-exceeded", "both requests are used"
        assert word(await fixture.ledger.settle(first, MISS)) == "admitted"
        denied = await fixture.ledger.settle(second, MISS)
        assert isinstance(denied, Denied)
        assert (denied.problem.status, denied.problem.members["violated-policies"]) == (402, ["credits-month"])
        assert word(await fixture.ledger.charge(limited, Charge(Outcome.HIT, 2 * CREDIT, "Flux"))) == "admitted"

    run_scenario(any_store_url, scenario)
    assert used(server) == (2, 6 * CREDIT)
    assert rows(server)["-:quota-exceeded:refused"] == 2


@pytest.mark.usefixtures("server")
def test_a_team_without_credits_is_refused_before_the_upstream_call(any_store_url: str) -> None:
    limited = terms(quota(4 * CREDIT, "estimated_credits"))

    async def scenario(fixture: LedgerFixture) -> None:
        admitted = await fixture.admitted(limited)
        assert word(await fixture.ledger.charge(limited, HIT)) == "admitted"
        assert word(await fixture.ledger.settle(admitted, Charge(Outcome.MISS, 0, "Flux"))) == "admitted", (
            "the request was counted"
        )
        for free in (Charge(Outcome.HIT, 0, "Flux"), Charge(Outcome.HIT)):
            assert word(await fixture.ledger.charge(limited, free)) == "quota-exceeded"
        assert word(await fixture.ledger.admit(limited)) == "quota-exceeded"
        assert word(await fixture.ledger.peek(limited, None)) == "quota-exceeded"

    run_scenario(any_store_url, scenario)


def test_a_rate_refuses_before_any_quota(any_store_url: str, server: redis.Redis) -> None:
    limited = terms(quota(0), rate=Rate(0.001, 2))
    fast = terms(rate=Rate(0.001, 2))

    async def scenario(fixture: LedgerFixture) -> None:
        assert [word(await fixture.ledger.charge(limited, HIT)) for _ in range(3)] == ["quota-exceeded"] * 3
        assert [word(await fixture.ledger.charge(fast, HIT)) for _ in range(3)] == [
            "admitted",
            "admitted",
            "rate-limited",
        ]
        denied = await fixture.ledger.admit(limited)
        assert isinstance(denied, Denied)
        assert (denied.problem.code, denied.problem.status) == (Code.RATE_LIMITED, 429)
        assert denied.problem.retry_after_s is not None
        assert 990 < denied.problem.retry_after_s <= 1000

    run_scenario(any_store_url, scenario)
    assert rows(server)["-:rate-limited:refused"] == 2
    assert used(server) == (2, 8 * CREDIT)


def test_a_warning_quota_admits_and_counts(any_store_url: str, server: redis.Redis) -> None:
    warned = terms(Quota("team", "requests", "day", 1, refuse=False))
    name, labels = "estimate_proxy_quota_warned_total", {"team": "design", "measure": "requests", "per": "day"}

    async def scenario(fixture: LedgerFixture) -> None:
        await fixture.ledger.charge(warned, HIT)
        assert not fixture.metrics.registry.get_sample_value(name, labels)
        admission = await fixture.ledger.charge(warned, HIT)
        assert isinstance(admission, Admitted)
        assert admission.quota_state is not None
        assert admission.quota_state.warnings() == warned.quotas
        admitted = await fixture.admitted(warned)
        assert fixture.metrics.registry.get_sample_value(name, labels) == 1
        await fixture.ledger.settle(admitted, MISS)
        assert fixture.metrics.registry.get_sample_value(name, labels) == 2

    run_scenario(any_store_url, scenario)
    assert used(server)[0] == 3


def test_many_gateways_together_exceed_no_quota(any_store_url: str, server: redis.Redis) -> None:
    """The amounts do not divide the limit, and three teams share the organisation's quota."""
    limit = quota(100 * CREDIT, "estimated_credits", scope="org")

    async def gateway(number: int) -> list[str]:
        async with opened(any_store_url) as fixture:
            team = terms(limit, team=f"team-{number % 3}")
            charge = Charge(Outcome.HIT, 3 * CREDIT, "Flux")
            return list(map(word, await asyncio.gather(*(fixture.ledger.charge(team, charge) for _ in range(100)))))

    async def scenario() -> Counter[str]:
        return Counter(word for words in await asyncio.gather(*map(gateway, range(4))) for word in words)

    assert asyncio.run(scenario()) == {"admitted": 33, "quota-exceeded": 367}
    assert used(server, None) == (33, 99 * CREDIT)


# --- Amounts and names -----------------------------------------------------------------------------------------------


def test_amounts_stay_exact_from_the_lowest_to_the_highest(any_store_url: str, server: redis.Redis) -> None:
    """In one batch, and in counters above 2**53, where Lua's numbers are not exact any more."""
    amounts = [DEAREST - 1, 1] * 20

    async def scenario(fixture: LedgerFixture) -> None:
        limited = terms(quota(DEAREST + 1, "estimated_credits"), team="film")
        for micro, expected in ((DEAREST, "admitted"), (2, "quota-exceeded"), (1, "admitted"), (1, "quota-exceeded")):
            assert word(await fixture.ledger.charge(limited, Charge(Outcome.HIT, micro, "Flux"))) == expected
        for name in ("first", "second"):
            await fixture.batcher.book(largest_flush(name, fixture.batcher.counters(PLAIN), HIT))
            await asyncio.gather(
                *(fixture.ledger.charge(PLAIN, Charge(Outcome.HIT, micro, "Flux")) for micro in amounts)
            )
        assert isinstance(await fixture.ledger.charge(PLAIN, Charge(Outcome.HIT, 1, "Flux")), Admitted)

    run_scenario(any_store_url, scenario)
    total = 2 * MAX_BATCH_ENTRIES * MAX_ENTRY_MICRO + 40 * DEAREST + 1
    assert used(server) == (83, total)
    assert int(float(total)) != total, "the total has no exact Lua number"
    assert used(server, None) == (85, total + DEAREST + 1)


async def charged_as(fixture: LedgerFixture, limits: TeamLimits, *models: str) -> list[str]:
    """Charges each model in one batch, and returns the names under which they were counted."""
    asked = (fixture.ledger.charge(limits, Charge(Outcome.HIT, CREDIT, model)) for model in models)
    return [admission.model for admission in await asyncio.gather(*asked) if isinstance(admission, Admitted)]


def test_the_first_models_have_their_own_names_at_most_half_from_one_team(
    any_store_url: str, server: redis.Redis
) -> None:
    half, film = MAX_MODELS // 2, terms(team="film")
    names = [f"Model {number}" for number in range(MAX_MODELS + 10)]

    async def first(fixture: LedgerFixture) -> None:
        reserved = ["mixed", "-", "other"]
        assert await charged_as(fixture, PLAIN, *names[:10], *reserved, names[0]) == [*names[:10], *reserved, names[0]]
        own = [*names[:half], *["other"] * (len(names) - half)]
        assert await charged_as(fixture, PLAIN, *names) == own, "also within one batch"

    async def second(fixture: LedgerFixture) -> None:
        assert await charged_as(fixture, PLAIN, names[0], names[-1], "mixed") == [names[0], "other", "mixed"]
        assert await charged_as(fixture, film, *names) == [*names[:MAX_MODELS], *["other"] * 10]
        assert await charged_as(fixture, PLAIN, names[half], names[-1]) == [names[half], "other"], "each team uses all"
        assert await charged_as(fixture, terms(team="marketing"), "new") == ["other"], "there is no place left"

    run_scenario(any_store_url, first)
    run_scenario(any_store_url, second)
    assert server.smembers(KEYS.models) == {name.encode() for name in names[:MAX_MODELS]}
    named = {field.partition(":")[0]: amount for field, amount in rows(server).items() if field.endswith("requests")}
    assert len(named) == half + 1 + 3
    assert named["other"] == 1 + len(names) - half + 1 + 1


def test_a_new_model_replaces_one_unused_for_30_days(any_store_url: str, server: redis.Redis) -> None:
    half, film = MAX_MODELS // 2, terms(team="film")
    old, new = [f"old {number}" for number in range(MAX_MODELS)], [f"new {number}" for number in range(4)]
    today = int(server.time()[0]) // 86_400

    def unused_for(days: int, *names: str) -> None:
        for name in names:
            team = server.hget(KEYS.model_uses, name).decode().partition(":")[2]  # type: ignore[union-attr] # it is there
            server.hset(KEYS.model_uses, name, f"{today - days}:{team}")

    def a_day_passes() -> None:
        for team in ("design", "film"):
            server.hset(KEYS.model_uses, f":{team}", f"{today - 1}:")

    async def scenario(fixture: LedgerFixture) -> None:
        await charged_as(fixture, PLAIN, *old[:half])
        await charged_as(fixture, film, *old[half:])
        unused_for(30, *old)
        assert await charged_as(fixture, PLAIN, new[0]) == ["other"]
        unused_for(31, *old[:3])
        assert await charged_as(fixture, PLAIN, new[0]) == ["other"], "places are counted again on the next day"
        a_day_passes()
        assert await charged_as(fixture, film, old[0]) == [old[0]], "nobody has taken its place"
        assert await charged_as(fixture, film, new[0]) == ["other"], "the team has its half"
        assert await charged_as(fixture, PLAIN, *new) == [new[0], new[1], "other", "other"]
        assert await charged_as(fixture, PLAIN, old[0], old[1], old[3], new[0]) == [old[0], "other", old[3], new[0]]

    run_scenario(any_store_url, scenario)
    kept = {old[0], *old[3:], *new[:2]}
    assert server.smembers(KEYS.models) == {name.encode() for name in kept}
    uses: Any = server.hgetall(KEYS.model_uses)
    assert {name for name in uses if not name.startswith(b":")} == {name.encode() for name in kept}
    assert uses[old[0].encode()] == uses[old[3].encode()] == b"%d:design" % today
    assert uses[old[4].encode()] == b"%d:design" % (today - 30)


def test_models_of_an_older_version_keep_their_names(any_store_url: str, server: redis.Redis) -> None:
    """An older version only stored their names."""
    server.sadd(KEYS.models, *(f"old {number}" for number in range(MAX_MODELS)))

    async def scenario(fixture: LedgerFixture) -> None:
        assert await charged_as(fixture, PLAIN, "old 1", "new") == ["old 1", "other"]

    run_scenario(any_store_url, scenario)
    today = int(server.time()[0]) // 86_400
    uses: Any = server.hgetall(KEYS.model_uses)
    assert (uses[b"old 1"], uses[b"old 2"]) == (b"%d:" % today, b"%d:" % today)
    assert server.scard(KEYS.models) == MAX_MODELS
