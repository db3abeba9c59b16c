"""The command line, in a few real processes and otherwise in this one."""

import csv
import importlib.metadata
import json
import os
import pty
import re
import ssl
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import BinaryIO

import pytest
import redis
from click.testing import CliRunner, Result

from certificates import make_certificates
from fleet import store_process
from past_usage import put_past_usage
from proxy import __version__
from proxy import auth as teams
from proxy.cache.canonical import canonicalise, key_of
from proxy.cli.commands import main
from proxy.embedded.stores import EmbeddedStores
from proxy.quota.counters import LedgerKeys
from proxy.quota.price_changes import PriceChange
from proxy.quota.usage import LATER_OUTCOMES, OUTCOMES, SAVED_COLUMNS
from proxy.quota.windows import window_of
from proxy.settings import loader
from proxy.settings.schema import MASK
from raw_upstream import raw_upstream
from serving import free_port
from shared_fixtures import debian_redis

CANARY = "CaNaRy5Xq"
DIGEST = "sha256:" + "a" * 64
CONFIG = f'[accounts.default]\napi_key = "{CANARY}"\n[teams.design]\ntokens = ["{DIGEST}"]\n'
PROGRAMS = [str(Path(sys.executable).with_name("estimate-proxy"))], [sys.executable, "-m", "proxy"]
DAY = datetime.now(UTC).date() - timedelta(days=3)
BODY = b'[{"b": 7.0, "a": "\\u00e9"}]'

Run = Callable[..., Result]


