"""`estimate-proxy quote` against a gateway in this process."""

import json
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from gateway_fixture import DESIGN, GatewayFixture, answers
from proxy.cli.commands import main
from quota_fixture import Limited, quota, rate, requests
from serving import free_port

Run = Callable[..., Result]

FLUX: Any = [{"model": "Flux"}]
ONE: Any = [{}]
GRID = {"base": FLUX, "vary": {"quality": ["Plus", "Regular"]}}


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Runs the command on this input. `gateway` may be a URL."""

    def quote(gateway: GatewayFixture | str, given: Any, *options: str, token: str = DESIGN) -> Result:
        raw = given if isinstance(given, str) else json.dumps(given)
        path = tmp_path / "plan.json"
        path.write_text(raw, encoding="utf-8")
        url = gateway if isinstance(gateway, str) else gateway.url
        environ = {"ESTIMATE_PROXY_URL": url, "ESTIMATE_PROXY_TOKEN": token}
        return CliRunner().invoke(main, ["quote", str(path), *options], env=environ)

    return quote


def plan(*bodies: Any) -> str:
    return "".join(f"{json.dumps(body)}\n" for body in bodies)


class TestOutput:
    def test_a_grid_as_tab_separated_text(self, gateway: GatewayFixture, run: Run) -> None:
        result = run(gateway, GRID)
        assert result.exit_code == 0, result.output
        assert result.stdout == (
            "variant\testimated\tdelta\tshare_percent\tbasis\tage_s\tnote\n"
            "quality=Plus\t5.5\t0\t100\tasked\t0\t\n"
            "quality=Regular\t2.75\t-2.75\t50\tasked\t0\tcheapest\n"
        )
        assert result.stderr == "estimate-proxy: 2.75 credits\n"

    def test_a_plan_adds_up(self, gateway: GatewayFixture, run: Run) -> None:
        result = run(gateway, plan(FLUX, ONE, ONE))
        assert result.stdout.splitlines()[1:] == [
            "line 1\t2.75\t\t57.9\tasked\t0\t",
            "line 2\t1\t\t21.1\tasked\t0\tcheapest",
            "line 3\t1\t\t21.1\tasked\t0\t",
        ]
        assert result.stderr == "estimate-proxy: 4.75 credits\n"

    def test_breakdowns_have_their_lines(self, gateway: GatewayFixture, run: Run) -> None:
        two = {"variants": [{"label": "two", "body": [*FLUX, *ONE]}]}
        items = run(gateway, {**two, "breakdown": "items"}).stdout.splitlines()
        assert [line.split("\t")[:4] for line in items[1:]] == [
            ["two", "3.75", "0", "100"],
            ["- item 0", "2.75", "", "73.3"],
            ["- item 1", "1", "", "26.7"],
            ["- residual", "0", "", "0"],
        ]
        members = run(gateway, {**two, "breakdown": "members"}).stdout.splitlines()
        assert members[2].split("\t") == ["- model", "", "1.75", "46.7", "", "", "another mode"]

    def test_markdown(self, limited: Limited, run: Run) -> None:
        document = {**GRID, "quantity": 4}
        result = run(limited(quota(100)), document, "--format", "md", "--max-total", "10")
        assert result.exit_code == 1
        assert result.stdout == (
            "| variant | estimated | delta | share % | basis | age s | note |\n"
            "|---|--:|--:|--:|---|--:|---|\n"
            "| quality=Plus | 5.5 | 0 | 100 | asked | 0 |  |\n"
            "| quality=Regular | 2.75 | -2.75 | 50 | asked | 0 | cheapest |\n"
            "\n**11 credits are more than --max-total 10.**\n"
            "\n- team's quota of estimated credits per month: 100 left, fits, 36 times the cheapest\n"
        )

    def test_json_keeps_numbers_as_they_are(self, gateway: GatewayFixture, run: Run) -> None:
        gateway.simulator.script(answers(b'{"data":{"estimated":2.50,"balance":9.10},"error":{}}'))
        result = run(gateway, FLUX, "--format", "json")
        assert '"estimated":2.50' in result.stdout
        assert json.loads(result.stdout, parse_float=Decimal)["balance"] == Decimal("9.10")

    def test_labels_cannot_break_the_table(self, gateway: GatewayFixture, run: Run) -> None:
        label = "a\tb\x1b[31m|<c>"
        document = {"variants": [{"label": label, "body": FLUX}]}
        assert run(gateway, document).stdout.splitlines()[1].startswith("a b [31m|<c>\t2.75")
        assert "| a b [31m\\|&lt;c> | 2.75" in run(gateway, document, "--format", "md").stdout

    def test_standard_input(self, gateway: GatewayFixture) -> None:
        options = ["quote", "-", "--url", gateway.url + "/", "--token", DESIGN]
        assert CliRunner().invoke(main, options, input=json.dumps(FLUX)).exit_code == 0


class TestExitStatus:
    @pytest.mark.parametrize(("limit", "status"), [("4.75", 0), ("4.749999", 1), ("5", 0), ("0", 1)])
    def test_the_limit_of_a_plan(self, limit: str, status: int, gateway: GatewayFixture, run: Run) -> None:
        assert run(gateway, plan(FLUX, ONE, ONE), "--max-total", limit).exit_code == status

    @pytest.mark.parametrize(("limit", "status"), [("2.75", 0), ("2.7", 1)])
    def test_the_limit_of_alternatives_is_for_the_cheapest(
        self, limit: str, status: int, gateway: GatewayFixture, run: Run
    ) -> None:
        assert run(gateway, GRID, "--max-total", limit).exit_code == status

    def test_a_quota_that_the_whole_plan_exceeds(self, limited: Limited, run: Run) -> None:
        result = run(limited(quota(3)), plan(FLUX, ONE))
        assert (result.exit_code, result.stderr) == (
            1,
            "estimate-proxy: more than the team's quota of estimated credits per month leaves (3)\n",
        )
        assert run(limited(requests(3)), plan(ONE, FLUX)).exit_code == 1, "one request is left, for two bodies"

    def test_a_quota_that_hides_a_price(self, limited: Limited, run: Run) -> None:
        result = run(limited(quota(2)), GRID)
        assert (result.exit_code, result.stderr) == (1, "estimate-proxy: a quota would refuse these estimates\n")

    @pytest.mark.parametrize("form", ["table", "md", "json"])
    def test_an_unknown_price_never_passes(self, form: str, gateway: GatewayFixture, run: Run) -> None:
        gateway.simulator.script(answers(b"{}", 500))
        result = run(gateway, plan(FLUX, ONE), "--max-total", "1", "--format", form)
        assert result.exit_code == 2
        assert "1 price is unknown (upstream-error)" in result.output.lower()

    @pytest.mark.parametrize(
        ("given", "says"),
        [
            ("", "it is not JSON"),
            ("{", "line 1 is not JSON"),
            ('[{"a":NaN}]', "line 1 is not JSON"),
            ('[{}]\n{"model":"Flux"}\n', "line 2 is not a body: each line of a plan is an array"),
            ('{"model":"Flux"}', "it is neither a quote document (variants, or base and vary) nor a body"),
            ("3", "it is neither a quote document"),
            ('{"variants":[]}', "answered 400: variants must be an array of 1 to 64 objects with label and body."),
            ("[3]", "answered 400: Variant 'body': The item at index 0 is not a generation object"),
        ],
    )
    def test_bad_input(self, given: str, says: str, gateway: GatewayFixture, run: Run) -> None:
        result = run(gateway, given)
        assert (result.exit_code, result.stdout) == (2, "")
        assert says in result.stderr
        assert result.stderr.count("\n") == 1

    def test_bad_options(self, gateway: GatewayFixture, run: Run) -> None:
        assert "--max-total must be a number of credits" in run(gateway, FLUX, "--max-total", "ten").stderr
        assert "--url must be an address like" in run("gateway.example", FLUX).stderr
        assert "give the gateway's address with --url" in run("", FLUX).stderr
        assert "give a team's token with --token" in run(gateway, FLUX, token="").stderr
        assert "characters that no token has" in run(gateway, FLUX, token="ep_\u00e9").stderr

    def test_a_refused_token_and_a_gateway_out_of_reach(self, gateway: GatewayFixture, run: Run) -> None:
        refused = run(gateway, FLUX, token="ep_nobody")
        assert (refused.exit_code, "answered 401: " in refused.stderr) == (2, True)
        assert "ep_nobody" not in refused.output
        lost = run(f"http://127.0.0.1:{free_port()}", FLUX)
        assert (lost.exit_code, "is out of reach: " in lost.stderr) == (2, True)
        other = run(f"{gateway.url}/other", FLUX)
        assert (other.exit_code, "answered 404: " in other.stderr) == (2, True)


class TestPlans:
    def test_more_than_64_bodies_go_in_several_calls(self, gateway: GatewayFixture, run: Run) -> None:
        result = run(gateway, plan(*[[{"seed": number % 5}] for number in range(150)]), "--format", "json")
        document = json.loads(result.stdout)
        assert (document["total"], len(document["variants"])) == (150, 150)
        assert document["variants"][149]["label"] == "line 150"
        assert gateway.simulator.calls == 5

    def test_large_bodies_go_in_several_calls(self, gateway: GatewayFixture, run: Run) -> None:
        result = run(gateway, plan(*[[{"prompt": str(number) * 90_000}] for number in range(5)]))
        assert (result.exit_code, len(result.stdout.splitlines())) == (0, 6)

    def test_it_waits_for_the_teams_rate(self, limited: Limited, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("proxy.cli.quote.RATE_PAUSE_S", 0.02)
        result = run(limited(rate=rate(3, per_s=50)), plan(*[[{"seed": number}] for number in range(8)]))
        assert result.exit_code == 0, result.output
        assert result.stderr == "estimate-proxy: 8 credits\n"

    def test_it_gives_up_without_progress(self, limited: Limited, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("proxy.cli.quote.RATE_PAUSE_S", 0)
        result = run(limited(rate=rate(2)), plan(ONE, FLUX, [{"seed": 1}]))
        assert (result.exit_code, result.stderr) == (
            2,
            "estimate-proxy: 1 price is unknown (rate-limited)\n",
        )
