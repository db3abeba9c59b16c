"""Settings and where they come from: each wrong input is one clear line, and no line shows a value."""

import os
import pickle
import re
from collections.abc import Callable, Mapping
from datetime import date
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from proxy import config
from proxy.config import load, load_keying
from proxy.settings import MASK, SecretText, SecretUrl, Settings, effective, is_identifier, masked_url
from proxy.settings_problems import SettingsError
from proxy.upstream import Address

CANARY = "CaNaRy5Xq"
DIGEST = "sha256:" + "a" * 64
OTHER_DIGEST = "sha256:" + "b" * 64
ACCOUNT = f'[accounts.default]\napi_key = "{CANARY}"\n'
TEAM = f'[teams.design]\ntokens = ["{DIGEST}"]\n'
MINIMAL = ACCOUNT + TEAM
ENV = "ESTIMATE_PROXY_"

Read = Callable[..., Settings]


@pytest.fixture
def read(tmp_path: Path) -> Read:
    """Loads a config of this text, in a folder of its own."""

    def load_text(text: str | bytes = MINIMAL, environ: Mapping[str, str] | None = None, **options: Any) -> Settings:
        file = tmp_path / "config.toml"
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
        return load(file, {"HOME": "/home/op", **(environ or {})}, **options)

    return load_text


Problems = Callable[..., dict[str, str]]


@pytest.fixture
def problems_of(read: Read) -> Problems:
    """The problems of a config by their paths; each is one line, and none shows the canary."""

    def collect(
        text: str | bytes = MINIMAL, environ: Mapping[str, str] | None = None, **options: Any
    ) -> dict[str, str]:
        with pytest.raises(SettingsError) as caught:
            read(text, environ, **options)
        problems = caught.value.problems
        said = [f"{problem.path} {problem.message}" for problem in problems]
        assert all(line.isprintable() for line in said), said
        assert CANARY.lower() not in "".join([*said, str(caught.value), repr(caught.value)]).lower()
        assert all(problem.path for problem in problems)
        assert len({problem.path for problem in problems}) == len(problems), said
        return {problem.path: problem.message for problem in problems}

    return collect


# --- What is in force -------------------------------------------------------------------------------------------


def test_defaults(read: Read) -> None:
    settings = read()
    assert settings.server.model_dump() == {
        "host": "127.0.0.1",
        "port": 8080,
        "max_body_bytes": 262_144,
        "request_timeout_s": 15.0,
        "drain_delay_s": 5.0,
        "drain_s": 30.0,
    }
    assert settings.upstream.model_dump() == {
        "base_url": "https://api.rendernet.ai",
        "insecure": False,
        "timeout_s": 10.0,
        "max_connections": 100,
        "on_unpriced": "pass",
        "proxy": None,
        "ca_file": None,
    }
    assert settings.accounts["default"].api_key.get_secret_value() == CANARY
    assert settings.store.url is None
    assert settings.store.data_dir == Path("/home/op/.local/share/estimate-proxy")
    assert settings.cache.ttl_s == 3600.0
    assert settings.org.zone.key == "UTC"
    assert settings.teams["design"].tokens[0].sha256 == DIGEST
    assert (settings.log.level, settings.log.format) == ("info", "auto")


def test_everything_that_can_be_set(read: Read, tmp_path: Path) -> None:
    (tmp_path / "key").write_text("k2\n")
    settings = read(
        f"""
        server = {{ host = "::1", port = 0, max_body_bytes = 2, request_timeout_s = 1, drain_s = 0 }}
        [upstream]
        base_url = "http://localhost:1"
        timeout_s = 0.5
        max_connections = 1
        on_unpriced = "refuse"
        proxy = "http://u:p@corp:3128"
        [accounts.second-1]
        api_key_file = "key"
        [store]
        url = "redis://u:p%40@s_1:6380/3"
        username = "u"
        password = "[p"
        data_dir = "data"
        [cache]
        ttl_s = 1.5
        [org]
        timezone = "Europe/Berlin"
        [teams.a]
        name = "Ä \\"b\\""
        account = "second-1"
        disabled = true
        tokens = [{{ sha256 = "{DIGEST}", label = "ci", expires = 2027-06-30 }}, "{OTHER_DIGEST}"]
        [log]
        level = "debug"
        format = "json"
        """
    )
    assert settings.server.host == "::1"
    assert settings.accounts["second-1"].api_key.get_secret_value() == "k2"
    assert settings.store.url is not None
    assert settings.store.url.get_secret_value() == "redis://u:p%40@s_1:6380/3"
    assert settings.store.data_dir == tmp_path / "data"
    assert settings.teams["a"].tokens[0].expires == date(2027, 6, 30)
    assert settings.teams["a"].tokens[1].label == ""
    assert settings.org.zone.key == "Europe/Berlin"


