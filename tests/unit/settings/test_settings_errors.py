"""Errors in a config: each invalid value is one clear line with its path, and all are reported at once."""

from datetime import date

import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs import ACCOUNT, CANARY, DIGEST, ENV, MINIMAL, OTHER_DIGEST, TEAM, Problems, Read
from proxy.settings.values import is_identifier


@pytest.mark.parametrize(
    ("text", "path", "message"),
    [
        ("[serve]\nport = 1", "serve", "is not a setting: did you mean server?"),
        ("colour = 1", "colour", "is not a setting; expected one of: server, upstream, accounts,"),
        ("[server]\nprot = 1", "server.prot", "is not a setting: did you mean port?"),
        ("[upstream]\nbaseurl = 1", "upstream.baseurl", "is not a setting: did you mean base_url?"),
        ("[store]\npasword_file = 1", "store.pasword_file", "is not a setting: did you mean password_file?"),
        ("[cache]\nsize = 1", "cache.size", "is not a setting; expected one of: url, ttl_s"),
        ("[teams.b]\nacount = 1", "teams.b.acount", "is not a setting: did you mean account?"),
        ("[teams.name]\ntoken = 1", "teams.name.token", "is not a setting: did you mean tokens?"),
        (
            f'[teams.b]\ntokens = [{{ sha256 = "{OTHER_DIGEST}", expire = 1 }}]',
            "teams.b.tokens[0].expire",
            "is not a setting: did you mean expires?",
        ),
        (
            '[accounts.b]\napi_key = "k"\napikey = 1',
            "accounts.b.apikey",
            "is not a setting: did you mean api_key?",
        ),
        ('[server]\n"a.\\n\\u001b" = 1', r'server."a.\n\u001b"', "is not a setting; expected one of: host,"),
        ("[server]\npassword_file = 'x'", "server.password_file", "is not a setting"),
        # types
        ("server = 1", "server", "must be a table"),
        ("store = 'x'", "store", "must be a table"),
        ("teams.b = 'x'", "teams.b", "must be a table"),
        ("[server]\nport = true", "server.port", "must be a number, not true or false"),
        ("[cache]\nttl_s = false", "cache.ttl_s", "must be a number, not true or false"),
        ("[server]\nport = { a = 1 }", "server.port", "must be a whole number"),
        ("[server]\nport = 1.5", "server.port", "must be a whole number"),
        ("[server]\nport = 0x" + "f" * 6000, "server.port", "must be less than or equal to 65535"),
        ("[server]\nhost = 3", "server.host", "must be text"),
        ("[server]\ndrain_s = 'x'", "server.drain_s", "must be a number"),
        ("[upstream]\ninsecure = 'x'", "upstream.insecure", "must be true or false"),
        ("[upstream]\nca_file = 3", "upstream.ca_file", "must be a path"),
        ("[store]\ndata_dir = [1]", "store.data_dir", "must be a path"),
        ("[teams.b]\ntokens = { a = 1 }", "teams.b.tokens", "must be a list (in the environment: as JSON)"),
        ("[teams.b]\ntokens = [1]", "teams.b.tokens[0]", "must be a table"),
        ("[teams.b]\naccount = ['x']", "teams.b.account", "must be text"),
        # origins
        *(
            (f'[server]\ncors_origins = ["{origin}"]', "server.cors_origins[0]", message)
            for origin, message in (
                ("*", "must name one origin, such as https://tools.example.com"),
                ("null", "must be a URL that begins with https:// or http://"),
                ("tools.example.com", "must be a URL that begins with https:// or http://"),
                ("https://tools.example.com/app", "must be scheme, host and port alone"),
                ("https://tools.example.com?a", "must be scheme, host and port alone"),
                ("https://user:pass@tools.example.com", "must be scheme, host and port alone"),
                ("https://tools.example.com/", "must be written as browsers send it: https://tools.example.com"),
                ("https://tools.example.com:443", "must be written as browsers send it: https://tools.example.com"),
                ("http://Tools.example.com:443", "must be written as browsers send it: http://tools.example.com:443"),
                ("HTTP://[::1]:80", "must be written as browsers send it: http://[::1]"),
                ("https://*.example.com", "must name a host"),
                ("https://bücher.example", "must name a host"),
            )
        ),
        ('[server]\ncors_origins = "https://a.example"', "server.cors_origins", "must be a list"),
        # ranges
        ("[server]\nport = 65536", "server.port", "must be less than or equal to 65535"),
        ("[server]\nport = -1", "server.port", "must be greater than or equal to 0"),
        ("[server]\nrequest_timeout_s = 0", "server.request_timeout_s", "must be greater than 0"),
        ("[store]\ntimeout_s = 0", "store.timeout_s", "must be greater than or equal to 0.05"),
        ("[store]\ntimeout_s = 10.5", "store.timeout_s", "must be less than or equal to 10"),
        ("[store]\nconnect_timeout_s = 61", "store.connect_timeout_s", "must be less than or equal to 60"),
        ("[server]\nrequest_timeout_s = nan", "server.request_timeout_s", "must be a finite number"),
        ("[server]\ndrain_s = inf", "server.drain_s", "must be a finite number"),
        ("[server]\ndrain_delay_s = -inf", "server.drain_delay_s", "must be a finite number"),
        ("[server]\nmax_body_bytes = 1", "server.max_body_bytes", "must be greater than or equal to 2"),
        ("[upstream]\nmax_connections = 0", "upstream.max_connections", "must be greater than or equal to 1"),
        ("[cache]\nttl_s = 0", "cache.ttl_s", "must be greater than or equal to 1"),
        ("[cache]\nlearn_from = 0", "cache.learn_from", "must be greater than or equal to 1"),
        ("[cache]\naudit_one_in = 10001", "cache.audit_one_in", "must be less than or equal to 10000"),
        ("[cache]\nlearn = 'on'", "cache.learn", "must be 'off', 'observe' or 'use'"),
        ("[cache]\nlearn = true", "cache.learn", "must be 'off', 'observe' or 'use'"),
        ("[teams.b]\ninfer = 'maybe'", "teams.b.infer", "must be true or false"),
        ("[upstream]\non_unpriced = 'x'", "upstream.on_unpriced", "must be 'pass' or 'refuse'"),
        ("[store]\non_outage = 'pass'", "store.on_outage", "must be 'refuse' or 'admit'"),
        ("[store]\non_outage = true", "store.on_outage", "must be 'refuse' or 'admit'"),
        ("[log]\nlevel = 'INFO'", "log.level", "must be 'debug', 'info', 'warning' or 'error'"),
        # texts
        ("[server]\nhost = ''", "server.host", "must name a host"),
        ("[server]\nhost = 'a b'", "server.host", "must name a host"),
        ("[server]\nhost = 'a..b'", "server.host", "must name a host"),
        (f"[server]\nhost = '{'a' * 64}'", "server.host", "must name a host"),
        (f"[server]\nhost = '{'a.' * 127}a'", "server.host", "must name a host"),
        ("[server]\nhost = '127.0.0.256'", "server.host", "must name a host"),
        ("[store]\nusername = ''", "store.username", "is empty"),
        ("[store]\npassword = ''", "store.password", "is empty"),
        ('[store]\npassword = "a\\nb"', "store.password", "must be one line of text without control characters"),
        ("[store]\ndata_dir = ''", "store.data_dir", "is empty"),
        ("[store]\ndata_dir = '~/x'", "store.data_dir", "begins with ~"),
        ('[store]\ndata_dir = "a\\u0000"', "store.data_dir", "must be one line of text"),
        ("[upstream]\nca_file = ''", "upstream.ca_file", "is empty"),
        ('[teams.b]\nname = "a\\nb"', "teams.b.name", "must be one line of text without control characters"),
        ("[org]\ntimezone = 'Mars/Base'", "org.timezone", "must be a time zone's name, such as"),
        ("[org]\ntimezone = ''", "org.timezone", "must be a time zone's name"),
        (
            "[org]\ntimezone = 'localtime'",
            "org.timezone",
            "must be a time zone's name, such as Europe/Berlin: localtime",
        ),
        ("[org]\ntimezone = '../UTC'", "org.timezone", "must be a time zone's name"),
        ("[cache]\nignore = ['seed', '']", "cache.ignore[1]", "must be a member's name, or several joined by dots"),
        ("[cache]\nnever_learn = ['steps.']", "cache.never_learn[0]", "must be a member's name, or several joined"),
        ("[cache]\nignore = ['prompt..positive']", "cache.ignore[0]", "must be a member's name, or several joined"),
        # ids
        ("[teams.Design]", "teams.Design", "must be 1 to 64 of a-z, 0-9 and -"),
        ("[teams.b-]", "teams.b-", "must be 1 to 64"),
        ("[teams.-b]", "teams.-b", "must be 1 to 64"),
        ("[teams.a_b]", "teams.a_b", "must be 1 to 64"),
        ('[teams.""]', 'teams.""', "must be 1 to 64"),
        (f"[teams.{'a' * 65}]", f"teams.{'a' * 65}", "must be 1 to 64"),
        ("[accounts.B]\napi_key = 'k'", "accounts.B", "must be 1 to 64"),
        ("[teams.b]\naccount = 'B'", "teams.b.account", "must be 1 to 64"),
        ("[org]\nid = 'A'", "org.id", "must be 1 to 64"),
        ("[org]\nid = ''", "org.id", "must be 1 to 64"),
        ("[org]\nid = 'a}b'", "org.id", "must be 1 to 64"),
        (
            "[teams.b]\naccount = 'nobody'",
            "teams.b.account",
            "is not an account in the settings: add [accounts.<its id>]",
        ),
        # keys and tokens
        ("[accounts.b]", "accounts.b.api_key", "is missing"),
        ("[accounts.b]\napi_key = ''", "accounts.b.api_key", "is empty, or has characters that are not allowed"),
        ("[accounts.b]\napi_key = 'a b'", "accounts.b.api_key", "is empty, or has characters that are not allowed"),
        ("[accounts.b]\napi_key = 'ä'", "accounts.b.api_key", "is empty, or has characters that are not allowed"),
        ("[accounts.b]\napi_key = 3", "accounts.b.api_key", "must be text"),
        ("[teams.b]\ntokens = ['x']", "teams.b.tokens[0].sha256", "must be sha256: and 64 hexadecimal digits"),
        (f"[teams.b]\ntokens = ['{DIGEST.upper()}']", "teams.b.tokens[0].sha256", "must be sha256: and 64"),
        (f"[teams.b]\ntokens = ['{OTHER_DIGEST}\\n']", "teams.b.tokens[0].sha256", "must be sha256: and 64"),
        (f"[teams.b]\ntokens = ['{OTHER_DIGEST}b']", "teams.b.tokens[0].sha256", "must be sha256: and 64"),
        (f"[teams.b]\ntokens = ['ep_{CANARY}']", "teams.b.tokens[0].sha256", "is the token itself: put its digest"),
        ("[teams.b]\ntokens = [{ label = 'x' }]", "teams.b.tokens[0].sha256", "is missing"),
        (f"[teams.b]\ntokens = ['{DIGEST}']", "teams.b.tokens[0]", "is the same token as teams.design.tokens[0]"),
        ("[org.currency]\ncode = 'EUR'", "org.currency.per_credit", "is missing"),
        ("[org.currency]\ncode = 'eur'\nper_credit = 1", "org.currency.code", "must be the three capital letters"),
        *(
            (
                f"[org.currency]\ncode = 'EUR'\nper_credit = {price}",
                "org.currency.per_credit",
                "must be more than 0, with",
            )
            for price in ("0", "'0.0'", "-1", "'1e-3'", "'0,1'", "nan", "inf", "true", "[1]", "''", "'0.0000000000001'")
        ),
        ("[teams.b]\nwas = ['A']", "teams.b.was[0]", "must be 1 to 64 of a-z"),
        ("[teams.b]\nwas = ['design']", "teams.b.was[0]", "is the id of a configured team"),
        ("[teams.b]\nwas = ['b']", "teams.b.was[0]", "is the id of a configured team"),
        ("[teams.b]\nwas = ['a', 'a']", "teams.b.was[1]", "repeats teams.b.was[0]"),
        ("[teams.b]\nwas = ['a']\n[teams.c]\nwas = ['a']", "teams.c.was[0]", "repeats teams.b.was[0]"),
        (f"[metrics]\ntokens = ['{DIGEST}']", "metrics.tokens[0]", "is the same token as teams.design.tokens[0]"),
        (f"[admin]\ntokens = ['{DIGEST}']", "admin.tokens[0]", "is the same token as teams.design.tokens[0]"),
        (f"[viewer]\ntokens = ['{DIGEST}']", "viewer.tokens[0]", "is the same token as teams.design.tokens[0]"),
        (
            f"[viewer]\ntokens = [{{ sha256 = '{OTHER_DIGEST}', label = 'lead' }}]",
            "viewer.tokens[0]",
            'must be the digest alone, "sha256:...": only tokens of teams have a label and a last day',
        ),
        (
            f"[teams.b]\ntokens = ['{OTHER_DIGEST}', {{ sha256 = '{OTHER_DIGEST}' }}]",
            "teams.b.tokens[1]",
            "is the same token as teams.b.tokens[0]",
        ),
    ],
)
def test_one_problem_is_one_line_with_its_path(problems_of: Problems, text: str, path: str, message: str) -> None:
    found = problems_of(f"{MINIMAL}{text}" if text.startswith("[") else f"{text}\n{MINIMAL}")
    assert list(found) == [path]
    assert found[path].startswith(message)


