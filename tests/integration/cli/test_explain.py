"""`explain`: canonical bodies and their keys."""

import re
from pathlib import Path

import pytest
from click.testing import Result

from command_line import BODY, CANARY, Run, refusal
from proxy.cache.canonical import canonicalise, key_of


def explained(result: Result) -> tuple[bytes, str]:
    assert (result.exit_code, result.stderr) == (0, "")
    found = re.fullmatch(rb"body  (.+)\nkey   ([0-9a-f]{64})\n", result.stdout_bytes)
    assert found is not None
    return found[1], found[2].decode()


def test_explain_prints_the_canonical_body_and_its_key(run: Run) -> None:
    Path("body.json").write_bytes(BODY)
    canonical, key = explained(run("explain", "body.json"))
    assert canonical == canonicalise(BODY) == '[{"a":"é","b":7}]'.encode()
    assert key == key_of(
        canonical,
        origin="https://api.rendernet.ai",
        account="default",
        path="/pub/v1/generations/estimate",
        query="",
    )
    assert explained(run("explain", "-", stdin=BODY)) == (canonical, key)


@pytest.mark.parametrize(
    "spelling", ['[{"a":"é","b":7}]', '\n[ {"b":70e-1,"a":"\\u00E9"} ]\r\n', '[{"a":1,"b":7,"a":"é"}]']
)
def test_every_spelling_has_one_key(run: Run, spelling: str) -> None:
    assert explained(run("explain", "-", stdin=spelling.encode())) == explained(run("explain", "-", stdin=BODY))


def test_changes_that_give_another_key(run: Run) -> None:
    Path("other.toml").write_text("[upstream]\nbase_url = 'https://other.example/base'\n")
    options: list[list[str]] = [
        [],
        ["--account", "second"],
        ["--query", "type=image"],
        ["--query", "type=é"],
        ["--config", "other.toml"],
    ]
    keys = [explained(run("explain", "-", *chosen, stdin=BODY))[1] for chosen in options]
    assert len(set(keys)) == len(keys)
    canonical = canonicalise(BODY)
    origin, path = "https://api.rendernet.ai", "/pub/v1/generations/estimate"
    assert keys[1] == key_of(canonical, origin=origin, account="second", path=path, query="")
    assert keys[3] == key_of(canonical, origin=origin, account="default", path=path, query="type=%C3%A9")
    other = {"origin": "https://other.example", "path": "/base/pub/v1/generations/estimate"}
    assert keys[4] == key_of(canonical, account="default", query="", **other)
    in_environment = run("explain", "-", stdin=BODY, ESTIMATE_PROXY_UPSTREAM__BASE_URL="https://other.example/base/")
    assert explained(in_environment)[1] == keys[4], "a trailing slash makes no difference"


def test_explain_needs_no_key_and_no_team(run: Run) -> None:
    Path("estimate-proxy.toml").write_text("[teams.X]\nwhat = 1\n[accounts.default]\napi_key_file = 'missing'\n")
    assert explained(run("explain", "-", stdin=BODY))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "is empty"),
        (b"{", "not valid JSON"),
        (b"[]", "must be a JSON array"),
        (b'{"a": 1}', "must be a JSON array"),
        (b"[NaN]", "not valid JSON"),
        (b"[{}\n\xff]", "not valid JSON"),
        (b"[{}]\n[{}]", "not valid JSON"),
        (b'[{"a": 99999999999999999999}]', "beyond 64 bits"),
        (b'[{"a":' + b"[" * 40 + b"]" * 40 + b"}]", "deeper than 32"),
    ],
)
def test_a_bad_body_is_one_line_that_names_the_file(run: Run, content: bytes, reason: str) -> None:
    Path("bödy.json").write_bytes(content)
    line = refusal(run("explain", "bödy.json"))
    assert line.startswith("bödy.json: ")
    assert reason in line


def test_explain_of_an_unreadable_file_is_one_line(run: Run, tmp_path: Path) -> None:
    assert "'missing.json': No such file or directory" in refusal(run("explain", "missing.json"))
    assert f"'{tmp_path}': Is a directory" in refusal(run("explain", str(tmp_path)))
    assert refusal(run("explain", "-", "--config", "missing.toml", stdin=BODY)).startswith(
        "missing.toml cannot be read"
    )
    assert refusal(run("explain", "-", "--account", "A", stdin=BODY)).startswith("--account must be an id")
    broken = run("explain", "-", stdin=BODY, ESTIMATE_PROXY_UPSTREAM__BASE_URL=f"http://u:{CANARY}@h")
    assert refusal(broken) == (
        "upstream.base_url has a user, a query or a fragment: remove it "
        "(set by the variable ESTIMATE_PROXY_UPSTREAM__BASE_URL)"
    )