@pytest.mark.parametrize(
    ("environ", "home"),
    [
        ({"XDG_DATA_HOME": "/data"}, "/data"),
        ({"XDG_DATA_HOME": "relative"}, "/home/op/.local/share"),
        ({"XDG_DATA_HOME": ""}, "/home/op/.local/share"),
        ({"HOME": ""}, "/var/lib"),
    ],
)
def test_data_dir_follows_xdg(read: Read, environ: dict[str, str], home: str) -> None:
    assert read(environ=environ).store.data_dir == Path(home, "estimate-proxy")


def test_effective_names_every_setting_and_masks_secrets(read: Read) -> None:
    rows = dict(effective(read(MINIMAL + f'[store]\nurl = "redis://u:{CANARY}@h"\npassword = "{CANARY}"\n')))
    assert str(rows["accounts.default.api_key"]) == MASK
    assert str(rows["store.url"]) == f"redis://u:{MASK}@h"
    assert rows["upstream.proxy"] is None
    assert rows["teams.design.tokens"][0]["sha256"] == DIGEST
    assert CANARY not in repr(rows)
    assert len(rows) == 31


# --- Secrets ----------------------------------------------------------------------------------------------------


def test_settings_never_show_a_secret_but_pickle_keeps_it(read: Read) -> None:
    settings = read(
        MINIMAL
        + f'[store]\nurl = "redis://:{CANARY}@h"\npassword = "{CANARY}"\n'
        + f'[upstream]\nproxy = "http://u:{CANARY}@p"\n'
    )
    shown = [
        repr(settings),
        str(settings),
        f"{settings}",
        repr(settings.model_dump()),
        settings.model_dump_json(),
        repr(effective(settings)),
        repr(settings.model_copy()),
        repr(settings.accounts),
        str(settings.store.url),
    ]
    assert CANARY not in "".join(shown)
    again = pickle.loads(pickle.dumps(settings))  # noqa: S301 -- our own bytes; a worker gets its settings so
    assert again == settings
    assert again.accounts["default"].api_key.get_secret_value() == CANARY
    assert again.store.url.get_secret_value() == f"redis://:{CANARY}@h"
    assert CANARY not in repr(again)


def test_pydantics_own_words_show_no_value_either() -> None:
    with pytest.raises(ValidationError) as caught:
        Settings.model_validate({"store": CANARY, "accounts": {"a": {"api_key": [CANARY]}}})
    assert CANARY not in f"{caught.value}{caught.value!r}"


def test_settings_are_frozen(read: Read) -> None:
    settings = read()
    token = settings.teams["design"].tokens[0]
    for section, field in (
        (settings, "server"),
        (settings.server, "port"),
        (settings.store, "password"),
        (token, "label"),
    ):
        with pytest.raises(ValidationError):
            setattr(section, field, getattr(section, field))


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://user:pw@host", f"redis://user:{MASK}@host"),
        ("redis://:pw@host:1/0", f"redis://:{MASK}@host:1/0"),
        ("redis://u%40:p%40pw%2f@host", f"redis://u%40:{MASK}@host"),
        ("redis://u:p@pw@host", f"redis://u:{MASK}@host"),
        ("redis://u:@[::1]:1", f"redis://u:{MASK}@[::1]:1"),
        ("redis://pw@host", f"redis://{MASK}@host"),
        ("redis://host/0?password=pw&db=2", f"redis://host/0?password={MASK}&db=2"),
        ("redis://host?pass%77ord=pw", f"redis://host?pass%77ord={MASK}"),
        ("redis://host?pw", f"redis://host?{MASK}"),
        ("redis://host?db=pw", f"redis://host?db={MASK}"),
        ("redis://host#pw", f"redis://host#{MASK}"),
        ("unix://user:pw@/run/s.sock?db=1", f"unix://user:{MASK}@/run/s.sock?db=1"),
        ("unix:///run/s.sock?password=pw", f"unix:///run/s.sock?password={MASK}"),
        ("redis://[pw", MASK),
        ("redis://host:6379/0", "redis://host:6379/0"),
    ],
)
def test_a_url_is_shown_without_its_secrets(url: str, shown: str) -> None:
    assert masked_url(url) == shown
    assert str(SecretUrl(url)) == shown
    assert shown in repr(SecretUrl(url))


def test_a_secret_shows_neither_itself_nor_its_length() -> None:
    assert str(SecretText("")) == str(SecretText("x" * 99)) == MASK
    assert repr(SecretText("x")) == f"SecretText({MASK!r})"