@pytest.mark.parametrize("section", ["accounts", "teams"])
@pytest.mark.parametrize("value", ["[1]", "'x'", "1", "[]"])
def test_a_section_that_is_not_a_table_is_refused(problems_of: Problems, section: str, value: str) -> None:
    rest = TEAM if section == "accounts" else ACCOUNT
    assert problems_of(f"{section} = {value}\n{rest}") == {section: "must be a table"}


@pytest.mark.parametrize("day", ["2027-06-30", '"2027-06-30"'])
def test_a_token_is_valid_until_the_end_of_its_last_day(read: Read, day: str) -> None:
    settings = read(ACCOUNT + f"[teams.a]\ntokens = [{{ sha256 = '{DIGEST}', expires = {day} }}]")
    assert settings.teams["a"].tokens[0].expires == date(2027, 6, 30)


@pytest.mark.parametrize(
    "day",
    [
        "2027-06-30T00:00:00Z",
        "2027-06-30T10:00:00",
        "86400",
        "0.0",
        "true",
        "'86400'",
        "'2027-02-30'",
        "'20270630'",
        "''",
        "10:00:00",
    ],
)
def test_values_that_are_not_a_date_are_refused(problems_of: Problems, day: str) -> None:
    found = problems_of(ACCOUNT + f"[teams.a]\ntokens = [{{ sha256 = '{DIGEST}', expires = {day} }}]")
    assert list(found) == ["teams.a.tokens[0].expires"]
    assert found["teams.a.tokens[0].expires"].startswith("must be a date")


