"""Settings: each wrong input is one clear line, and no line shows a value."""

import os
import pickle
import re
from collections.abc import Mapping
from datetime import date
from pathlib import Path
from types import UnionType
from typing import Any, get_args
from urllib.parse import urlsplit

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from configs import ACCOUNT, CANARY, DIGEST, ENV, MINIMAL, OTHER_DIGEST, TEAM, Problems, Read
from proxy.config import load_keying
from proxy.settings import MASK, SecretText, SecretUrl, Settings, effective, is_identifier, masked_url, warnings
from proxy.settings_problems import SettingsError
from proxy.upstream import Address
from topologies import papers


@pytest.fixture
def read(tmp_path: Path) -> Read:
    return Read(tmp_path)


@pytest.fixture
def problems_of(read: Read) -> Problems:
    return Problems(read)


# --- What is in force -------------------------------------------------------------------------------------------


def test_defaults(read: Read) -> None:
    settings = read()
    assert settings.server.model_dump() == {
        "host": "127.0.0.1",
        "port": 8080,
        "workers": 1,
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
    assert settings.store.on_outage == "refuse"
    assert settings.cache.url is None
    assert settings.cache.ttl_s == 3600.0
    assert settings.org.id == "default"
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
        on_outage = "admit"
        [cache]
        url = "redis://:p@evicting/1"
        ttl_s = 1.5
        [org]
        id = "studio-1"
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
    assert settings.store.on_outage == "admit"
    assert settings.cache.url == SecretUrl("redis://:p@evicting/1")
    assert settings.org.id == "studio-1"
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
    assert len(rows) == 47


MANUAL = Path(__file__).parent.parent / "docs" / "configuration.md"


def unset(section: BaseModel, parent: str = "") -> list[str]:
    """The paths of all that is left to its default."""
    found = []
    for name, value in section:
        path = f"{parent}{name}"
        if name not in section.model_fields_set:
            found.append(path)
            continue
        inner = list(value.values()) if isinstance(value, dict) else value if isinstance(value, tuple) else [value]
        for one in inner:
            found += unset(one, f"{path}.") if isinstance(one, BaseModel) else []
    return found


def test_the_manual_shows_every_setting_in_a_config_that_can_be_used(read: Read, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("s")
    (shown,) = re.findall(r"```toml\n(.*?)```", MANUAL.read_text(), re.DOTALL)
    text = re.sub(r"^# (?=\w+ = )", "", shown, flags=re.MULTILINE)
    text = re.sub(r'_file = "/run/secrets/\w+"', '_file = "secret"', text)
    text = re.sub("^(ca|cert|key)_file = .*", "", text, flags=re.MULTILINE)  # needs files with certificates
    for letter in "ab":
        text = text.replace("sha256:…", f"sha256:{letter * 64}", 1)
    left_out = {"upstream.ca_file", "teams.tokens.label", "teams.tokens.expires", "org.quotas.on_exceed"}
    assert set(unset(read(text))) == left_out | {"store.ca_file", "store.cert_file", "store.key_file"}
    assert shown.count("# ca_file = ") == 2
    assert shown.count("# cert_file = ") == shown.count("# key_file = ") == 1


# --- Secrets ----------------------------------------------------------------------------------------------------


def test_settings_never_show_a_secret_but_pickle_keeps_it(read: Read) -> None:
    settings = read(
        MINIMAL
        + f'[store]\nurl = "redis://:{CANARY}@h"\npassword = "{CANARY}"\n'
        + f'[upstream]\nproxy = "http://u:{CANARY}@p"\n'
        + f'[cache]\nurl = "redis://:{CANARY}@c"\n'
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
        str(settings.cache.url),
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
        if isinstance(inner, UnionType):  # `Rate | None`
            inner = get_args(inner)[0]
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
    "quotas": f'[{{ measure = "{CANARY}", limit = "{CANARY}", per = "{CANARY}", on_exceed = ["{CANARY}"] }}]',
    "true": "true",
    "number": "-1",
    "fraction": "0.25",
    "nan": "nan",
    "date": "2027-06-30",
}


def test_all_paths_are_found() -> None:
    assert len(ALL_PATHS) == 61
    assert ("teams", "design", "tokens") in ALL_PATHS
    assert ("teams", "design", "rate", "burst") in ALL_PATHS
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
        ("[cache]\nsize = 1", "cache.size", "is not a setting; known here: url, ttl_s"),
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
        ("[org]\ntimezone = '../UTC'", "org.timezone", "must be a time zone's name"),
        ("[cache]\nignore = ['seed', '']", "cache.ignore[1]", "must be a member's name, or several joined by dots"),
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
        (f"[metrics]\ntokens = ['{DIGEST}']", "metrics.tokens[0]", "is the same token as teams.design.tokens[0]"),
        (f"[admin]\ntokens = ['{DIGEST}']", "admin.tokens[0]", "is the same token as teams.design.tokens[0]"),
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
        ("https://[::1", NO_HOST),
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
        ("redis+unix://h", "must be a URL that begins with redis://, rediss://, unix://, redis+sentinel://, "),
        ("redis+sentinel://h:1", "must name the primary, such as redis+sentinel://host:26379/mymaster/0"),
        ("redis+sentinel://h:1/m/prod", "must name the primary"),
        (f"redis+sentinel://:{CANARY}@h:1,,i:2/m", NO_HOST),
        ("redis+sentinel://h:1,i:0/m", NO_URL),
        ("redis+sentinel:///m", NO_HOST),
        ("redis+cluster://h:port", NO_URL),
        ("redis+cluster://h,i h", NO_URL),
        ("redis+cluster://h,-", NO_HOST),
        ("redis+cluster://h/1", "names a database: a cluster has only number 0"),
        ("rediss+cluster://h?ssl_cert_reqs=none", "has options other than db, username and password"),
        (f"redis+cluster://{'h,' * 32}h", "names more than 32 servers"),
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
    for section in ("store", "cache"):
        variable = {f"{ENV}{section.upper()}__URL": url}
        for found in (problems_of(MINIMAL + f'[{section}]\nurl = "{url}"'), problems_of(environ=variable)):
            assert list(found) == [f"{section}.url"]
            assert found[f"{section}.url"].startswith(message)


@pytest.mark.parametrize(
    "url",
    [
        *("redis://h", "redis://h/", "redis://u:p@h:1/15", "redis://:p%23@[::1]?db=1", "rediss://u:p@h:1/2"),
        *("unix:///s", "unix://u:p@/s?db=2"),
        *("redis+sentinel://h/m", "rediss+sentinel://u:p@h:1,i,[::1]:2/my-master/3", "redis+sentinel://h/m?db=1"),
        *("redis+cluster://h", "rediss+cluster://u:p@h:1,[::1]:2,127.0.0.1", "redis+cluster://h/0"),
    ],
)
def test_a_store_url_that_can_be(read: Read, url: str) -> None:
    settings = read(environ={"REDIS_URL": url, f"{ENV}CACHE__URL": url})
    assert settings.store.url == settings.cache.url == SecretUrl(url)


def test_redis_url_is_the_stores_alone(read: Read) -> None:
    settings = read(environ={"REDIS_URL": "redis://h"})
    assert settings.store.url == SecretUrl("redis://h")
    assert settings.cache.url is None


@pytest.mark.parametrize("url", ["socks5://h", f"u:{CANARY}@h", "http://", f"http://u:{CANARY}@h:0", ""])
def test_a_proxy_that_cannot_be(problems_of: Problems, url: str) -> None:
    assert list(problems_of(MINIMAL + f'[upstream]\nproxy = "{url}"')) == ["upstream.proxy"]


@pytest.mark.parametrize("section", ["upstream", "store"])
def test_a_ca_file(read: Read, problems_of: Problems, tmp_path: Path, section: str) -> None:
    text = MINIMAL + f'[{section}]\nca_file = "ca.pem"'
    path = f"{section}.ca_file"
    assert problems_of(text) == {path: "names a file that cannot be read: No such file or directory"}
    (tmp_path / "ca.pem").write_text(CANARY)
    assert problems_of(text) == {path: "names a file without certificates in PEM form"}
    (tmp_path / "ca.pem").unlink()
    (tmp_path / "ca.pem").mkdir()
    assert problems_of(text) == {path: "names a file that cannot be read: Is a directory"}
    certificates = next(Path(os.__file__).parent.rglob("*/cacert.pem"), None)
    if certificates is not None:
        found = read(MINIMAL + f'[{section}]\nca_file = "{certificates}"')
        assert (found.upstream if section == "upstream" else found.store).ca_file == certificates


def test_certificates_that_nothing_uses_are_warned_of(read: Read, tmp_path: Path) -> None:
    made = papers(tmp_path)
    text = f'{MINIMAL}[metrics]\npublic = true\n[store]\nca_file = "{made.ca}"\n'
    assert list(warnings(read(text))) == [
        "store.ca_file and store.cert_file are not used: no URL of a store begins with rediss"
    ]
    assert not list(warnings(read(text + 'url = "rediss+sentinel://h/m"')))
    assert not list(warnings(read(text + '[cache]\nurl = "rediss://h"')))


def test_a_client_certificate_of_the_store(read: Read, problems_of: Problems, tmp_path: Path) -> None:
    text = MINIMAL + '[store]\ncert_file = "client.pem"\nkey_file = "client.key"\n'
    missing = "names a file that cannot be read: No such file or directory"
    assert problems_of(text) == {"store.cert_file": missing, "store.key_file": missing}
    assert problems_of(MINIMAL + '[store]\nkey_file = "client.key"') == {
        "store.cert_file": "is missing: store.key_file is its key",
        "store.key_file": missing,
    }
    made = papers(tmp_path)
    settings = read(text)
    assert (settings.store.cert_file, settings.store.key_file) == (made.cert("client"), made.key("client"))
    no_pair = "and store.key_file are no certificate and its key, in PEM form and without a passphrase"
    assert problems_of(text.replace("client.key", "server.key")) == {"store.cert_file": no_pair}
    (tmp_path / "client.pem").write_text(CANARY)
    assert problems_of(text) == {"store.cert_file": no_pair}


@given(st.from_regex(r"\A[a-z0-9]([a-z0-9-]{0,62}[a-z0-9])?\Z"))
def test_identifiers(value: str) -> None:
    assert is_identifier(value) == (len(value) <= 64 and not value.endswith("\n"))
    assert not any(map(is_identifier, (f"{value}-", f"-{value}", f"{value}\n", f"{value}A", f"{value}_", "")))