@pytest.fixture(autouse=True)
def empty_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith(("ESTIMATE_PROXY_", "RENDERNET_", "REDIS_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(loader, "DEFAULT_PATHS", loader.DEFAULT_PATHS[:1])
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def run() -> Run:
    """Runs a command line in this process, and asserts that no exception is raised."""

    def invoke(*args: str, stdin: bytes = b"", **environ: str) -> Result:
        result = CliRunner(catch_exceptions=False).invoke(
            main, args, input=stdin, env=environ, prog_name="estimate-proxy"
        )
        assert "Traceback" not in result.output
        return result

    return invoke


def refusal(result: Result) -> str:
    """Returns the one line that says why a command line was refused."""
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith("estimate-proxy: ")
    return result.stderr.removeprefix("estimate-proxy: ").rstrip("\n")


def process(*command: str, stdin: bytes = b"", **environ: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(command, input=stdin, capture_output=True, env={**os.environ, **environ}, check=False)


# --- Help and usage ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "mentions"),
    [
        ("", ["check", "demo", "explain", "purge", "quota", "serve", "token", "usage", "--version"]),
        (
            "serve",
            ["--config FILE", "$ESTIMATE_PROXY_CONFIG", "--host HOST", "--port PORT", "server.port", "SIGTERM"],
        ),
        ("demo", ["--port PORT", "[default: 8080", "--no-traffic"]),
        ("check", ["--connect", "--config FILE", "/etc/estimate-proxy/config.toml"]),
        (
            "usage",
            [
                *("--team ID", "--from DAY", "--by NAMES", "[table|csv|json]", "org.timezone", "tab-separated"),
                *("--last-month", "[names|credits|requests|refused]", "[rfc4180|excel-semicolon]"),
            ],
        ),
        ("quota", ["[TEAM]", "--config FILE", "[table|csv|json]", "tab-separated"]),
        ("token", ["list", "new", "last used"]),
        ("token list", ["--config FILE", "last used", "org.timezone", "tab-separated"]),
        (
            "token new",
            ["[TEAM]", "once", "--label TEXT", "--expires DAY", "--viewer", "--metrics", "--admin", "--quiet"],
        ),
        (
            "explain",
            ["FILE", "--account ID", "[default: default]", "--query TEXT", "standard input", "Sends no request"],
        ),
    ],
)
def test_help(run: Run, command: str, mentions: list[str]) -> None:
    result = run(*command.split(), "--help")
    text = " ".join(result.stdout.split())
    assert result.exit_code == 0
    assert text.startswith(f"Usage: estimate-proxy {command}".strip())
    squeezed = text.replace(" ", "")  # lines are also broken at hyphens
    assert [words for words in mentions if words.replace(" ", "") not in squeezed] == []
    assert not re.search(r"INTEGER|PATH|FILENAME|None|\.\.\.(?! in)", text.replace("[ARGS]...", "")), (
        "an unset metavar, or a cut text"
    )
    assert max(map(len, result.stdout.splitlines())) <= 80
    assert run(*command.split(), "-h").stdout == result.stdout


def test_version(run: Run) -> None:
    assert run("--version").stdout == f"estimate-proxy, version {__version__}\n"
    assert __version__ == importlib.metadata.version("estimate-proxy")


@pytest.mark.parametrize("command", [[], ["token"]])
def test_without_a_command_the_help_is_shown(run: Run, command: list[str]) -> None:
    result = run(*command)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("Usage: estimate-proxy")
    assert "\nCommands:\n" in result.stderr


@pytest.mark.parametrize(
    ("command", "line"),
    [
        ("sevre", "No such command 'sevre'. Did you mean 'serve'? (see estimate-proxy --help)"),
        ("token nwe", "No such command 'nwe'. Did you mean 'new'? (see estimate-proxy token --help)"),
        ("--config x", "No such option '--config'. (see estimate-proxy --help)"),
        ("quota --confg x", "No such option '--confg'. Did you mean '--config'? (see estimate-proxy quota --help)"),
        ("check x", "Got unexpected extra argument (x) (see estimate-proxy check --help)"),
        (
            "serve --port x",
            "Invalid value for '--port': 'x' is not a valid integer. (see estimate-proxy serve --help)",
        ),
        ("token new", "Missing argument 'TEAM', or one of --viewer, --metrics and --admin. (see estimate-proxy"),
        ("explain", "Missing argument 'FILE'. (see estimate-proxy explain --help)"),
        ("explain --account", "Option '--account' requires an argument."),
    ],
)
def test_bad_usage_is_one_line(run: Run, command: str, line: str) -> None:
    assert refusal(run(*command.split())).startswith(line)


def test_a_port_out_of_range_is_refused_before_anything_starts(run: Run) -> None:
    Path("estimate-proxy.toml").write_text(CONFIG)
    assert refusal(run("serve", "--port", "65536")) == "server.port must be less than or equal to 65535"
    assert refusal(run("serve", "--host", "")).startswith("server.host must name a host")
    assert refusal(run("demo", "--port", "65536")).startswith("Invalid value for '--port'")


def test_both_entry_points_are_the_same_program() -> None:
    Path("body.json").write_bytes(BODY)
    for args in (["--help"], ["explain", "body.json"], ["bogus"]):
        one, other = (process(*program, *args) for program in PROGRAMS)
        assert one.returncode == other.returncode
        assert one.stdout == other.stdout.replace(b"python -m proxy", b"estimate-proxy")
        assert one.stderr == other.stderr.replace(b"python -m proxy", b"estimate-proxy")
        assert b"Traceback" not in one.stderr


# --- check ------------------------------------------------------------------------------------------------------

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


def test_check_of_a_broken_file_as_a_process() -> None:
    Path("estimate-proxy.toml").write_text(f'[accounts.default]\napi_key = "{CANARY}\n')
    done = process(*PROGRAMS[0], "check")
    assert (done.returncode, done.stdout) == (2, b"")
    assert re.fullmatch(
        rb"estimate-proxy: estimate-proxy\.toml is not valid TOML: .*\(at line 2, column \d+\)\n", done.stderr
    )


def on_terminal(*args: str, columns: int = 300) -> str:
    """Returns the output of a command line in this process on a terminal."""
    ours, theirs = pty.openpty()
    with (
        ThreadPoolExecutor(1) as pool,
        os.fdopen(ours, "rb", buffering=0) as screen,
        os.fdopen(theirs, "w", encoding="utf-8") as terminal,
        pytest.MonkeyPatch.context() as patch,
    ):
        shown = pool.submit(_all_of, screen)
        for name, value in (("COLUMNS", str(columns)), ("TERM", "xterm")):
            patch.setenv(name, value)
        patch.setattr(sys, "stdout", terminal)
        with pytest.raises(SystemExit, match=r"^0$"):
            main(args, prog_name="estimate-proxy")
        terminal.close()
        return re.sub(r"\x1b\[[0-9;]*m", "", shown.result().decode())


def _all_of(screen: BinaryIO) -> bytes:
    shown = b""
    with suppress(OSError):  # Linux: the other end of the terminal is closed
        while more := screen.read(65536):
            shown += more
    return shown


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


# --- check --connect ----------------------------------------------------------------------------------------------


def connected(result: Result) -> list[str]:
    """Returns the lines of the results, which come after the settings."""
    return [
        line for line in result.stdout.splitlines() if line.startswith(("# the ledger", "# the price", "# RenderN"))
    ]


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_connect_reports_what_it_finds(run: Run, tmp_path: Path, scheme: str) -> None:
    made = make_certificates(tmp_path)
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(made.cert("server"), made.key("server"))
    with raw_upstream(tls if scheme == "https" else None) as upstream, store_process(appendfsync="everysec") as store:
        store.start()
        trusted = f"ca_file = '{made.ca}'" if scheme == "https" else ""
        Path("here.toml").write_text(
            f"metrics.public = true\n{CONFIG}[store]\nurl = '{store.url}'\n[cache]\nurl = '{store.url}'\n"
            f"[upstream]\nbase_url = '{upstream.url}'\n{trusted}"
        )
        result = run("check", "--connect", "--config", "here.toml")
        assert upstream.requests == [], "no request"
    assert result.exit_code == 0, result.stderr
    ledger, book, rendernet = connected(result)
    facts = r"no TLS, Redis 7[.0-9]+ or compatible, maxmemory-policy noeviction, appendonly yes, appendfsync everysec, "
    assert re.fullmatch(rf"# the ledger \({store.url}\): {facts}save \"\", clock 0\.0\d\d s (ahead|behind)", ledger)
    assert book.startswith(f"# the price book ({store.url}): no TLS, Redis 7")
    if scheme == "http":
        assert rendernet == f"# RenderNet ({upstream.url}): connected, no TLS"
        assert result.stderr == ""
    else:
        last_day = (datetime.now(UTC) + timedelta(days=2)).date()
        assert rendernet == f"# RenderNet ({upstream.url}): connected, TLSv1.3, certificate until {last_day}"
        assert "has a certificate that ends on" in result.stderr
    assert tomllib.loads(result.stdout)["server"]["port"] == 8080


def test_connect_reports_failures(run: Run, valkey_url: str) -> None:
    Path("here.toml").write_text(
        f"metrics.public = true\n{CONFIG}[store]\nurl = 'redis://u:{CANARY}@127.0.0.1:{free_port()}'\n"
        f"[cache]\nurl = '{valkey_url}'\n[upstream]\nbase_url = 'http://127.0.0.1:{free_port()}'"
    )
    result = run("check", "--connect", "--config", "here.toml")
    assert result.exit_code == 2
    assert CANARY not in result.output
    ledger, rendernet = result.stderr.splitlines()
    assert re.match(
        r"estimate-proxy: the ledger \(redis://u:\*+@127.0.0.1:\d+\) cannot be used: nothing listens there", ledger
    )
    assert re.match(
        r"estimate-proxy: RenderNet \(http://127.0.0.1:\d+\) cannot be connected to: nothing listens there ", rendernet
    )


def test_connect_warns_about_a_ledger_that_may_lose_data(run: Run) -> None:
    with debian_redis() as url, redis.Redis.from_url(url) as client, raw_upstream() as upstream:
        client.config_set("maxmemory-policy", "allkeys-lru")
        Path("here.toml").write_text(
            f"metrics.public = true\n{CONFIG}[store]\nurl = '{url}'\n[upstream]\nbase_url = '{upstream.url}'"
        )
        result = run("check", "--connect", "--config", "here.toml")
    assert result.exit_code == 0
    evicting, unwritten = result.stderr.splitlines()
    assert "may evict keys (maxmemory-policy allkeys-lru)" in evicting
    assert "writes nothing to disk" in unwritten
    assert connected(result)[1] == "# the price book: in the ledger's store"


def test_connect_needs_no_running_gateway_for_embedded_stores(run: Run) -> None:
    with raw_upstream() as upstream:
        Path("here.toml").write_text(
            f"metrics.public = true\n{CONFIG}[store]\ndata_dir = 'data'\n[upstream]\nbase_url = '{upstream.url}'"
        )
        result = run("check", "--connect", "--config", "here.toml")
    assert (result.exit_code, result.stderr) == (0, "")
    assert connected(result)[0] == "# the ledger (embedded, in data): not tried: no gateway is running, which starts it"


# --- usage and quota --------------------------------------------------------------------------------------------

LEDGER = LedgerKeys("default")
NAME = 'name = "The Designers"\n'
LIMITS = """
[teams.other]
[[org.quotas]]
measure = "requests"
limit = 1000
per = "day"
[[teams.design.quotas]]
measure = "estimated_credits"
limit = 9000000000
per = "month"
on_exceed = "warn"
"""


@pytest.fixture
def ledger(valkey_url: str) -> None:
    """A ledger with usage of two teams three days ago, and counters of the current windows."""
    Path("estimate-proxy.toml").write_text(f'{CONFIG}{NAME}{LIMITS}[store]\nurl = "{valkey_url}"\n')
    with redis.Redis.from_url(valkey_url) as client:
        client.flushall()
        for team, model in (("design", "-1-1"), ("gone", "Flux")):
            rows = {f"{model}:hit:requests": 2, f"{model}:hit:credits": 2**53 + 1, "-:rate-limited:refused": 3}
            client.hset(LEDGER.usage(team, DAY), mapping=dict(rows.items()))
            client.sadd(LEDGER.teams, team)
        month, day = (window_of(per, int(time.time()), UTC) for per in ("month", "day"))
        for key in (LEDGER.counter("design", "month", month), LEDGER.counter(None, "day", day)):
            client.hset(key, mapping={"requests": 7, "credits": 2**53 + 1})


def printed(result: Result) -> str:
    assert (result.exit_code, result.stderr) == (0, "")
    return result.stdout


def reported(result: Result) -> str:
    """Returns the output of `usage`. The period and the total are on standard error."""
    assert result.exit_code == 0
    assert re.fullmatch(r"estimate-proxy: \S+ to \S+, UTC: \d+ requests, .* estimated credits\n", result.stderr)
    return result.stdout


def fields(text: str) -> list[list[str]]:
    return [line.split("\t") for line in text.splitlines()]


@pytest.mark.usefixtures("ledger")
def test_usage_when_piped(run: Run) -> None:
    header, *rows = fields(reported(run("usage", "--from", str(DAY))))
    amounts = ("requests", "refused", "estimated_credits", *OUTCOMES, "share_percent")
    assert header == ["team", *amounts, "team_name", *SAVED_COLUMNS, *LATER_OUTCOMES]
    assert [row[:5] for row in rows] == [[team, "2", "3", "9007199254.740993", "2"] for team in ("design", "gone")]
    assert [row[-6:-2] for row in rows] == [["50", "The Designers", "2", ""], ["50", "", "2", ""]]
    header, row = fields(reported(run("usage", "--from", str(DAY), "--team", "gone")))
    assert [header[0], row[0]] == ["day", str(DAY)], "a team that was removed from the settings, by day"
    _, *rows = fields(reported(run("usage", "--from", str(DAY), "--to", str(DAY), "--by", "model,team")))
    assert [row[:3] for row in rows] == [
        ["-", "design", "0"],
        ["-", "gone", "0"],
        ["-1-1", "design", "2"],
        ["Flux", "gone", "2"],
    ]
    assert fields(reported(run("usage", "--to", str(DAY - timedelta(days=1))))) == [
        ["team", *amounts, "team_name", *SAVED_COLUMNS, *LATER_OUTCOMES]
    ]


@pytest.mark.usefixtures("ledger")
def test_usage_as_json_equals_the_endpoint(run: Run) -> None:
    printed_json = reported(run("usage", "--from", str(DAY), "--by", "team", "--format", "json"))
    document = json.loads(printed_json)
    assert '"estimated_credits":18014398509.481986,' in printed_json
    assert (document["from"], document["timezone"], len(document["rows"])) == (str(DAY), "UTC", 2)
    result = run("usage", "--from", str(DAY), "--by", "model", "--format", "csv")
    lines = result.stdout_bytes.split(b"\r\n")
    assert lines[0].startswith(b"model,requests,refused,estimated_credits,hit,")
    assert lines[2].startswith(b"'-1-1,2,0,9007199254.740993,2,"), "formulas of spreadsheets are escaped"


@pytest.mark.usefixtures("ledger")
def test_usage_on_a_terminal() -> None:
    text = on_terminal("usage", "--from", str(DAY), columns=125)
    title, header, design, gone, total = text.split("\r\n")[:-1]
    assert title.rstrip() == f"{DAY} to {datetime.now(UTC).date()}, UTC"
    assert re.split("  +| (?=hit|estimated|rate|refused|share|calls|seconds)", header.strip()) == [
        *("team", "name", "requests", "refused", "estimated credits", "share %", "hit", "rate-limited"),
        *("calls saved", "seconds saved"),
    ]
    assert design.split() == ["design", "The", "Designers", "2", "3", "9007199254.740993", "50", "2", "3", "2", "-"]
    assert gone.split()[:2] == ["gone", "2"]
    assert total.split() == ["total", "4", "6", "18014398509.481986", "4", "6", "4", "-"]
    assert {line.rindex(cell) + len(cell) for line, cell in ((design, "740993"), (total, "481986"))} == {
        header.rindex("credits") + len("credits")
    }, "numbers are right-aligned"


@pytest.mark.parametrize("columns", [80, 60, 50])
@pytest.mark.parametrize("by", ["team", "day,team,model"])
@pytest.mark.usefixtures("ledger")
def test_a_narrow_terminal_hides_columns_and_names_them(by: str, columns: int) -> None:
    text = on_terminal("usage", "--from", str(DAY), "--by", by, columns=columns)
    assert max(map(len, text.splitlines())) <= columns
    assert "18014398509.481986" in text
    table, _, hidden = text.partition("Not shown, for lack of width: ")
    words = " ".join(table.split())
    for header in ("name", "requests", "refused", "share", "hit", "rate-limited"):
        assert (f" {header} " in words) is (header not in hidden), "each column is shown or named, and no word is split"
    assert not set(hidden.split()) & {"team,", "credits,"}
    assert not hidden or hidden.endswith(".\r\n")


@pytest.fixture
def price_changes(valkey_url: str, ledger: None) -> None:  # noqa: ARG001 -- in its store
    """Two price changes three days ago, and one that was not kept."""
    at_s = int(datetime.combine(DAY, datetime.min.time(), UTC).timestamp()) + 3600
    flux = PriceChange(at_s, "default", "Flux", "0123456789abcdef", "2.75", "3", "audit")
    mixed = PriceChange(at_s + 60, "gone", "mixed", "1234567890123456", "5", "4.5", "ask")
    with redis.Redis.from_url(valkey_url) as client:
        client.hset(LEDGER.price_changes(DAY), "found", 3)
        client.hset(LEDGER.price_changes(DAY), "b", mixed.encoded())
        client.hset(LEDGER.price_changes(DAY), "a", flux.encoded())


@pytest.mark.usefixtures("price_changes")
def test_price_changes_when_piped(run: Run) -> None:
    result = run("prices", "changed", "--from", str(DAY))
    today = datetime.now(UTC).date()
    assert fields(result.stdout) == [
        ["at", "account", "model", "key", "old", "new", "found_by"],
        [f"{DAY}T01:00:00+00:00", "default", "Flux", "0123456789abcdef", "2.75", "3", "audit"],
        [f"{DAY}T01:01:00+00:00", "gone", "mixed", "1234567890123456", "5", "4.5", "ask"],
    ]
    assert result.stderr.splitlines() == [
        f"estimate-proxy: {DAY} to {today}, UTC: 2 price changes",
        "estimate-proxy: 1 more were found, of all accounts: a day keeps the first 500",
    ]
    result = run("prices", "changed", "--from", str(DAY + timedelta(days=1)))
    assert (len(fields(result.stdout)), result.stderr.splitlines()[1:]) == (1, [])


@pytest.mark.usefixtures("price_changes")
def test_price_changes_in_other_formats(run: Run) -> None:
    document = json.loads(run("prices", "changed", "--account", "gone", "--format", "json").stdout)
    (change,) = document["changes"]
    assert (change["old"], change["new"], document["not_kept"]) == (5, 4.5, 1)
    lines = run("prices", "changed", "--csv-dialect", "excel-semicolon").stdout.splitlines()
    assert lines[2] == f"{DAY}T01:01:00+00:00;gone;mixed;'1234567890123456;5;4,5;ask"
    table = on_terminal("prices", "changed", columns=80)
    assert re.search(rf"{DAY} 01:00 +default +Flux +2.75 +3 +audit +0123456789abcdef", table)


@pytest.mark.usefixtures("price_changes")
@pytest.mark.parametrize(
    ("options", "line"),
    [
        ("--account nobody", "--account 'nobody' is not in the settings, and has no price change: check the name"),
        ("--from yesterday", "--from must be a date, such as 2026-11-01."),
        ("--from 2999-01-01", "--from must not be after today, which is "),
    ],
)
def test_a_bad_query_of_price_changes_is_refused(run: Run, options: str, line: str) -> None:
    assert refusal(run("prices", "changed", *options.split())).startswith(line)


@pytest.mark.usefixtures("ledger")
def test_csv_for_spreadsheets_with_a_decimal_comma(run: Run, valkey_url: str) -> None:
    with redis.Redis.from_url(valkey_url) as client:
        client.hset(LEDGER.usage("1-2", DAY), "2026-01:hit:requests", 1)
        client.sadd(LEDGER.teams, "1-2")
    for options in (["--csv-dialect", "excel-semicolon"], ["--csv-dialect", "excel-semicolon", "--format", "csv"]):
        text = reported(run("usage", "--from", str(DAY), "--by", "day,team,model", *options))
        assert text.startswith("\ufeffday;team;model;requests;refused;estimated_credits;hit;")
        lines = text.splitlines()
        assert lines[1].startswith(f"{DAY};'1-2;'2026-01;1;0;0;1;")
        assert lines[3].startswith(f"{DAY};design;'-1-1;2;0;9007199254,740993;2;")
    text = printed(run("quota", "--csv-dialect", "excel-semicolon"))
    assert ";month;9000000000;9007199254,740993;0;warn;" in text
    assert ";100,1;The Designers;" in text
    for command in ("usage", "quota"):
        line = refusal(run(command, "--csv-dialect", "excel-semicolon", "--format", "json"))
        assert line == "--csv-dialect is only for CSV: leave it out, or use --format csv"


@pytest.mark.usefixtures("ledger")
def test_money_is_derived_from_credits(run: Run) -> None:
    assert "derived" not in run("usage", "--from", str(DAY)).output
    path = Path("estimate-proxy.toml")
    path.write_text(f'{path.read_text()}[org.currency]\ncode = "EUR"\nper_credit = "0.002"\n')
    header, *rows = fields(reported(run("usage", "--from", str(DAY))))
    assert header[-6:-4] == ["team_name", "derived_cost_EUR"]
    assert [row[-5] for row in rows] == ["18014398.509481986"] * 2
    document = json.loads(reported(run("usage", "--from", str(DAY), "--format", "json")))
    assert document["currency"] == {"code": "EUR", "per_credit": 0.002}
    assert document["total"]["derived_cost"] == 36028797.018963972
    _, header_line, design, _, total, _ = on_terminal("usage", "--from", str(DAY), columns=120).split("\r\n")
    assert " derived EUR " in header_line
    assert " 18014398.51 " in design
    assert " 36028797.02 " in total


@pytest.mark.usefixtures("ledger")
def test_usage_by_week_and_month(run: Run) -> None:
    monday = DAY - timedelta(days=DAY.weekday())
    _, *rows = fields(reported(run("usage", "--from", str(DAY), "--by", "month,week,team")))
    assert [row[:3] for row in rows] == [[f"{DAY:%Y-%m}", str(monday), team] for team in ("design", "gone")]


@pytest.mark.usefixtures("ledger")
def test_usage_can_be_sorted(run: Run, valkey_url: str) -> None:
    with redis.Redis.from_url(valkey_url) as client:
        client.hincrby(LEDGER.usage("gone", DAY), "Flux:hit:credits", 1)
    for sort, teams_shown in (("names", ["design", "gone"]), ("credits", ["gone", "design"])):
        _, *rows = fields(reported(run("usage", "--from", str(DAY), "--sort", sort)))
        assert [row[0] for row in rows] == teams_shown


@pytest.mark.usefixtures("ledger")
def test_usage_of_last_month(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("proxy.cli.ledger.time", lambda: datetime(2026, 12, 15, tzinfo=UTC).timestamp())
    assert run("usage", "--last-month").stderr.startswith("estimate-proxy: 2026-11-01 to 2026-11-30, UTC: ")
    assert run("usage").stderr.startswith("estimate-proxy: 2026-12-01 to 2026-12-15, UTC: ")
    assert refusal(run("usage", "--last-month", "--to", "2026-12-01")) == (
        "--last-month cannot be combined with --from or --to: leave one of them out"
    )


@pytest.mark.usefixtures("ledger")
def test_on_the_first_of_a_month_usage_shows_the_month_before(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("proxy.cli.ledger.time", lambda: datetime(2026, 12, 1, tzinfo=UTC).timestamp())
    for options in ([], ["--format", "csv"], ["--format", "json"]):
        assert run("usage", *options).stderr.startswith(
            "estimate-proxy: 2026-11-01 to 2026-11-30, UTC (last month, because today is the first): "
        )
    assert run("usage", "--last-month").stderr.startswith("estimate-proxy: 2026-11-01 to 2026-11-30, UTC: ")
    assert run("usage", "--to", "2026-12-01").stderr.startswith("estimate-proxy: 2026-12-01 to 2026-12-01, UTC: ")


@pytest.mark.usefixtures("ledger")
def test_usage_of_an_earlier_id_is_shown_under_the_current_one(run: Run) -> None:
    path = Path("estimate-proxy.toml")
    path.write_text(path.read_text().replace(NAME, f'{NAME}was = ["gone"]\n'))
    _, row = fields(reported(run("usage", "--from", str(DAY))))
    assert row[:4] == ["design", "4", "6", "18014398509.481986"]
    for team in ("design", "gone"):
        _, row = fields(reported(run("usage", "--from", str(DAY), "--team", team)))
        assert row[:4] == [str(DAY), "4", "6", "18014398509.481986"]


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ("--from yesterday", "--from must be a date, such as 2026-11-01."),
        ("--to 2026-02-30", "--to must be a date, such as 2026-11-01."),
        ("--from 2026-11-02 --to 2026-11-01", "--from must not be after to, which is 2026-11-01."),
        ("--from 2020-01-01", "--from must not be more than 400 days before"),
        ("--by hour", "--by must be some of day, week, month, team and model, each once, joined by commas."),
        ("--team nobody", "--team: 'nobody' is not configured and never had usage: check the id."),
        ("--team \udcff", "--team: '"),
        ("--team=", "--team is empty"),
        ("--from=", "--from is empty"),
        ("--by=", "--by is empty"),
        ("--format xml", "Invalid value for '--format': 'xml' is not one of 'table', 'csv', 'json'."),
        ("design", "Got unexpected extra argument (design)"),
    ],
)
@pytest.mark.usefixtures("ledger")
def test_an_invalid_usage_query_is_refused(run: Run, options: str, line: str) -> None:
    assert refusal(run("usage", *options.split(" "))).startswith(line)


@pytest.mark.usefixtures("ledger")
def test_quota_when_piped(run: Run) -> None:
    header, org, own = fields(printed(run("quota")))  # the organisation's quota once, although both teams have it
    assert header == [
        *("scope", "team", "measure", "per", "limit", "used", "remaining", "on_exceed", "resets_at"),
        *("used_percent", "team_name"),
        *("forecast_at_end", "forecast_low", "forecast_high", "reached_at", "reached_from", "reached_until"),
    ]
    assert org[11:] == own[11:] == [""] * 6, "no history"
    assert (org[9:11], own[9:11]) == (["0.7", ""], ["100.1", "The Designers"])
    assert org[:8] == ["org", "-", "requests", "day", "1000", "7", "993", "refuse"]
    assert own[:8] == ["team", "design", "estimated_credits", "month", "9000000000", "9007199254.740993", "0", "warn"]
    assert datetime.fromisoformat(own[8]).timestamp() == window_of("month", int(time.time()), UTC).end_s
    assert fields(printed(run("quota", "design"))) == [header, org, own]
    assert refusal(run("quota", "gone")) == "'gone' is not a team in the settings: they have design, other"


@pytest.mark.usefixtures("ledger")
def test_quota_as_csv_and_json(run: Run) -> None:
    header, *rows = csv.reader(printed(run("quota", "--format", "csv")).splitlines())
    assert [header, *rows] == fields(printed(run("quota")))
    document = json.loads(printed(run("quota", "--format", "json")))
    design, other = document["teams"]
    assert (design["team"], design["team_name"], other["team_name"]) == ("design", "The Designers", "")
    assert [quota["used_percent"] for quota in design["quotas"]] == [100.1, 0.7]
    assert json.loads(printed(run("quota", "design", "--format", "json"))) == design


@pytest.mark.usefixtures("ledger")
def test_quota_on_a_terminal() -> None:
    text = on_terminal("quota", "design", columns=120)
    _, header, org, own = text.split("\r\n")[:-1]
    assert " ".join(header.split()) == "team name quota limit used used % remaining on exceed resets at"
    assert org.split()[:7] == ["-", "org-requests-day", "1000", "7", "0.7", "993", "refuse"]
    assert own.split()[:9] == [
        *("design", "The", "Designers", "credits-month", "9000000000", "9007199254.740993", "100.1", "0", "warn")
    ]
    assert re.search(r" 20[0-9]{2}-[0-9]{2}-01 *$", own)
    for columns in (80, 60, 40):
        text = on_terminal("quota", "design", columns=columns)
        assert max(map(len, text.splitlines())) <= columns
        assert "credits-month" in text
        assert "100.1" in text
        assert "Not shown, for lack of width: " in text


@pytest.mark.usefixtures("ledger")
def test_a_forecast_on_a_terminal(valkey_url: str) -> None:
    with redis.Redis.from_url(valkey_url) as client:
        put_past_usage(client, "design", [100] * 30)
    text = on_terminal("quota", "design", columns=200)
    _, header, org, own = text.split("\r\n")[:-1]
    assert " ".join(header.split()).endswith("resets at at the end forecast")
    assert re.search(r" [0-9]+ \([0-9]+ to [0-9]+\) +reached on [0-9]+ [A-Z][a-z]+ *$", own)
    assert "reached" not in org


def test_no_quotas_are_reported_without_an_error(run: Run, valkey_url: str) -> None:
    Path("estimate-proxy.toml").write_text(f'{CONFIG}[store]\nurl = "{valkey_url}"\n')
    result = run("quota")
    assert (result.exit_code, result.stderr) == (0, "estimate-proxy: no quota is set\n")
    assert len(fields(result.stdout)) == 1


@pytest.mark.parametrize(
    "command", [["usage"], ["usage", "--team", "nobody"], ["quota"], ["quota", "design"], ["token", "list"]]
)
def test_an_unreachable_store_is_one_line(run: Run, command: list[str]) -> None:
    Path("estimate-proxy.toml").write_text(f'{CONFIG}[store]\nurl = "redis://127.0.0.1:{free_port()}"\n')
    assert refusal(run(*command)) == "the store is unreachable"
    Path("estimate-proxy.toml").write_text(f'{CONFIG}[store]\ndata_dir = "data"\n')
    assert "data" in refusal(run(*command))


def test_the_embedded_ledger_of_a_running_gateway_is_read(run: Run) -> None:
    Path("estimate-proxy.toml").write_text(f'{CONFIG}{LIMITS}[store]\ndata_dir = "data"\n')
    stores = EmbeddedStores(Path("data"), ["ledger"])
    stores.start()
    try:
        with redis.Redis.from_url(stores.urls["ledger"]) as client:
            client.hset(LEDGER.usage("design", DAY), "Flux:hit:requests", 2)
            client.sadd(LEDGER.teams, "design")
        assert [row[:2] for row in fields(reported(run("usage", "--from", str(DAY))))][1:] == [["design", "2"]]
        assert len(fields(printed(run("quota")))) == 3
    finally:
        stores.stop()


# --- token ------------------------------------------------------------------------------------------------------


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


# --- explain ----------------------------------------------------------------------------------------------------


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


def test_a_bad_body_on_standard_input_is_one_line() -> None:
    done = process(*PROGRAMS[0], "explain", "-", stdin=b"[]")
    error = b"estimate-proxy: <stdin>: The body must be a JSON array of one or more generation objects.\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, b"", error)


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


def test_arguments_that_are_not_utf_8_or_very_long(run: Run) -> None:
    program = PROGRAMS[0]
    odd = process(*program, "explain", "-", "--query", "a=\udcff", stdin=BODY)
    assert (odd.returncode, odd.stderr) == (0, b"")
    long = run("explain", "-", "--query", "a" * 100_000, stdin=BODY)
    assert long.exit_code == 0
    assert odd.stdout != long.stdout_bytes
    narrow = process(*program, "explain", "-", stdin=BODY, PYTHONIOENCODING="latin-1")
    assert narrow.stdout.startswith('body  [{"a":"é"'.encode()), "the exact bytes, in any encoding of the terminal"
    assert process(*program, "check", "--config", "\udcff.toml").returncode == 2
    assert refusal(run("check", "--config", "x" * 5000)).endswith(" cannot be read: File name too long")


def test_a_closed_pipe_ends_quietly() -> None:
    body = json.dumps([{"a": "x" * 200_000}]).encode()
    Path("body.json").write_bytes(body)
    with subprocess.Popen(
        [*PROGRAMS[0], "explain", "body.json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as child:
        assert child.stdout is not None
        assert child.stderr is not None
        child.stdout.close()
        assert child.stderr.read() == b""
