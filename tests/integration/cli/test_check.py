"""`check`: the settings, where they come from, and what is wrong with them."""

import re
import tomllib
from pathlib import Path

import pytest

from command_line import CANARY, CONFIG, DIGEST, Run, on_terminal, refusal
from proxy.settings.masking import MASK

SECRETS = f"""
{CONFIG}
[teams.other]
name = "[red]x [/x] :smile: \\" é"
tokens = [{{ sha256 = "sha256:{"b" * 64}", label = "ci", expires = 2027-06-30 }}]
[store]
url = "redis://u:{CANARY}@h/0"
password = "{CANARY}"
[upstream]
proxy = "http://u:{CANARY}@p:3128"
[metrics]
public = true
[[org.quotas]]
measure = "estimated_credits"
limit = 0.1
per = "week"
"""


def test_check_prints_toml(run: Run) -> None:
    Path("here.toml").write_text(SECRETS)
    result = run("check", "--config", "here.toml")
    assert (result.exit_code, result.stderr) == (0, "")
    assert CANARY not in result.stdout
    shown = tomllib.loads(result.stdout)
    assert shown["server"] == {
        "host": "127.0.0.1",
        "port": 8080,
        "workers": 1,
        "max_body_bytes": 262144,
        "request_timeout_s": 15.0,
        "head_timeout_s": 10.0,
        "drain_delay_s": 5.0,
        "drain_s": 30.0,
        "cors_origins": [],
    }
    written = tomllib.loads(SECRETS)
    assert shown["teams"]["other"] == {
        **written["teams"]["other"],
        "account": "default",
        "disabled": False,
        "infer": True,
        "was": [],
    }
    assert shown["teams"]["design"]["tokens"] == [{"sha256": DIGEST}]
    assert shown["accounts"] == {"default": {"api_key": MASK}}
    assert shown["store"]["url"] == f"redis://u:{MASK}@h/0"
    assert shown["store"]["password"] == MASK
    assert shown["upstream"]["proxy"] == f"http://u:{MASK}@p:3128"
    assert shown["org"]["quotas"] == [
        {"measure": "estimated_credits", "limit": 0.1, "per": "week", "on_exceed": "refuse"}
    ]
    assert result.stdout.startswith("# from here.toml\n")
    assert "# upstream.ca_file is not set\n" in result.stdout


@pytest.mark.parametrize("reader", ["", "[metrics]\npublic = true\n", f'[admin]\ntokens = ["{DIGEST[:-1]}0"]\n'])
def test_check_warns_if_no_token_can_read_the_metrics(run: Run, reader: str) -> None:
    Path("here.toml").write_text(CONFIG + reader)
    result = run("check", "--config", "here.toml")
    assert result.exit_code == 0
    assert ("nobody can read /metrics" in result.stderr) is (not reader)


def test_check_without_a_file_reports_it(run: Run) -> None:
    result = run("check", RENDERNET_API_KEY=CANARY, ESTIMATE_PROXY_TEAMS__A__NAME="A")
    assert result.exit_code == 0
    assert result.stdout.startswith("# from no file: defaults and the environment\n")


def test_the_output_of_check_is_a_valid_config(run: Run) -> None:
    """With the secrets filled in, the output is a config with the same settings, without defaults."""
    Path("a.toml").write_text(CONFIG)
    shown = run("check", "--config", "a.toml").stdout
    Path("b.toml").write_text(shown.replace(MASK, CANARY))
    again = run("check", "--config", "b.toml").stdout
    assert tomllib.loads(again) == tomllib.loads(shown)


def test_check_shows_the_source_of_each_value(run: Run) -> None:
    Path("key").write_text(CANARY)
    Path("here.toml").write_text(
        "[accounts.default]\napi_key_file = 'key'\n[accounts.second]\napi_key_file = 'key'\n"
        f"[store]\nurl = 'redis://:{CANARY}@h'\n[teams.design]\nname = 'D'\n[server]\nport = 9\n"
        f"[upstream]\nproxy = 'http://u:{CANARY}@p'"
    )
    environ = {
        "RENDERNET_API_KEY": CANARY,
        "ESTIMATE_PROXY_SERVER__WORKERS": "2",
        "ESTIMATE_PROXY_STORE__PASSWORD_FILE": "key",
    }
    result = run("check", "--config", "here.toml", **environ)
    assert CANARY not in result.output
    lines = result.stdout.splitlines()
    for line in (
        f'accounts.default.api_key = "{MASK}"  # RENDERNET_API_KEY',
        f'accounts.second.api_key = "{MASK}"  # key, named in here.toml, line 4',
        f'store.url = "redis://:{MASK}@h"  # here.toml, line 6',
        f'store.password = "{MASK}"  # key, named in ESTIMATE_PROXY_STORE__PASSWORD_FILE',
        f'upstream.proxy = "http://u:{MASK}@p"  # here.toml, line 12',
        "server.port = 9",
        "server.workers = 2  # ESTIMATE_PROXY_SERVER__WORKERS",
        'server.host = "127.0.0.1"  # default',
        'teams.design.name = "D"',
        "# teams.design.rate is inherited from team_defaults.rate: { per_s = 50.0, burst = 100 }",
        "# teams.design.quotas is inherited from team_defaults.quotas: []",
        f'# cache.url is inherited from store.url: "redis://:{MASK}@h"',
        "# upstream.ca_file is not set",
    ):
        assert line in lines
    assert tomllib.loads(result.stdout)["server"]["port"] == 9


