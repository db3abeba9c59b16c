"""`token new` and `token list`."""

import tomllib
from datetime import datetime, timedelta
from pathlib import Path

import pytest
import redis

from command_line import CANARY, CONFIG, LEDGER, Run, fields, on_terminal, printed, refusal
from proxy import auth as teams


@pytest.mark.parametrize("team", ["design", "a", "0", "a-b-1", "a" * 64])
def test_a_new_token_is_printed_with_its_line_for_the_config(run: Run, team: str) -> None:
    result = run("token", "new", team)
    assert (result.exit_code, result.stderr) == (0, "")
    token, _, rest = result.stdout.partition("\n")
    assert teams.is_well_formed(token)
    assert result.stdout.count(token) == 1
    table = rest[rest.index("[teams.") :]
    assert tomllib.loads(table) == {"teams": {team: {"tokens": [teams.digest_of(token)]}}}
    Path("pasted.toml").write_text(table)
    assert run("check", "--config", "pasted.toml", RENDERNET_API_KEY="k").exit_code == 0


def test_a_token_with_a_label_and_a_last_day(run: Run) -> None:
    day = datetime.now().date() + timedelta(days=30)  # noqa: DTZ005 -- as the command sees it
    result = run("token", "new", "design", "--label", 'c"i é', "--expires", str(day))
    token, _, rest = result.stdout.partition("\n")
    table = rest[rest.index("[teams.") :]
    (entry,) = tomllib.loads(table)["teams"]["design"]["tokens"]
    assert entry == {"sha256": teams.digest_of(token), "label": 'c"i é', "expires": day}
    Path("pasted.toml").write_text(table)
    assert run("check", "--config", "pasted.toml", RENDERNET_API_KEY="k").exit_code == 0


@pytest.mark.parametrize("role", ["viewer", "metrics", "admin"])
@pytest.mark.parametrize("name", [[], ["grafana", "--label", "x"]])
def test_a_token_that_belongs_to_no_team(run: Run, role: str, name: list[str]) -> None:
    result = run("token", "new", f"--{role}", *name)
    assert (result.exit_code, result.stderr) == (0, "")
    token, _, rest = result.stdout.partition("\n")
    table = rest[rest.index("[") :]
    assert tomllib.loads(table) == {role: {"tokens": [teams.digest_of(token)]}}
    assert ("# grafana, x: if there are tokens" in table) is bool(name)
    Path("pasted.toml").write_text(CONFIG + table)
    assert run("check", "--config", "pasted.toml").exit_code == 0


def test_quiet_prints_only_the_token(run: Run) -> None:
    result = run("token", "new", "design", "--quiet")
    assert teams.is_well_formed(result.stdout.removesuffix("\n"))
    assert f'tokens = ["{teams.digest_of(result.stdout.strip())}"]' in result.stderr
    assert result.stdout.strip() not in result.stderr


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["design", "--expires", "tomorrow"], "--expires must be a date, such as 2027-06-30"),
        (["design", "--expires", "2020-01-31"], "--expires is in the past"),
        (["design", "--label", "a\nb"], "--label must be one line of text without control characters"),
        (["design", "--label="], "--label must be one line"),
        (
            ["--viewer", "--expires", "2999-01-31"],
            "--expires is only for tokens of teams: those of [viewer] work until",
        ),
        (["--viewer", "--admin"], "--viewer and --admin exclude each other: make a token for each"),
    ],
)
def test_an_invalid_token_option_is_refused(run: Run, options: list[str], line: str) -> None:
    assert refusal(run("token", "new", *options)).startswith(line)


@pytest.fixture
def used_tokens(valkey_url: str) -> list[str]:
    """The digests of tokens in the config: of the team `design`, old and new, of an admin, a scraper and a viewer.

    The old one was last used at 10:00 UTC on 29 November 2026, the admin's an hour later.
    """
    digests = [teams.digest_of(teams.token_of(letter * 32)) for letter in "onasv"]
    old, new, admin, scraper, viewer = digests
    Path("estimate-proxy.toml").write_text(
        f"""
[accounts.default]
api_key = "{CANARY}"
[org]
timezone = "Europe/Berlin"
[teams.design]
name = "Design [b]"
tokens = [{{ sha256 = "{old}", label = "[ci]", expires = 2027-06-30 }}, "{new}"]
[admin]
tokens = ["{admin}"]
[metrics]
tokens = ["{scraper}"]
[viewer]
tokens = ["{viewer}"]
[store]
url = "{valkey_url}"
"""
    )
    with redis.Redis.from_url(valkey_url) as client:
        client.flushall()
        for digest, hour_s in ((old, 1_795_946_400), (admin, 1_795_950_000)):
            client.set(LEDGER.token(digest.removeprefix("sha256:")[:16]), hour_s)
    return digests


def test_the_list_of_tokens_when_piped(run: Run, used_tokens: list[str]) -> None:
    old, new, admin, scraper, viewer = (digest[:15] for digest in used_tokens)
    header, *rows = fields(printed(run("token", "list")))
    assert header == ["team", "label", "expires", "last_used", "digest", "team_name"]
    assert rows == [
        ["design", "[ci]", "2027-06-30", "2026-11-29T11:00:00+01:00", old, "Design [b]"],
        ["design", "-", "-", "-", new, "Design [b]"],
        ["-", "metrics", "-", "-", scraper, ""],
        ["-", "viewer", "-", "-", viewer, ""],
        ["-", "admin", "-", "2026-11-29T12:00:00+01:00", admin, ""],
    ]


def test_the_list_of_tokens_on_a_terminal(used_tokens: list[str]) -> None:
    title, header, old, new, *_ = on_terminal("token", "list", columns=80).split("\r\n")
    assert title.rstrip() == "tokens, Europe/Berlin"
    assert header.split() == ["team", "name", "label", "expires", "last", "used", "digest"]
    assert old.split() == ["design", "Design", "[b]", "[ci]", "2027-06-30", "2026-11-29", "11:00", used_tokens[0][:15]]
    assert new.split() == ["design", "Design", "[b]", "-", "-", "-", used_tokens[1][:15]]
    narrow = on_terminal("token", "list", columns=50)
    assert "2026-11-29 11:00" in narrow
    assert "Not shown, for lack of width: name, digest." in narrow


def test_without_tokens_the_list_is_empty_and_says_so(run: Run, valkey_url: str) -> None:
    Path("estimate-proxy.toml").write_text(
        f'[accounts.default]\napi_key = "{CANARY}"\n[teams.design]\n[store]\nurl = "{valkey_url}"\n'
    )
    result = run("token", "list")
    assert (result.exit_code, result.stderr) == (0, "estimate-proxy: no token is configured\n")
    assert len(fields(result.stdout)) == 1


def test_no_two_tokens_are_equal(run: Run) -> None:
    assert len({run("token", "new", "design").stdout for _ in range(20)}) == 20


@pytest.mark.parametrize("team", ["Design", "a_b", "-a", "a-", "a" * 65, "", "é", "a b", "a\n", "a.b", '"', "\udcff"])
def test_a_token_for_an_invalid_team_is_refused(run: Run, team: str) -> None:
    assert refusal(run("token", "new", "--", team)).startswith("TEAM must be an id: 1 to 64 of a-z, 0-9 and -")