def leaves(model: type[BaseModel], path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """The TOML paths of all settings, with a team and an account in them."""
    found = []
    for name, field in model.model_fields.items():
        members = {"accounts": ("default",), "teams": ("design",)}.get(name, ()) if not path else ()
        inner: Any = field.annotation
        if members:
            inner = inner.__args__[-1]
        here = (*path, name, *members)
        found.append(here)
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            found += leaves(inner, here)
    return found


ALL_PATHS = leaves(Settings)
WRONG = {
    "text": f'"{CANARY}"',
    "spaced text": f'" {CANARY}\\n"',
    "url": f'"redis://{CANARY}:{CANARY}@h:{CANARY}/{CANARY}"',
    "list": f'["{CANARY}"]',
    "table": f'{{ x = "{CANARY}" }}',
    "tables": f'[{{ sha256 = "{CANARY}", label = ["{CANARY}"], expires = "{CANARY}" }}]',
    "true": "true",
    "number": "-1",
    "fraction": "0.25",
    "nan": "nan",
    "date": "2027-06-30",
}


def test_all_paths_are_found() -> None:
    assert len(ALL_PATHS) == 40
    assert ("teams", "design", "tokens") in ALL_PATHS
    assert ("accounts", "default", "api_key") in ALL_PATHS


def said_of(read: Read, text: str, environ: Mapping[str, str] | None = None) -> str:
    """All that is said of a config; nothing if it can be used."""
    try:
        read(text, environ)
    except SettingsError as error:
        return f"{error}\n{error!r}\n{error.problems}"
    return ""


@pytest.mark.parametrize("path", ALL_PATHS, ids=".".join)
def test_no_problem_shows_a_value(read: Read, path: tuple[str, ...]) -> None:
    """Whatever stands wherever: the settings load, or the complaint does not repeat it."""
    said = [
        said_of(read, f"{'.'.join(path)} = {wrong}\n{'' if path[0] == 'accounts' else ACCOUNT}")
        for wrong in WRONG.values()
    ]
    assert CANARY.lower() not in "".join(said).lower()
    assert "input" not in "".join(said).lower(), "pydantic's own words"
    assert sum(".".join(path[:1]) in complaints for complaints in said) > len(WRONG) // 2


@pytest.mark.parametrize("path", [path for path in ALL_PATHS if len(path) > 1], ids=".".join)
def test_no_problem_shows_a_variable(read: Read, path: tuple[str, ...]) -> None:
    name = ENV + "__".join(path).upper()
    values = CANARY, f'["{CANARY}"]', f'{{"{path[-1]}": "{CANARY}"}}', f"[{CANARY}", f"\udcff{CANARY}\n"
    said = [said_of(read, MINIMAL, {name: value}) for value in values]
    assert CANARY.lower() not in "".join(said).lower()
    assert any(said)


# --- What is wrong, and where -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "path", "message"),
    [
        ("[serve]\nport = 1", "serve", "is not a setting: did you mean server?"),
        ("colour = 1", "colour", "is not a setting; known here: server, upstream, accounts,"),
        ("[server]\nprot = 1", "server.prot", "is not a setting: did you mean port?"),
        ("[upstream]\nbaseurl = 1", "upstream.baseurl", "is not a setting: did you mean base_url?"),
        ("[store]\npasword_file = 1", "store.pasword_file", "is not a setting: did you mean password_file?"),
        ("[cache]\nsize = 1", "cache.size", "is not a setting; known here: ttl_s"),
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
        ('[server]\n"a.\\n\\u001b" = 1', r'server."a.\n\u001b"', "is not a setting; known here: host,"),
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
        # ranges
        ("[server]\nport = 65536", "server.port", "must be less than or equal to 65535"),
        ("[server]\nport = -1", "server.port", "must be greater than or equal to 0"),
        ("[server]\nrequest_timeout_s = 0", "server.request_timeout_s", "must be greater than 0"),
        ("[server]\nrequest_timeout_s = nan", "server.request_timeout_s", "must be a finite number"),
        ("[server]\ndrain_s = inf", "server.drain_s", "must be a finite number"),
        ("[server]\ndrain_delay_s = -inf", "server.drain_delay_s", "must be a finite number"),
        ("[server]\nmax_body_bytes = 1", "server.max_body_bytes", "must be greater than or equal to 2"),
        ("[upstream]\nmax_connections = 0", "upstream.max_connections", "must be greater than or equal to 1"),
        ("[cache]\nttl_s = 0", "cache.ttl_s", "must be greater than or equal to 1"),
        ("[upstream]\non_unpriced = 'x'", "upstream.on_unpriced", "must be 'pass' or 'refuse'"),
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
        ("[org]\ntimezone = '../UTC'", "org.timezone", "must be a time zone's name"),
        # ids
        ("[teams.Design]", "teams.Design", "must be 1 to 64 of a-z, 0-9 and -"),
        ("[teams.b-]", "teams.b-", "must be 1 to 64"),
        ("[teams.-b]", "teams.-b", "must be 1 to 64"),
        ("[teams.a_b]", "teams.a_b", "must be 1 to 64"),
        ('[teams.""]', 'teams.""', "must be 1 to 64"),
        (f"[teams.{'a' * 65}]", f"teams.{'a' * 65}", "must be 1 to 64"),
        ("[accounts.B]\napi_key = 'k'", "accounts.B", "must be 1 to 64"),
        ("[teams.b]\naccount = 'B'", "teams.b.account", "must be 1 to 64"),
        ("[teams.b]\naccount = 'nobody'", "teams.b.account", "names no account: add [accounts.<its id>]"),
        # keys and tokens
        ("[accounts.b]", "accounts.b.api_key", "is missing"),
        ("[accounts.b]\napi_key = ''", "accounts.b.api_key", "is empty, or has characters that cannot"),
        ("[accounts.b]\napi_key = 'a b'", "accounts.b.api_key", "is empty, or has characters that cannot"),
        ("[accounts.b]\napi_key = 'ä'", "accounts.b.api_key", "is empty, or has characters that cannot"),
        ("[accounts.b]\napi_key = 3", "accounts.b.api_key", "must be text"),
        ("[teams.b]\ntokens = ['x']", "teams.b.tokens[0].sha256", "must be sha256: and 64 hexadecimal digits"),
        (f"[teams.b]\ntokens = ['{DIGEST.upper()}']", "teams.b.tokens[0].sha256", "must be sha256: and 64"),
        (f"[teams.b]\ntokens = ['{OTHER_DIGEST}\\n']", "teams.b.tokens[0].sha256", "must be sha256: and 64"),
        (f"[teams.b]\ntokens = ['{OTHER_DIGEST}b']", "teams.b.tokens[0].sha256", "must be sha256: and 64"),
        (f"[teams.b]\ntokens = ['ep_{CANARY}']", "teams.b.tokens[0].sha256", "is the token itself: put its digest"),
        ("[teams.b]\ntokens = [{ label = 'x' }]", "teams.b.tokens[0].sha256", "is missing"),
        (f"[teams.b]\ntokens = ['{DIGEST}']", "teams.b.tokens[0]", "is the same token as teams.design.tokens[0]"),
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
def test_a_section_that_is_no_table(problems_of: Problems, section: str, value: str) -> None:
    rest = TEAM if section == "accounts" else ACCOUNT
    assert problems_of(f"{section} = {value}\n{rest}") == {section: "must be a table"}


@pytest.mark.parametrize("day", ["2027-06-30", '"2027-06-30"'])
def test_a_tokens_last_day(read: Read, day: str) -> None:
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
def test_no_other_value_is_taken_for_a_day(problems_of: Problems, day: str) -> None:
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


def test_nothing_at_all_says_what_to_do_first(problems_of: Problems) -> None:
    found = problems_of("")
    assert set(found) == {"accounts.default.api_key", "teams"}
    assert "RENDERNET_API_KEY" in found["accounts.default.api_key"]
    assert "estimate-proxy token new" in found["teams"]


def test_an_account_of_another_name_is_enough(read: Read, problems_of: Problems) -> None:
    account = "[accounts.b]\napi_key = 'k'\n"
    assert read(f"{account}[teams.a]\naccount = 'b'").teams["a"].account == "b"
    found = problems_of(f"{account}[teams.a]\n[teams.b]\n[teams.c]\naccount = 'x'")
    assert set(found) == {"accounts.default.api_key", "teams.c.account"}
    assert set(problems_of("[teams.c]\naccount = 'x'")) == {"teams.c.account"}
    assert "RENDERNET_API_KEY" in problems_of("[accounts.default]\n" + TEAM)["accounts.default.api_key"]


# --- URLs -------------------------------------------------------------------------------------------------------

CLEAR = "would send the API key in clear text: use https, or set upstream.insecure = true"
NO_URL = "is not a valid URL: a port is 1 to 65535"
NO_HOST = "must name a host"


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://api.example", CLEAR),
        ("http://10.0.0.1", CLEAR),
        ("http://localhost.example", CLEAR),
        ("http://[2001:db8::1]", CLEAR),
        (f"https://u:{CANARY}@h", "has a user, a query or a fragment"),
        ("https://@h", "has a user, a query or a fragment"),
        (f"https://h/?k={CANARY}", "has a user, a query or a fragment"),
        ("https://h?", "has a user, a query or a fragment"),
        ("https://h#", "has a user, a query or a fragment"),
        ("ftp://h", "must be a URL that begins with https:// or http://"),
        ("api.example", "must be a URL that begins with https://"),
        ("//h", "must be a URL that begins with https://"),
        ("", "must be a URL that begins with https://"),
        ("https://", NO_HOST),
        ("https:///x", NO_HOST),
        ("https://:443", NO_HOST),
        ("https://höst", NO_HOST),
        ("https://a\\\\b", NO_HOST),
        ("https://1.2.3", NO_HOST),
        ("https://[v1.a]", NO_HOST),
        ("https://h:0", NO_URL),
        ("https://h:99999", NO_URL),
        ("https://h:x", NO_URL),
        ("https://[::1", NO_URL),
        ("https://a b", NO_URL),
        ("https://h\\n", NO_URL),
        (f"https://h/{'a' * 2048}", NO_URL),
    ],
)
def test_a_base_url_that_cannot_be(problems_of: Problems, url: str, message: str) -> None:
    found = problems_of(MINIMAL + f'[upstream]\nbase_url = "{url}"')
    assert list(found) == ["upstream.base_url"]
    assert found["upstream.base_url"].startswith(message)