@pytest.mark.parametrize(
    ("text", "environ", "line"),
    [
        ("upstream.timeout_s = 60", {}, "upstream.timeout_s (60) is above server.request_timeout_s (15)"),
        ("cache.ignore = ['loras.0.weight']", {}, "cache.ignore: 'loras.0.weight' can never match"),
        (
            "",
            {"ESTIMATE_PROXY_TEAMS__DESIGN__TOKENS": f'[{{"sha256": "{DIGEST}", "expires": "2020-01-31"}}]'},
            "every token of teams.design has expired, the last one on 2020-01-31",
        ),
    ],
)
def test_check_warns(run: Run, text: str, environ: dict[str, str], line: str) -> None:
    Path("here.toml").write_text(f"metrics.public = true\n{text}\n{CONFIG}")
    result = run("check", "--config", "here.toml", **environ)
    assert result.exit_code == 0
    assert result.stderr.startswith(f"estimate-proxy: warning: {line}")
    assert result.stderr.count("\n") == 1


def test_check_names_the_variable_or_file_with_the_error(run: Run) -> None:
    Path("here.toml").write_text(CONFIG)
    result = run("check", "--config", "here.toml", ESTIMATE_PROXY_SERVER__PORT="x")
    error = "estimate-proxy: server.port must be a whole number (set by the variable ESTIMATE_PROXY_SERVER__PORT)\n"
    assert (result.exit_code, result.stderr) == (2, error)
    Path("here.toml").write_text(CONFIG.replace("api_key", "api_key_file").replace(CANARY, "/no/such/key"))
    assert refusal(run("check", "--config", "here.toml")) == (
        "accounts.default.api_key_file names /no/such/key, which cannot be read: No such file or directory"
    )


def test_check_reports_all_problems_and_no_value(run: Run) -> None:
    Path("estimate-proxy.toml").write_text(
        f"""
        [server]
        port = "{CANARY}"
        hots = "{CANARY}"
        [accounts.default]
        api_key = "{CANARY} "
        [store]
        url = "redis://{CANARY}:{CANARY}@"
        [teams.design]
        tokens = ["ep_{CANARY}"]
        """
    )
    result = run("check", ESTIMATE_PROXY_CACHE__TTL_S=CANARY)
    assert (result.exit_code, result.stdout) == (2, "")
    assert CANARY not in result.stderr
    assert sorted(line.split()[1] for line in result.stderr.splitlines()) == [
        "accounts.default.api_key",
        "cache.ttl_s",
        "server.hots",
        "server.port",
        "store.url",
        "teams.design.tokens[0].sha256",
    ]
    assert all(line.startswith("estimate-proxy: ") for line in result.stderr.splitlines())


def test_check_names_the_setting_that_replaces_an_option_in_a_stores_url(run: Run) -> None:
    Path("c.toml").write_text(CONFIG)
    result = run("check", "--config", "c.toml", REDIS_URL=f"rediss://:{CANARY}@redis:6379/0?ssl_cert_reqs=none")
    assert result.exit_code == 2
    (line,) = (line for line in result.stderr.splitlines() if "store.url" in line)
    assert "store.url has the option ssl_cert_reqs: certificates are always verified: remove it" in line
    assert "set store.ca_file" in line
    assert CANARY not in result.output


def test_check_on_a_terminal_is_a_table() -> None:
    Path("estimate-proxy.toml").write_text(SECRETS)
    text = on_terminal("check")
    assert CANARY not in text
    assert re.search(r"setting +value", text)
    assert re.search(r"server\.port +8080 ", text)
    assert re.search(r'teams\.other\.name +"\[red\]x \[/x\] :smile: \\" é" ', text), "nothing is parsed as markup"
    assert re.search(r"upstream\.ca_file +- ", text)
    assert re.search(r"server\.host +\S+ +default ", text)
    assert re.search(r"accounts\.default\.api_key +\S+ +estimate-proxy\.toml, line 3 ", text)
    assert re.search(r"teams\.design\.rate +- +inherited from team_defaults\.rate: ", text)
    assert " = 8080" not in text
