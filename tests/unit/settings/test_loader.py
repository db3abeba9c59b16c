"""Sources of settings: the file, the environment and secret files, with one clear line for each that cannot be read."""

import os
import re
from collections.abc import Mapping
from pathlib import Path

import pytest

from configs import ACCOUNT, CANARY, DIGEST, ENV, MINIMAL, OTHER_DIGEST, TEAM, Problems, Read
from proxy.settings import loader
from proxy.settings.errors import SettingsError
from proxy.settings.loader import load, load_key_settings
from proxy.settings.masking import SecretText

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
def test_a_file_that_is_not_toml_is_refused(
    problems_of: Problems, tmp_path: Path, text: str | bytes, message: str
) -> None:
    found = problems_of(text)
    assert list(found) == [str(tmp_path / "config.toml")]
    assert re.match(message, found[str(tmp_path / "config.toml")]), found


def test_a_byte_order_mark_is_accepted(read: Read) -> None:
    assert read(b"\xef\xbb\xbf" + MINIMAL.replace("\n", "\r\n").encode()).teams


def complaint(config_file: Path | None, environ: Mapping[str, str]) -> str:
    with pytest.raises(SettingsError) as caught:
        load(config_file, environ)
    (problem,) = caught.value.problems
    return f"{problem.path} {problem.message}"


def test_an_unreadable_file_is_refused(tmp_path: Path) -> None:
    missing = tmp_path / "missing.toml"
    assert complaint(missing, {}) == f"{missing} cannot be read: No such file or directory"
    assert complaint(None, {"ESTIMATE_PROXY_CONFIG": str(missing)}).startswith(f"{missing} cannot be read")
    assert complaint(tmp_path, {}) == f"{tmp_path} cannot be read: Is a directory"
    assert "cannot be read" in complaint(Path("a\0b"), {})
    assert complaint(Path("/proc/self/mem"), {}) == "/proc/self/mem cannot be read: Input/output error"


def test_the_first_existing_file_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    places = tmp_path / "first.toml", tmp_path / "second.toml"
    monkeypatch.setattr(loader, "DEFAULT_PATHS", places)
    environ = {"RENDERNET_API_KEY": "k", f"{ENV}TEAMS__A__NAME": "A", "ESTIMATE_PROXY_CONFIG": ""}

    def port(option: Path | None = None, more: Mapping[str, str] = {}) -> int:
        return load(option, {**environ, **more}).server.port

    assert port() == 8080, "a missing default file is not an error"
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
    places[0].mkdir()  # a container runtime creates a directory for a missing file to mount
    assert "Is a directory" in complaint(None, environ)


def test_the_default_paths() -> None:
    assert (Path("estimate-proxy.toml"), Path("/etc/estimate-proxy/config.toml")) == loader.DEFAULT_PATHS


# --- The environment --------------------------------------------------------------------------------------------


def test_variables_override_the_file_and_options_override_both(read: Read) -> None:
    text = MINIMAL + "[server]\nport = 1\nhost = 'h'"
    environ = {f"{ENV}SERVER__PORT": "9000"}
    assert read(text, environ).server.port == 9000
    assert read(text, environ).server.host == "h"
    assert read(text, environ, overrides={"server": {"port": 7}}).server.port == 7


def test_variables_set_nested_settings(read: Read) -> None:
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
    assert settings.teams["design"].tokens[0].sha256 == DIGEST, "the rest of the table is kept"
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
def test_a_variable_that_begins_like_json_must_be_json(problems_of: Problems, value: str) -> None:
    name = f"{ENV}TEAMS__DESIGN__TOKENS"
    assert problems_of(environ={name: value}) == {name: "begins like JSON, but is not valid JSON"}


def test_variables_injected_by_kubernetes_are_ignored(read: Read) -> None:
    injected = {
        "ESTIMATE_PROXY_PORT": "tcp://10.0.0.1:8080",
        "ESTIMATE_PROXY_SERVICE_HOST": "10.0.0.1",
        "ESTIMATE_PROXY_SERVICE_PORT_HTTP": "8080",
        "ESTIMATE_PROXY_PORT_8080_TCP": "tcp://10.0.0.1:8080",
        "ESTIMATE_PROXY_PORT_8080_TCP_ADDR": "10.0.0.1",
        "OTHER__THING": "1",
    }
    assert read(environ=injected) == read()


