"""The demo's folder, config files and environment, and the introduction that it prints.

Each printed command is complete and in ASCII, so that it can be pasted anywhere.
"""

import json
import shlex
import shutil
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

import orjson

from proxy.auth import digest_of
from proxy.http.paths import EXPLAIN_PATH, METRICS_PATH, QUOTA_PATH, USAGE_PATH
from proxy.settings.loader import without_settings
from proxy.upstream.address import ESTIMATE_PATH

HOST: Final = "127.0.0.1"
TEAMS: Final = ("design", "marketing", "video")
QUOTAS: Final = {
    "design": 'quotas = [{ measure = "estimated_credits", limit = 200000, per = "month" }]\n',
    "marketing": 'quotas = [{ measure = "requests", limit = 60, per = "hour", on_exceed = "warn" }]\n',
    "video": 'quotas = [{ measure = "estimated_credits", limit = 250, per = "minute" }]\n',
}
"""One that is not reached, one that warns when it is passed, and one that the live traffic uses up every minute."""

API_KEY: Final = "rn-demo-key-of-no-account"
MAX_ERRORS: Final = 3

SAMPLE_BODY: Final = (
    '[{"model": "JuggernautXL", "quality": "Plus", "steps": 20, "cfg_scale": 7, "batch_size": 2, '
    '"prompt": {"positive": "a lighthouse at dusk", "negative": "blurry"}}]'
)
RESPELLED_BODY: Final = (
    '[{"prompt":{"negative":"blurry","positive":"a \\u006cighthouse at dusk"},'
    '"batch_size":2.0,"cfg_scale":7.0,"steps":20,"quality":"Plus","model":"JuggernautXL"}]'
)


@dataclass(frozen=True, slots=True)
class DemoEnvironment:
    """The demo's folder and the files in it, the simulated RenderNet's URL, the teams' tokens, and a viewer's."""

    folder: Path
    upstream_url: str
    tokens: Mapping[str, str]
    viewer: str

    @property
    def config(self) -> Path:
        return self.folder / "estimate-proxy.toml"

    @property
    def log(self) -> Path:
        return self.folder / "gateway.log"

    @property
    def scrape_config(self) -> Path:
        return self.folder / "prometheus.yml"

    @property
    def data_dir(self) -> Path:
        return self.folder / "store"


def environment(environ: Mapping[str, str], folder: Path) -> dict[str, str]:
    """`environ` without what would change the gateway's settings; temporary files go into `folder`."""
    kept = without_settings(environ)
    for name in ("XDG_RUNTIME_DIR", "RUNTIME_DIRECTORY"):
        kept.pop(name, None)
    return {**kept, "TMPDIR": str(folder)}


def config_text(demo: DemoEnvironment, *, port: int) -> str:
    """The gateway's config file, written as a user would write it."""
    teams = "\n".join(
        f"[teams.{team}]\nname = {_toml(team.title())}\ntokens = [{_toml(digest_of(token))}]\n{QUOTAS[team]}"
        for team, token in demo.tokens.items()
    )
    return f"""\
# The demo's gateway. Yours needs no [upstream] section, and needs a RenderNet API key.

[server]
host = {_toml(HOST)}
port = {port}
drain_delay_s = 0  # there is no load balancer that needs time to notice

[upstream]
base_url = {_toml(demo.upstream_url)}

[accounts.default]
api_key = {_toml(API_KEY)}

[store]
data_dir = {_toml(str(demo.data_dir))}

[metrics]
public = true  # Prometheus needs no token

[viewer]
tokens = [{_toml(digest_of(demo.viewer))}]  # sees the usage of all teams, and may do nothing else

# For all teams together. Quotas limit what teams plan to spend: every estimate counts, whether hit or miss.
[[org.quotas]]
measure = "estimated_credits"
limit = 1000000
per = "month"

# `estimate-proxy token new TEAM` prints a new token, and the line for it.
{teams}"""