def test_all_problems_are_reported_at_once(problems_of: Problems) -> None:
    found = problems_of(
        f"""
        [server]
        port = "{CANARY}"
        prot = 1
        [upstream]
        base_url = "ftp://{CANARY}"
        ca_file = "missing.pem"
        [accounts.b]
        api_key_file = "missing"
        [teams.b]
        account = "c"
        tokens = ["{CANARY}"]
        """,
        {f"{ENV}CACHE__TTL_S": CANARY, f"{ENV}STORE__X": CANARY, f"{ENV}LOG__LEVEL": f"[{CANARY}"},
    )
    assert set(found) == {
        "server.port",
        "server.prot",
        "upstream.base_url",
        "upstream.ca_file",
        "accounts.b.api_key_file",
        "teams.b.account",
        "teams.b.tokens[0].sha256",
        "cache.ttl_s",
        "store.x",
        f"{ENV}LOG__LEVEL",
    }


def test_an_empty_config_says_what_to_do_first(problems_of: Problems) -> None:
    found = problems_of("")
    assert set(found) == {"accounts.default.api_key", "teams"}
    assert "RENDERNET_API_KEY" in found["accounts.default.api_key"]
    assert "estimate-proxy token new" in found["teams"]


def test_an_account_with_another_name_is_enough(read: Read, problems_of: Problems) -> None:
    account = "[accounts.b]\napi_key = 'k'\n"
    assert read(f"{account}[teams.a]\naccount = 'b'").teams["a"].account == "b"
    found = problems_of(f"{account}[teams.a]\n[teams.b]\n[teams.c]\naccount = 'x'")
    assert set(found) == {"accounts.default.api_key", "teams.c.account"}
    assert set(problems_of("[teams.c]\naccount = 'x'")) == {"teams.c.account"}
    assert "RENDERNET_API_KEY" in problems_of("[accounts.default]\n" + TEAM)["accounts.default.api_key"]


@given(st.from_regex(r"\A[a-z0-9]([a-z0-9-]{0,62}[a-z0-9])?\Z"))
def test_identifiers(value: str) -> None:
    assert is_identifier(value) == (len(value) <= 64 and not value.endswith("\n"))
    assert not any(map(is_identifier, (f"{value}-", f"-{value}", f"{value}\n", f"{value}A", f"{value}_", "")))