@pytest.mark.parametrize(
    "url",
    [
        "http://localhost",
        "http://LOCALHOST:1",
        "http://127.0.0.2:80/x",
        "http://[::1]:9",
        "HTTPS://h",
        "https://h/a/",
    ],
)
def test_a_base_url_that_can_be(read: Read, url: str) -> None:
    assert read(MINIMAL + f'[upstream]\nbase_url = "{url}"').upstream.base_url == url


def test_clear_text_takes_a_decision(read: Read, problems_of: Problems) -> None:
    clear = MINIMAL + '[upstream]\nbase_url = "http://mock.example"\n'
    assert read(clear + "insecure = true").upstream.insecure
    assert read(clear, {f"{ENV}UPSTREAM__INSECURE": "true"}).upstream.insecure
    assert problems_of(clear + "insecure = false") == {"upstream.base_url": CLEAR}
    for no in ("false", "0", "no", "off"):
        assert problems_of(clear, {f"{ENV}UPSTREAM__INSECURE": no}) == {"upstream.base_url": CLEAR}
    assert list(problems_of(clear, {f"{ENV}UPSTREAM__INSECURE": CANARY})) == ["upstream.insecure"]


HOSTS = (
    st.text("az09.-_[]:@%\\/é ", max_size=12) | st.from_regex(r"\A(\d{1,3}\.){3}\d{1,4}\Z") | st.ip_addresses().map(str)
)


