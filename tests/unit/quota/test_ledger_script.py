"""The interface of the ledger's script: the order of keys and arguments, the reply, and why sums are exact."""

from datetime import date
from zoneinfo import ZoneInfo

import pytest

from proxy.problems import Outcome
from proxy.quota.counters import LedgerKeys, org_counters, split_usage_field, team_counters
from proxy.quota.credits import MICRO
from proxy.quota.ledger_script import (
    FLUSH_MARKER_TTL_S,
    MAX_BATCH_ENTRIES,
    MAX_ENTRY_MICRO,
    LedgerReply,
    ScriptArgs,
    Verdict,
    read_reply,
)
from proxy.quota.model_names import MAX_MODELS
from proxy.quota.quotas import Charge, Quota, Rate, TeamLimits
from proxy.upstream.replies import MAX_ESTIMATE

UTC = ZoneInfo("UTC")
KEYS = LedgerKeys("acme")
NOON = 1_795_262_400 + 12 * 3600
PER_HOUR = Quota("team", "requests", "hour", 5, refuse=True)
PER_DAY = Quota("org", "estimated_credits", "day", 8, refuse=False)
LIMITS = TeamLimits("design", Rate(50, 100), (PER_HOUR, PER_DAY))
ORG = org_counters(KEYS, LIMITS.org_quotas, NOON, UTC)
TEAM = team_counters(KEYS, LIMITS, ORG, NOON, UTC)
LATER = team_counters(KEYS, LIMITS, ORG, NOON + 3600, UTC)
HIT = Charge(Outcome.HIT, 4_000_000, "Flux")


def test_the_sums_of_one_call_are_exact_in_lua() -> None:
    assert MAX_BATCH_ENTRIES * MAX_ENTRY_MICRO < 2**53
    assert MAX_ESTIMATE * MICRO <= MAX_ENTRY_MICRO, "one estimate of the highest price fits into an entry"


def test_keys_and_arguments_are_in_the_order_that_the_script_documents() -> None:
    script_args = ScriptArgs(KEYS)
    script_args.add("charge", HIT, TEAM, requests=3)
    script_args.add("settle", Charge(Outcome.MISS, 5, "Flux", upstream_us=7), TEAM, admitted_on=LATER)
    assert TEAM.team is not None
    assert LATER.team is not None
    assert script_args.keys == [
        KEYS.id,
        KEYS.models,
        KEYS.teams,
        KEYS.id,
        KEYS.model_uses,
        KEYS.upstream(date(2026, 11, 22)),
        *ORG.expires_ms,
        TEAM.team.usage.key,
        TEAM.team.rate_key,
        *TEAM.expires_ms,
        LATER.team.usage.key,
        LATER.team.rate_key,
        *LATER.expires_ms,
    ]
    team = (TEAM.team.usage.expires_ms, "design", 20_000, 2_000_000, 4)
    assert script_args.args("7f") == (
        *(NOON * 10**6, (NOON + 3600) * 10**6, "7f", MAX_MODELS, FLUSH_MARKER_TTL_S * 1000, 3, 2),
        *(0, ORG.upstream.expires_ms, "", 0, 0, 3, *ORG.expires_ms.values(), 1, 1, "credits", 8, 0),
        *(1, *team, *TEAM.expires_ms.values(), 1, 1, "requests", 5, 1),
        *(1, *team, *LATER.expires_ms.values(), 1, 1, "requests", 5, 1),
        *("charge", 2, 3, 4_000_000, "Flux", "hit", 2, ""),
        *("settle", 2, 1, 5, "Flux", "miss", 3, 7),
    )


def test_a_flush_has_a_marker_and_no_windows() -> None:
    script_args = ScriptArgs(KEYS, flush="9a")
    script_args.add("apply", HIT, TEAM, requests=2)
    assert script_args.keys[3] == KEYS.flush("9a")
    assert script_args.args("7f")[:2] == (0, 2**53 // 10**6 * 10**6)
    assert script_args.args("7f")[-8:] == ("apply", 2, 2, 4_000_000, "Flux", "hit", 2, "")


def test_a_full_reply_is_read() -> None:
    script_args = ScriptArgs(KEYS)
    script_args.add("charge", HIT, TEAM)
    script_args.add("admit", Charge(Outcome.CANCELLED), TEAM)
    verdicts = [[b"ok", 1, b"Flux"], [b"1,2", 0, b"-", [7, 5, 8]]]
    reply = read_reply([NOON, b"7f", b"1000", 1, verdicts, [[], [9, 5, 8]]])
    admitted, refused = Verdict(b"ok", 1, b"Flux"), Verdict(b"1,2", 0, b"-", [7, 5, 8])
    assert (reply.now_us, reply.ledger_id, reply.created_ms) == (NOON, b"7f", 1000)
    assert reply.in_windows
    assert reply.is_new
    assert reply.verdicts == [admitted, refused]
    assert script_args.state_of(TEAM, reply) == [9, 5, 8]
    assert refused.violated(LIMITS.quotas) == (PER_HOUR, PER_DAY)
    assert not refused.is_rate_limited
    assert Verdict(b"rate", 0, b"-").is_rate_limited


@pytest.mark.parametrize(("raw", "in_windows"), [([NOON], False), ([NOON, b""], True)])
def test_a_reply_of_a_call_that_wrote_nothing_has_only_the_time(raw: list[object], *, in_windows: bool) -> None:
    assert read_reply(raw) == LedgerReply(NOON, in_windows=in_windows)


def test_a_usage_field_has_three_parts() -> None:
    assert split_usage_field(b"Flux dev.1:hit:credits") == ("Flux dev.1", "hit", "credits")
