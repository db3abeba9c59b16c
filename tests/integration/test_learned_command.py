"""`estimate-proxy learned`, `learned forget` and `purge`: what was learned by a running gateway."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from gateway_fixture import DESIGN, GatewayFixture, OpenGateway, UpstreamFixture
from inference_fixture import LEARN_FROM, LEARNING, learned, new_body, scope, teach
from proxy.auth import digest_of
from proxy.cli.commands import main
from proxy.settings.masking import MASK

pytestmark = pytest.mark.usefixtures("cold", "cold_learning")

Run = Callable[..., Result]


@pytest.fixture
def gateway(open_gateway: OpenGateway) -> GatewayFixture:
    """Has learned that the seed does not count."""
    gateway = open_gateway(**LEARNING)
    teach(gateway)
    return gateway


@pytest.fixture
def run(tmp_path: Path, valkey_url: str, upstream: UpstreamFixture) -> Run:
    """Runs a command with the gateway's store and upstream."""
    config = tmp_path / "config.toml"
    config.write_text(
        f'[upstream]\nbase_url = "{upstream.url}"\n'
        '[accounts.default]\napi_key = "k"\n[accounts.second]\napi_key = "k"\n'
        f'[teams.design]\ntokens = ["{digest_of(DESIGN)}"]\n'
        f'[store]\nurl = "{valkey_url}"\n[cache]\nlearn = "use"\nlearn_from = {LEARN_FROM}\n'
    )

    def invoke(*args: str, stdin: str = "") -> Result:
        place = 2 if args[:2] == ("learned", "forget") else 1
        command = (*args[:place], "--config", str(config), *args[place:])
        return CliRunner(catch_exceptions=False).invoke(main, command, input=stdin, prog_name="estimate-proxy")

    return invoke


def refusal(result: Result) -> str:
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (2, "", 1)
    return result.stderr.removeprefix("estimate-proxy: ").rstrip()


def is_inferred(gateway: GatewayFixture) -> bool:
    """Whether a new body is answered without asking RenderNet."""
    return gateway.ask(new_body(), cache_control="only-if-cached").status_code == 200


def test_json_is_what_the_endpoint_says(gateway: GatewayFixture, run: Run) -> None:
    result = run("learned", "--format", "json")
    assert json.loads(result.stdout) == learned(gateway)
    assert result.stderr == ""
    assert MASK not in result.stdout


def test_a_table_for_programs(gateway: GatewayFixture, run: Run) -> None:
    header, row = (line.split("\t") for line in run("learned", "--account", "default").stdout.splitlines())
    cells = dict(zip(header, row, strict=True))
    found = scope(gateway)
    assert (cells["account"], cells["scope"], cells["state"]) == ("default", found["scope"], "answering")
    assert (cells["left_out"], cells["counting"], cells["items"]) == ("0.seed", "0.model", "model Flux")
    assert (cells["tests"], cells["tests_needed"]) == (str(found["tests"]), str(LEARN_FROM))


def test_an_account_without_scopes(run: Run) -> None:
    result = run("learned", "--account", "second")
    assert (result.exit_code, result.stdout.count("\n")) == (0, 1)
    assert result.stderr == "estimate-proxy: nothing is learned yet\n"
    assert refusal(run("learned", "--account", "third")).startswith("--account is not an account in the settings")


@pytest.mark.parametrize("chosen", ["--scope", "--all"])
def test_what_is_forgotten_does_not_answer(gateway: GatewayFixture, run: Run, chosen: str) -> None:
    assert is_inferred(gateway)
    options = ["--scope", scope(gateway)["scope"]] if chosen == "--scope" else ["--all"]
    assert run("learned", "forget", *options).stdout == "forgot 1 scope of the account default\n"
    assert learned(gateway)["accounts"][0]["scopes"] == []
    assert not is_inferred(gateway)


def test_forget_needs_to_know_what(run: Run) -> None:
    assert refusal(run("learned", "forget")) == "give either --scope with a scope's id, or --all"
    assert refusal(run("learned", "forget", "--scope", "x", "--all")).startswith("give either")
    assert refusal(run("learned", "forget", "--scope", "x")).startswith("--scope: nothing was learned in 'x'")
    assert refusal(run("learned", "forget", "--account", "third", "--all")).startswith("--account is not an account")


@pytest.mark.parametrize("options", [["-"], ["--all"]])
def test_a_purge_drops_learned_prices(gateway: GatewayFixture, run: Run, options: list[str]) -> None:
    assert is_inferred(gateway)
    assert run("purge", *options, stdin=new_body() if options == ["-"] else "").exit_code == 0
    assert not is_inferred(gateway)