@given(host=HOSTS, path=st.text(st.characters(exclude_categories=["Cs"]), max_size=8))
@example(host="a[b]", path="")
@example(host="[::1]a:1", path="")
@example(host="[::1]:", path="%zz/../é")
def test_what_is_accepted_is_the_address_that_is_asked(host: str, path: str) -> None:
    """Checked by one parser and used by another, a URL must not be read in two ways."""
    url = f"https://{host}/{path}"
    try:
        base_url = load_keying(Path(os.devnull), {f"{ENV}UPSTREAM__BASE_URL": url}).upstream.base_url
    except SettingsError:
        return
    asked = Address.of(base_url)
    assert asked.url.host == urlsplit(url).hostname
    assert (asked.url.port or None) == (urlsplit(url).port if urlsplit(url).port != 443 else None)
    assert asked.path.endswith("/pub/v1/generations/estimate")


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("rediss://h", "must be a URL that begins with redis:// or unix://"),
        ("redis+sentinel://h:1/m", "must be a URL that begins with redis://"),
        ("h:6379", "must be a URL that begins with redis://"),
        ("", "must be a URL that begins with redis://"),
        ("redis://", NO_HOST),
        ("redis:///0", NO_HOST),
        ("redis://h:0", NO_URL),
        ("redis://h:port", NO_URL),
        (f"redis://:{CANARY}/x@h", NO_URL),
        ("redis://h/prod", "must name its database by a number"),
        ("redis://h?db=x", "must name its database by a number"),
        ("redis://h?socket_timeout=60", "has options other than db, username and password"),
        (f"redis://h/0#{CANARY}", "has options other than db, username and password"),
        ("unix://", "must name a socket by its full path"),
        ("unix://run/valkey.sock", "must name a socket by its full path"),
    ],
)
def test_a_store_url_that_cannot_be(problems_of: Problems, url: str, message: str) -> None:
    for found in (problems_of(MINIMAL + f'[store]\nurl = "{url}"'), problems_of(environ={f"{ENV}STORE__URL": url})):
        assert list(found) == ["store.url"]
        assert found["store.url"].startswith(message)


@pytest.mark.parametrize(
    "url",
    ["redis://h", "redis://h/", "redis://u:p@h:1/15", "redis://:p%23@[::1]?db=1", "unix:///s", "unix://u:p@/s?db=2"],
)
def test_a_store_url_that_can_be(read: Read, url: str) -> None:
    store = read(environ={"REDIS_URL": url}).store
    assert store.url is not None
    assert store.url.get_secret_value() == url


@pytest.mark.parametrize("url", ["socks5://h", f"u:{CANARY}@h", "http://", f"http://u:{CANARY}@h:0", ""])
def test_a_proxy_that_cannot_be(problems_of: Problems, url: str) -> None:
    assert list(problems_of(MINIMAL + f'[upstream]\nproxy = "{url}"')) == ["upstream.proxy"]