def scrape_config_text(url: str) -> str:
    """A configuration for Prometheus, with this project's rules if they can be found."""
    rules = Path(__file__).parents[2] / "deploy" / "prometheus" / "rules"
    rule_files = f"rule_files: [{json.dumps(str(rules / '*.yml'))}]\n" if rules.is_dir() else ""
    return f"""\
global: {{ scrape_interval: 5s, evaluation_interval: 5s }}
{rule_files}scrape_configs:
  - job_name: estimate-proxy
    static_configs: [{{ targets: [{json.dumps(urlsplit(url).netloc)}] }}]
"""


def _toml(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def introduction(demo: DemoEnvironment, url: str, *, past_days: int = 0) -> Iterator[tuple[str, str]]:
    """What runs where, and commands to paste: pairs of a heading and a text.

    past_days: for how many days before today the ledger has invented usage.
    """
    first, second, *_ = demo.tokens.values()
    invented = f"Prices are invented, and so is the usage of the {past_days} days before today."
    heading = "The gateway and a simulated RenderNet run on this machine."
    yield f"{heading} {invented if past_days else 'Prices are invented.'}", _places(demo, url)
    yield "The usage page: open it in a browser, and paste this token.", f"{url}/   {demo.viewer}"
    yield (
        "Paste these commands into another terminal. A body that was not sent before goes upstream (fwd=miss):",
        _curl("-si", url + ESTIMATE_PATH, first, SAMPLE_BODY),
    )
    yield (
        "Another team sends the same body in another spelling. The gateway answers from its cache (hit):",
        _curl("-si", url + ESTIMATE_PATH, second, RESPELLED_BODY),
    )
    yield (
        "How the gateway reads a body, and what it knows about its price; no request goes to RenderNet:",
        _curl("-s", url + EXPLAIN_PATH, first, SAMPLE_BODY),
    )
    yield "What a team has used this month:", f"curl -s {url}{USAGE_PATH} -H 'X-API-KEY: {first}'"
    yield "What is left of its rate and quotas:", f"curl -s {url}{QUOTA_PATH} -H 'X-API-KEY: {first}'"
    config = shlex.quote(str(demo.config))
    yield "For the operator, what all teams have used:", f"{_program()} usage --config {config}"
    yield (
        "The same body and its key, without a running gateway:",
        f"echo {shlex.quote(SAMPLE_BODY)} | {_program()} explain --config {config} -",
    )
    if demo.scrape_config.exists():
        scrape_config = shlex.quote(str(demo.scrape_config))
        yield (
            "Start a Prometheus that scrapes the gateway (open it on port 9090):",
            f'prometheus --config.file={scrape_config} --storage.tsdb.path="$(mktemp -d)"',
        )


def _places(demo: DemoEnvironment, url: str) -> str:
    places = {
        "gateway": url,
        "metrics": url + METRICS_PATH,
        "simulated RenderNet": demo.upstream_url,
        "store": f"embedded Valkey, data in {demo.data_dir}",
        "config file": demo.config,
        "log": demo.log,
        **{f"token of {team}": token for team, token in demo.tokens.items()},
    }
    return "\n".join(f"  {name:21}{place}" for name, place in places.items())


def _curl(options: str, url: str, token: str, body: str) -> str:
    return (
        f"curl {options} {url} \\\n"
        f"  -H 'X-API-KEY: {token}' \\\n"
        f"  -H 'Content-Type: application/json' \\\n"
        f"  -d {shlex.quote(body)}"
    )


def _program() -> str:
    """How a shell finds `estimate-proxy`."""
    ours = Path(sys.executable).with_name("estimate-proxy")
    if shutil.which("estimate-proxy") == str(ours):
        return "estimate-proxy"
    return shlex.quote(str(ours)) if ours.exists() else f"{shlex.quote(sys.executable)} -m proxy"


def last_errors(log: str) -> str:
    """The newest errors in a gateway's log, on one line; empty if there are none."""
    errors = [error for error in map(_error_in, log.splitlines()) if error]
    return " | ".join(errors[-MAX_ERRORS:])


def _error_in(line: str) -> str:
    try:
        entry = orjson.loads(line)
    except orjson.JSONDecodeError:
        return line.strip().removeprefix("estimate-proxy: ")
    return str(entry["message"]) if entry["level"] == "error" else ""
