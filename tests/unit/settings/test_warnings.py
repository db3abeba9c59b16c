"""Warnings about settings that are valid but probably unintended."""

from datetime import date

import pytest

from configs import ACCOUNT, DIGEST, MINIMAL, OTHER_DIGEST, Read
from proxy.settings.warnings import warnings

TODAY = date(2026, 11, 30)
READABLE = "[metrics]\npublic = true\n"


def warned(read: Read, text: str) -> list[str]:
    return list(warnings(read(f"{text}\n{READABLE}"), TODAY))


def team(*tokens: str) -> str:
    return f"{ACCOUNT}[teams.design]\ntokens = [{', '.join(tokens)}]"


def token(expires: str, label: str = "", digest: str = DIGEST) -> str:
    return f'{{ sha256 = "{digest}", label = "{label}", expires = {expires} }}'


def test_a_usual_config_has_no_warning(read: Read) -> None:
    assert warned(read, MINIMAL) == []


def test_a_timeout_above_the_deadline_of_requests(read: Read) -> None:
    (line,) = warned(read, MINIMAL + "[upstream]\ntimeout_s = 20")
    assert line.startswith("upstream.timeout_s (20) is above server.request_timeout_s (15), which ends a request first")
    assert warned(read, MINIMAL + "[upstream]\ntimeout_s = 15") == []


@pytest.mark.parametrize(
    ("day", "lines"),
    [
        ("2026-11-29", ["every token of teams.design has expired, the last one on 2026-11-29: `estimate-proxy token"]),
        ("2026-11-30", ["the token 'ci' of teams.design works until 2026-11-30, for 0 days after today"]),
        ("2026-12-01", ["the token 'ci' of teams.design works until 2026-12-01, for 1 day after today"]),
        ("2026-12-14", ["the token 'ci' of teams.design works until 2026-12-14, for 14 days after today"]),
        ("2026-12-15", []),
    ],
)
def test_a_token_that_has_expired_or_will_expire_soon(read: Read, day: str, lines: list[str]) -> None:
    found = warned(read, team(token(day, "ci")))
    assert len(found) == len(lines)
    assert all(map(str.startswith, found, lines))


def test_a_replaced_token_is_not_warned_of(read: Read) -> None:
    newer = token("2027-11-30", "ci", OTHER_DIGEST)
    assert warned(read, team(token("2026-12-01", "ci"), newer)) == []
    assert warned(read, team(token("2026-11-01", "old"), newer)) == [], "expired, and another one works"
    assert len(warned(read, team(token("2026-12-01", "laptop"), newer))) == 1
    assert warned(read, team(token("2026-11-01"), f'"{OTHER_DIGEST}"')) == [], "one that never expires"


def test_a_token_without_a_label_is_named_by_its_digest(read: Read) -> None:
    (line,) = warned(read, team(token("2026-12-01")))
    assert line.startswith("the token 'sha256:aaaaaaaa' of teams.design")


@pytest.mark.parametrize("section", ["teams.design", "team_defaults"])
@pytest.mark.parametrize(("own", "on_exceed", "lines"), [(2001, "refuse", 1), (2000, "refuse", 0), (2001, "warn", 0)])
def test_a_quota_above_the_organisations(read: Read, section: str, own: int, on_exceed: str, lines: int) -> None:
    quota = 'measure = "requests"\nper = "day"\nlimit = '
    found = warned(
        read,
        f'{MINIMAL}[[org.quotas]]\n{quota}2000\non_exceed = "{on_exceed}"\n[[{section}.quotas]]\n{quota}{own}\n'
        f'[[{section}.quotas]]\nmeasure = "requests"\nper = "week"\nlimit = 9000',
    )
    line = f"{section}.quotas[0] allows 2001 requests per day, more than the organisation's quota (2000), which "
    assert found == [f"{line}refuses first"] * lines


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("seed", None),
        ("prompt.negative", None),
        ("loras.0.weight", "can never match: a path has names"),
        ("[0].seed", "can never match: a path has names"),
        ("items[0]", "can never match: a path has names"),
        ("$.seed", "can never match: a path has names"),
        ("*.seed", "can never match: a path has names"),
        ("/seed", "can never match: a path has names"),
        (" seed", "can never match: a path has names"),
        ("whole.part.deep", "can never match: all of 'whole' is ignored"),
    ],
)
def test_a_path_that_can_never_match(read: Read, path: str, reason: str | None) -> None:
    found = warned(read, MINIMAL + f"[cache]\nignore = ['{path}', 'whole']")
    assert [line.startswith(f"cache.ignore: {path!r} {reason}") for line in found] == [True] * (reason is not None)


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("steps", None),
        ("loras.0.weight", None),
        ("0.seed", "a path has names of members"),
        ("loras[0].weight", "a path has names of members"),
        ("loras.*.weight", "a path has names of members"),
        ("$.seed", "a path has names of members"),
        ("seed", "cache.ignore leaves out 'seed'"),
        ("seed.low", "cache.ignore leaves out 'seed'"),
    ],
)
def test_a_member_that_always_counts_and_can_never_match(read: Read, path: str, reason: str | None) -> None:
    found = warned(read, MINIMAL + f"[cache]\nignore = ['seed']\nnever_learn = ['{path}']")
    expected = f"cache.never_learn: {path!r} can never match: {reason}"
    assert [line.startswith(expected) for line in found] == [True] * (reason is not None)