def test_well_known_variables_are_read(read: Read, problems_of: Problems) -> None:
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
        "store.url": "must be a URL that begins with redis://, rediss://, unix://, redis+sentinel://, "
        "rediss+sentinel://, redis+cluster:// or rediss+cluster:// (set by the variable REDIS_URL)"
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
        (None, "which cannot be read: No such file or directory"),
        (b"", "which is empty"),
        (b"\n", "which is empty"),
        (b"\xff\x00" + CANARY.encode(), "which is not UTF-8 text"),
        (CANARY.encode() * 10_000, "which has more than 65536 bytes"),
    ],
)
def test_an_unreadable_or_empty_secret_file_is_refused(
    problems_of: Problems, tmp_path: Path, content: bytes | None, message: str
) -> None:
    if content is not None:
        (tmp_path / "key").write_bytes(content)
    assert problems_of(KEY_FILE) == {"accounts.default.api_key_file": f"names a file in {tmp_path}, {message}"}
    absolute = KEY_FILE.replace("'key'", f"'{tmp_path / 'key'}'")
    assert problems_of(absolute) == {"accounts.default.api_key_file": f"names {tmp_path / 'key'}, {message}"}


@pytest.mark.parametrize("content", [f"{CANARY}\0", f"{CANARY}\nmore", f"{CANARY} x"])
def test_a_secret_file_and_a_value_together_are_refused(problems_of: Problems, tmp_path: Path, content: str) -> None:
    (tmp_path / "key").write_text(content)
    assert list(problems_of(KEY_FILE)) == ["accounts.default.api_key"]


@pytest.mark.parametrize("name", ["3", "''", "['x']", "true", '"a\\u0000"', "'/'"])
def test_an_invalid_name_of_a_secret_file_is_refused(problems_of: Problems, name: str) -> None:
    found = problems_of(f"[accounts.default]\napi_key_file = {name}\n" + TEAM)
    assert list(found) == ["accounts.default.api_key_file"]


def test_a_secret_given_twice_in_one_source_is_refused(problems_of: Problems) -> None:
    twice = {"accounts.default.api_key_file": "is set together with api_key: keep one of them"}
    assert problems_of(ACCOUNT + "api_key_file = 'key'\n" + TEAM) == twice
    ours = {f"{ENV}ACCOUNTS__DEFAULT__API_KEY": CANARY, f"{ENV}ACCOUNTS__DEFAULT__API_KEY_FILE": "key"}
    assert list(problems_of(environ=ours)) == list(twice)
    assert list(problems_of(MINIMAL + "[store]\npassword = 'x'\npassword_file = 'y'")) == ["store.password_file"]


def test_a_later_source_replaces_a_secret_in_either_form(read: Read, tmp_path: Path) -> None:
    """The file of an earlier source is not read: it may exist in production only."""

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
    upstream = load_key_settings(file, environ).upstream
    assert (upstream.base_url, upstream.timeout_s) == ("https://h", 3.0)
    assert load_key_settings(Path(os.devnull), {}).upstream.base_url == "https://api.rendernet.ai"


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("[upstream]\ntimout_s = 1", "upstream.timout_s"),
        ("upstream = 3", "upstream"),
        ("[upstream]\nbase_url = 'x'", "upstream.base_url"),
        ("[upstream", "config.toml"),
    ],
)
def test_upstream_alone_reports_the_path_of_an_error(tmp_path: Path, text: str, path: str) -> None:
    file = tmp_path / "config.toml"
    file.write_text(text)
    with pytest.raises(SettingsError) as caught:
        load_key_settings(file, {})
    (problem,) = caught.value.problems
    assert problem.path.endswith(path)
    assert path != "upstream.timout_s" or problem.message == "is not a setting: did you mean timeout_s?"