def test_a_ca_file(read: Read, problems_of: Problems, tmp_path: Path) -> None:
    text = MINIMAL + '[upstream]\nca_file = "ca.pem"'
    path = "upstream.ca_file"
    assert problems_of(text) == {path: "names a file that cannot be read: No such file or directory"}
    (tmp_path / "ca.pem").write_text(CANARY)
    assert problems_of(text) == {path: "names a file without certificates in PEM form"}
    (tmp_path / "ca.pem").unlink()
    (tmp_path / "ca.pem").mkdir()
    assert problems_of(text) == {path: "names a file that cannot be read: Is a directory"}
    certificates = next(Path(os.__file__).parent.rglob("*/cacert.pem"), None)
    if certificates is not None:
        assert read(MINIMAL + f'[upstream]\nca_file = "{certificates}"').upstream.ca_file == certificates


# --- The file ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"a = 1\nb == {CANARY}", r"is not valid TOML: .*\(at line 2, column 4\)"),
        (f"[accounts.default]\napi_key = {CANARY}", r"is not valid TOML: .*\(at line 2, column 11\)"),
        (f"api_key = '{CANARY}\n", "is not valid TOML: .*(at end of document|at line 1)"),
        (f"{CANARY}\n", r"is not valid TOML: .*\(at line 1, column \d+\)"),
        ("[server]\nport = 1\n[server]\n", r"is not valid TOML: .*\(at line 3, column \d+\)"),
        ("a = " + "[" * 10_000, "is not valid TOML: .*nested too deeply"),
        ("a = " + "1" * 10_000, "is not valid TOML: .*too many digits"),
        (b"a = '\xff'", "is not UTF-8 text"),
        ("a = 1\n".encode("utf-16"), "is not UTF-8 text"),
        ("#" * (4 * 2**20 + 1), "has more than 4194304 bytes"),
    ],
)
def test_a_file_that_is_no_toml(problems_of: Problems, tmp_path: Path, text: str | bytes, message: str) -> None:
    found = problems_of(text)
    assert list(found) == [str(tmp_path / "config.toml")]
    assert re.match(message, found[str(tmp_path / "config.toml")]), found


def test_a_mark_before_the_text_is_no_fault(read: Read) -> None:
    assert read(b"\xef\xbb\xbf" + MINIMAL.replace("\n", "\r\n").encode()).teams


def complaint(config_file: Path | None, environ: Mapping[str, str]) -> str:
    with pytest.raises(SettingsError) as caught:
        load(config_file, environ)
    (problem,) = caught.value.problems
    return f"{problem.path} {problem.message}"


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    missing = tmp_path / "missing.toml"
    assert complaint(missing, {}) == f"{missing} cannot be read: No such file or directory"
    assert complaint(None, {"ESTIMATE_PROXY_CONFIG": str(missing)}).startswith(f"{missing} cannot be read")
    assert complaint(tmp_path, {}) == f"{tmp_path} cannot be read: Is a directory"
    assert "cannot be read" in complaint(Path("a\0b"), {})
    assert complaint(Path("/proc/self/mem"), {}) == "/proc/self/mem cannot be read: Input/output error"


def test_which_file_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    places = tmp_path / "first.toml", tmp_path / "second.toml"
    monkeypatch.setattr(config, "PLACES", places)
    environ = {"RENDERNET_API_KEY": "k", f"{ENV}TEAMS__A__NAME": "A", "ESTIMATE_PROXY_CONFIG": ""}

    def port(option: Path | None = None, more: Mapping[str, str] = {}) -> int:
        return load(option, {**environ, **more}).server.port

    assert port() == 8080, "no file is no fault"
    places[1].write_text("server.port = 2")
    assert port() == 2
    places[0].write_text("server.port = 1")
    assert port() == 1
    (tmp_path / "named.toml").write_text("server.port = 3")
    named = {"ESTIMATE_PROXY_CONFIG": str(tmp_path / "named.toml")}
    assert port(None, named) == 3
    (tmp_path / "option.toml").write_text("server.port = 4")
    assert port(tmp_path / "option.toml", named) == 4
    places[0].unlink()
    places[0].mkdir()  # what a container makes of a missing file to be mounted
    assert "Is a directory" in complaint(None, environ)


def test_the_real_places() -> None:
    assert (Path("estimate-proxy.toml"), Path("/etc/estimate-proxy/config.toml")) == config.PLACES


# --- The environment --------------------------------------------------------------------------------------------


def test_variables_win_over_the_file_and_options_over_both(read: Read) -> None:
    text = MINIMAL + "[server]\nport = 1\nhost = 'h'"
    environ = {f"{ENV}SERVER__PORT": "9000"}
    assert read(text, environ).server.port == 9000
    assert read(text, environ).server.host == "h"
    assert read(text, environ, overrides={"server": {"port": 7}}).server.port == 7


