"""Help of the command line, its version, and what it says of bad usage."""

import importlib.metadata
import re
from pathlib import Path

import pytest

from command_line import CONFIG, Run, refusal
from proxy import __version__


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
