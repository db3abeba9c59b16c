"""Tokens: their form, the typing errors it detects, and finding a token's team."""

from datetime import date, timedelta
from hashlib import sha256
from zlib import crc32
from zoneinfo import ZoneInfo

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from proxy.auth import (
    BASE62,
    Access,
    Credential,
    RoleDigests,
    Team,
    Teams,
    digest_of,
    is_well_formed,
    token_id_of,
    token_of,
)
from proxy.problems import Code, Problem
from proxy.quota.quotas import Rate, TeamLimits

RANDOM = "7Hc0pVdYxq2NfRk9LsWbTzA4mEuJg3Go"
TOKEN = "ep_7Hc0pVdYxq2NfRk9LsWbTzA4mEuJg3Go1Qxk6C"
LIMITS = TeamLimits("design", Rate(50, 100), ())
DESIGN = Team("design", "default", disabled=False, limits=LIMITS)
LAST_DAY = date(2027, 6, 30)

randoms = st.text(BASE62, min_size=32, max_size=32)


def test_the_form_of_tokens_has_not_changed() -> None:
    """Tokens are in use: neither their form nor their digest may change."""
    assert token_of(RANDOM) == TOKEN
    assert is_well_formed(TOKEN)
    assert digest_of(TOKEN) == "sha256:fccd6cef201bd4b47ebf3125e9e5be5c877bcb2a0126d576b93754834c5f7500"


@given(randoms)
@example("0" * 32)
def test_the_last_six_characters_are_the_crc_of_the_others(random: str) -> None:
    token = token_of(random)
    assert is_well_formed(token)
    assert token[:-6] == "ep_" + random
    assert sum(BASE62.index(digit) * 62**place for place, digit in enumerate(token[:-7:-1])) == crc32(
        token[:-6].encode()
    )


@given(randoms)
def test_a_digest_is_that_of_the_whole_token(random: str) -> None:
    token = token_of(random)
    assert digest_of(token) == "sha256:" + sha256(token.encode("ascii")).hexdigest()


@given(randoms, st.integers(0, 40), st.sampled_from(BASE62) | st.characters(codec="utf-8"))
def test_one_wrong_character_is_always_refused(random: str, at: int, wrong: str) -> None:
    token = token_of(random)
    assume(token[at] != wrong)
    assert not is_well_formed(token[:at] + wrong + token[at + 1 :])


@given(randoms, st.integers(0, 39))
def test_two_neighbours_swapped_are_always_refused(random: str, at: int) -> None:
    token = token_of(random)
    assume(token[at] != token[at + 1])
    assert not is_well_formed(token[:at] + token[at + 1] + token[at] + token[at + 2 :])


@given(randoms, st.integers(0, 40))
def test_a_character_too_few_or_too_many_is_refused(random: str, at: int) -> None:
    token = token_of(random)
    assert not is_well_formed(token[:at] + token[at + 1 :])
    assert not is_well_formed(token[:at] + "0" + token[at:])


MISSHAPEN = {
    "empty": "",
    "prefix alone": "ep_",
    "no frame": RANDOM,
    "no prefix": TOKEN[3:],
    "capitals": "EP_" + TOKEN[3:],
    "line feed": TOKEN + "\n",
    "space": " " + TOKEN,
    "twice": TOKEN + TOKEN,
    "digest": digest_of(TOKEN),
    "31 characters": token_of(RANDOM[:-1]),
    "33 characters": token_of(RANDOM + "0"),
    "dash": token_of(RANDOM[:-1] + "-"),
    "beyond ASCII": token_of(RANDOM[:-1] + "é"),
    "other digits": token_of(RANDOM[:-1] + "\u0661"),
    "surrogate": "ep_" + "\ud800" * 38,
}


@pytest.mark.parametrize("token", MISSHAPEN.values(), ids=MISSHAPEN)
def test_a_token_of_another_form_is_refused(token: str) -> None:
    assert not is_well_formed(token)
    digest = sha256(token.encode(errors="surrogatepass")).hexdigest()
    teams = Teams({name: Credential(DESIGN, None) for name in (f"sha256:{digest}", digest, token)})
    assert teams.find(token) is None


def test_each_token_finds_its_team_and_no_other() -> None:
    other = Team("other", "second", disabled=True, limits=LIMITS)
    first, second, third, stranger = (token_of(letter * 32) for letter in "abcd")
    teams = Teams(
        {
            digest_of(first): Credential(DESIGN, None),
            digest_of(second): Credential(DESIGN, LAST_DAY),
            digest_of(third): Credential(other, None),
        }
    )
    for _ in range(2):
        found = [teams.find(token) for token in (first, second, third, stranger)]
        assert [one and one.team for one in found] == [DESIGN, DESIGN, other, None]


@given(st.dates())
def test_a_token_without_expiry_works_on_any_day(today: date) -> None:
    assert Credential(DESIGN, None).works_on(today)


@given(st.dates(), st.integers(-3, 3))
def test_a_token_works_on_its_last_day_and_not_after_it(today: date, days: int) -> None:
    assume(date.min + timedelta(3) <= today <= date.max - timedelta(3))
    last_day = today + timedelta(days)
    assert Credential(DESIGN, last_day).works_on(today) == (days >= 0)


def test_access_finds_the_credential_with_its_label_and_says_when_it_has_expired() -> None:
    current, expired, unlabelled, admin, stranger, scraper, viewer = (token_of(letter * 32) for letter in "abcdefg")
    kept = Credential(DESIGN, date.max, "ci", token_id_of(digest_of(current)))
    teams = Teams(
        {
            digest_of(current): kept,
            digest_of(expired): Credential(DESIGN, date(2020, 2, 29), "old laptop"),
            digest_of(unlabelled): Credential(DESIGN, date(2020, 2, 29)),
            digest_of(admin): Credential(DESIGN, date(2020, 2, 29)),
        }
    )
    used: list[str] = []
    access = Access(
        teams,
        ZoneInfo("UTC"),
        RoleDigests((digest_of(admin),), (digest_of(viewer),), (digest_of(scraper),)),
        metrics_are_public=False,
        record_use=used.append,
    )

    def refusal(token: str | None) -> Problem:
        found = access.credential(token)
        assert isinstance(found, Problem)
        return found

    assert access.credential(current) is kept
    assert (kept.team, kept.label) == (DESIGN, "ci")
    for token in (expired, unlabelled):
        assert refusal(token).code is Code.UNKNOWN_TOKEN
        assert refusal(token).detail.startswith("The token has expired: 2020-02-29 was ")
    assert "'old laptop'" in refusal(expired).detail
    assert "label" not in refusal(unlabelled).detail
    for token, kind in ((admin, "an admin"), (viewer, "a viewer"), (scraper, "a metrics")):
        found = refusal(token)
        assert found.code is Code.FORBIDDEN
        assert found.detail == f"This needs a team's token; you sent {kind} token."
    assert refusal(stranger).detail.startswith("The token is unknown or mistyped: ")
    assert refusal(None).detail.startswith("The request has no token: ")
    assert used == [token_id_of(digest_of(token)) for token in (current, admin, viewer, scraper)], (
        "not of expired or unknown tokens"
    )
    assert [access.may_scrape(token) for token in (scraper, admin, current, None)] == [True, True, False, False]
    assert access.is_viewer(viewer)
    assert used[4:] == [token_id_of(digest_of(token)) for token in (scraper, admin, viewer)]


def test_an_id_is_the_beginning_of_the_digest() -> None:
    """Ids are in stores: they may not change."""
    assert token_id_of(digest_of(TOKEN)) == "fccd6cef201bd4b4"
