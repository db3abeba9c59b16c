"""The origin of a value: a line, a variable or a file."""

from pathlib import Path

import pytest

from configs import ENV, MINIMAL, Problems
from proxy.settings.loader import load_with_origins
from proxy.settings.origins import Origin, line_of

DOCUMENT = '''\
# api_key = "no"
[server]
host = """
api_key = 'no'
"""
[accounts.default]
api_key = "yes"
[accounts]
b = { api_key = "inline" }
c.api_key = "dotted"
d = { api_key = """
over
lines""" }
'''


@pytest.mark.parametrize(("account", "line"), [("default", 7), ("b", 9), ("c", 10), ("d", None), ("missing", None)])
def test_the_line_of_a_key(account: str, line: int | None) -> None:
    assert line_of(DOCUMENT, ("accounts", account, "api_key")) == line


def test_every_kind_of_line_ending_is_counted() -> None:
    assert line_of("[a]\r\n# \u2028 x\r\nb = 1\r\n", ("a", "b")) == 3


def test_the_last_source_of_a_value_counts(tmp_path: Path) -> None:
    config = tmp_path / "config.toml"
    config.write_text(MINIMAL + "[server]\nport = 1\nworkers = 2\n[store]\npassword_file = 'pw'\n")
    (tmp_path / "pw").write_text("p")
    environ = {"HOME": "/", "RENDERNET_API_KEY": "k", f"{ENV}SERVER__PORT": "2", f"{ENV}TEAMS__B": '{"name": "B"}'}
    _, origins = load_with_origins(config, environ, overrides={"server": {"workers": 3}})
    assert origins["accounts", "default", "api_key"].variable == "RENDERNET_API_KEY"
    assert origins["server", "port"].variable == f"{ENV}SERVER__PORT"
    assert origins["teams", "b", "name"].variable == f"{ENV}TEAMS__B"
    assert origins["store", "password"] == Origin(("store", "password_file"), None, tmp_path / "pw")
    assert origins["teams", "design", "tokens"] == Origin(("teams", "design", "tokens"), None)
    assert ("server", "workers") not in origins, "an option of the command line"
    assert ("server", "host") not in origins, "a default"


def test_a_problem_names_the_variable(problems_of: Problems) -> None:
    found = problems_of(
        MINIMAL + "[cache]\nttl_s = 0",
        {f"{ENV}SERVER__PORT": "x", f"{ENV}SERVR__PORT": "1", f"{ENV}TEAMS__A__TOKENS": '["x"]'},
    )
    assert found == {
        "cache.ttl_s": "must be greater than or equal to 1",
        "server.port": f"must be a whole number (set by the variable {ENV}SERVER__PORT)",
        "servr": f"is not a setting: did you mean server? (set by the variable {ENV}SERVR__PORT)",
        "teams.a.tokens[0].sha256": "must be sha256: and 64 hexadecimal digits, as `estimate-proxy token new` prints "
        f"it (set by the variable {ENV}TEAMS__A__TOKENS)",
    }