def test_variables_reach_every_depth(read: Read) -> None:
    settings = read(
        environ={
            f"{ENV}CACHE__TTL_S": "1.5",
            f"{ENV}TEAMS__DESIGN__DISABLED": "true",
            f"{ENV}TEAMS__OTHER__TOKENS": f'["{OTHER_DIGEST}"]',
            f"{ENV}TEAMS__THIRD": '{"name": "Third", "disabled": true}',
            f"{ENV}TEAMS__THIRD__NAME": "3",
            f"{ENV}STORE__USERNAME": "007",
        }
    )
    assert settings.cache.ttl_s == 1.5
    assert settings.teams["design"].disabled
    assert settings.teams["design"].tokens[0].sha256 == DIGEST, "the rest of the table stays"
    assert settings.teams["other"].tokens[0].sha256 == OTHER_DIGEST
    assert (settings.teams["third"].name, settings.teams["third"].disabled) == ("3", True)
    assert settings.store.username == "007"


@pytest.mark.parametrize("secret", ["[brackets", "{braces}", '["x"]', "true", "12"])
def test_a_secret_is_never_read_as_json(read: Read, secret: str) -> None:
    settings = read(environ={f"{ENV}STORE__PASSWORD": secret, f"{ENV}ACCOUNTS__DEFAULT__API_KEY": secret})
    assert settings.store.password == SecretText(secret)
    assert settings.accounts["default"].api_key.get_secret_value() == secret


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("SERVER__PRT", "server.prt"),
        ("SERVER__PORT__X", "server.port"),
        ("PORT__X", "port"),
        ("CONFIG__X", "config"),
        ("TEAMS__A_B__NAME", "teams.a_b"),
        ("SERVER__", f"{ENV}SERVER__"),
        ("__PORT", f"{ENV}__PORT"),
        ("_SERVER__PORT", "_server"),
        ("SERVER____PORT", f"{ENV}SERVER____PORT"),
    ],
)
def test_an_unknown_variable_of_ours_is_an_error(problems_of: Problems, name: str, path: str) -> None:
    assert list(problems_of(environ={ENV + name: CANARY})) == [path]


@pytest.mark.parametrize("value", [f"[{CANARY}", f"{{{CANARY}", "[" * 100_000, "[" + "1" * 5000 + "]"])
def test_a_variable_that_begins_like_json(problems_of: Problems, value: str) -> None:
    name = f"{ENV}TEAMS__DESIGN__TOKENS"
    assert problems_of(environ={name: value}) == {name: "begins like JSON, but is none"}


def test_what_kubernetes_injects_is_not_ours(read: Read) -> None:
    injected = {
        "ESTIMATE_PROXY_PORT": "tcp://10.0.0.1:8080",
        "ESTIMATE_PROXY_SERVICE_HOST": "10.0.0.1",
        "ESTIMATE_PROXY_SERVICE_PORT_HTTP": "8080",
        "ESTIMATE_PROXY_PORT_8080_TCP": "tcp://10.0.0.1:8080",
        "ESTIMATE_PROXY_PORT_8080_TCP_ADDR": "10.0.0.1",
        "OTHER__THING": "1",
    }
    assert read(environ=injected) == read()


def test_familiar_variables(read: Read, problems_of: Problems) -> None:
    def key(environ: dict[str, str], text: str = MINIMAL) -> str:
        return read(text, environ).accounts["default"].api_key.get_secret_value()

    assert key({"RENDERNET_API_KEY": "env"}) == "env"
    assert key({"RENDERNET_API_KEY": "env"}, TEAM) == "env"
    assert key({"RENDERNET_API_KEY": ""}) == CANARY, "empty is not set"
    assert key({"RENDERNET_API_KEY": "env", f"{ENV}ACCOUNTS__DEFAULT__API_KEY": "ours"}) == "ours"
    assert read(environ={"REDIS_URL": ""}).store.url is None
    ours = read(environ={"REDIS_URL": "redis://a", f"{ENV}STORE__URL": "redis://b"}).store.url
    assert str(ours) == "redis://b"
    assert problems_of(environ={"REDIS_URL": CANARY}) == {
        "store.url": "must be a URL that begins with redis:// or unix://"
    }
    assert list(problems_of(TEAM, {"RENDERNET_API_KEY": f"{CANARY}\n"})) == ["accounts.default.api_key"]


def test_an_empty_variable_is_a_value(problems_of: Problems) -> None:
    assert list(problems_of(environ={f"{ENV}SERVER__PORT": ""})) == ["server.port"]
    assert list(problems_of(environ={f"{ENV}SERVER__HOST": ""})) == ["server.host"]


# --- Secret files -----------------------------------------------------------------------------------------------

KEY_FILE = "[accounts.default]\napi_key_file = 'key'\n" + TEAM


@pytest.mark.parametrize("content", [b"k", b"k\n", b"k\r\n", b"k\n\n", b"\xef\xbb\xbfk\n"])
def test_a_secret_file_is_relative_to_the_config(read: Read, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "key").write_bytes(content)
    assert read(KEY_FILE).accounts["default"].api_key.get_secret_value() == "k"


def test_a_password_file_keeps_its_spaces(read: Read, tmp_path: Path) -> None:
    (tmp_path / "pw").write_text(" a b \n")
    assert read(environ={f"{ENV}STORE__PASSWORD_FILE": "pw"}).store.password == SecretText(" a b ")
    absolute = read(MINIMAL + f"[store]\npassword_file = '{tmp_path / 'pw'}'")
    assert absolute.store.password == SecretText(" a b ")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "names a file that cannot be read: No such file or directory"),
        (b"", "names an empty file"),
        (b"\n", "names an empty file"),
        (b"\xff\x00" + CANARY.encode(), "names a file that is not UTF-8 text"),
        (CANARY.encode() * 10_000, "names a file that has more than 65536 bytes"),
    ],
)
def test_a_secret_file_that_cannot_be(
    problems_of: Problems, tmp_path: Path, content: bytes | None, message: str
) -> None:
    if content is not None:
        (tmp_path / "key").write_bytes(content)
    assert problems_of(KEY_FILE) == {"accounts.default.api_key_file": message}


@pytest.mark.parametrize("content", [f"{CANARY}\0", f"{CANARY}\nmore", f"{CANARY} x"])
def test_a_secret_file_with_something_else(problems_of: Problems, tmp_path: Path, content: str) -> None:
    (tmp_path / "key").write_text(content)
    assert list(problems_of(KEY_FILE)) == ["accounts.default.api_key"]


@pytest.mark.parametrize("name", ["3", "''", "['x']", "true", '"a\\u0000"', "'/'"])
def test_a_secret_files_name_that_cannot_be(problems_of: Problems, name: str) -> None:
    found = problems_of(f"[accounts.default]\napi_key_file = {name}\n" + TEAM)
    assert list(found) == ["accounts.default.api_key_file"]


def test_a_secret_twice_in_one_source(problems_of: Problems) -> None:
    twice = {"accounts.default.api_key_file": "stands beside api_key: keep one of them"}
    assert problems_of(ACCOUNT + "api_key_file = 'key'\n" + TEAM) == twice
    ours = {f"{ENV}ACCOUNTS__DEFAULT__API_KEY": CANARY, f"{ENV}ACCOUNTS__DEFAULT__API_KEY_FILE": "key"}
    assert problems_of(environ=ours) == twice
    assert list(problems_of(MINIMAL + "[store]\npassword = 'x'\npassword_file = 'y'")) == ["store.password_file"]


def test_a_later_source_replaces_either_spelling(read: Read, tmp_path: Path) -> None:
    """The file of an earlier source is not even looked for: it may exist in production alone."""

    def key(text: str, **environ: str) -> str:
        return read(text, environ).accounts["default"].api_key.get_secret_value()

    assert key(KEY_FILE, RENDERNET_API_KEY="env") == "env"
    assert key(KEY_FILE, ESTIMATE_PROXY_ACCOUNTS__DEFAULT__API_KEY="ours") == "ours"
    (tmp_path / "other").write_text("file")
    for text in (MINIMAL, KEY_FILE):
        assert key(text, ESTIMATE_PROXY_ACCOUNTS__DEFAULT__API_KEY_FILE="other", RENDERNET_API_KEY="env") == "file"


# --- Parts ------------------------------------------------------------------------------------------------------


def test_upstream_alone_needs_nothing_else(tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_text("[upstream]\nbase_url = 'https://h'\nca_file = 'missing'\n[teams.X]\nwhat = 1\n[accounts]\na = 3")
    environ = {f"{ENV}TEAMS__X": "[", f"{ENV}UPSTREAM__TIMEOUT_S": "3", f"{ENV}X__Y": "1"}
    upstream = load_keying(file, environ).upstream
    assert (upstream.base_url, upstream.timeout_s) == ("https://h", 3.0)
    assert load_keying(Path(os.devnull), {}).upstream.base_url == "https://api.rendernet.ai"


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("[upstream]\ntimout_s = 1", "upstream.timout_s"),
        ("upstream = 3", "upstream"),
        ("[upstream]\nbase_url = 'x'", "upstream.base_url"),
        ("[upstream", "config.toml"),
    ],
)
def test_upstream_alone_says_where_it_is_wrong(tmp_path: Path, text: str, path: str) -> None:
    file = tmp_path / "config.toml"
    file.write_text(text)
    with pytest.raises(SettingsError) as caught:
        load_keying(file, {})
    (problem,) = caught.value.problems
    assert problem.path.endswith(path)
    assert path != "upstream.timout_s" or problem.message == "is not a setting: did you mean timeout_s?"


@given(st.from_regex(r"\A[a-z0-9]([a-z0-9-]{0,62}[a-z0-9])?\Z"))
def test_identifiers(value: str) -> None:
    assert is_identifier(value) == (len(value) <= 64 and not value.endswith("\n"))
    assert not any(map(is_identifier, (f"{value}-", f"-{value}", f"{value}\n", f"{value}A", f"{value}_", "")))
