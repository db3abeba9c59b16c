"""Secrets in the settings: no output contains them, and no error repeats a value."""

import pickle
from collections.abc import Mapping
from types import UnionType
from typing import Any, get_args

import pytest
from pydantic import BaseModel, ValidationError

from configs import ACCOUNT, CANARY, ENV, MINIMAL, Read
from proxy.settings.errors import SettingsError
from proxy.settings.loader import PATH_KEYS
from proxy.settings.masking import MASK, SecretText, SecretUrl, masked_url
from proxy.settings.schema import Settings, effective


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


def test_pydantics_own_messages_show_no_value_either() -> None:
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
    assert len(ALL_PATHS) == 78
    assert ("teams", "design", "tokens") in ALL_PATHS
    assert ("teams", "design", "rate", "burst") in ALL_PATHS
    assert ("accounts", "default", "api_key") in ALL_PATHS


def errors_of(read: Read, text: str, environ: Mapping[str, str] | None = None) -> str:
    """Returns the errors of a config as text; empty if it is valid."""
    try:
        read(text, environ)
    except SettingsError as error:
        errors = f"{error}\n{error!r}\n{error.problems}"
        for path in PATH_KEYS:  # a missing file is named
            errors = errors.replace(f"{'.'.join(path)}: names {read.folder / CANARY},", "")
            errors = errors.replace(f"path='{'.'.join(path)}', message='names {read.folder / CANARY},", "")
        return errors
    return ""


@pytest.mark.parametrize("path", ALL_PATHS, ids=".".join)
def test_no_error_shows_a_value(read: Read, path: tuple[str, ...]) -> None:
    """Any value at any path is accepted, or the error does not repeat it; it may name a missing file."""
    errors = [
        errors_of(read, f"{'.'.join(path)} = {wrong}\n{'' if path[0] == 'accounts' else ACCOUNT}")
        for wrong in WRONG.values()
    ]
    assert CANARY.lower() not in "".join(errors).lower()
    assert "input" not in "".join(errors).lower(), "pydantic's own message"
    assert sum(".".join(path[:1]) in text for text in errors) > len(WRONG) // 2


@pytest.mark.parametrize("path", [path for path in ALL_PATHS if len(path) > 1], ids=".".join)
def test_no_error_shows_a_variables_value(read: Read, path: tuple[str, ...]) -> None:
    name = ENV + "__".join(path).upper()
    values = CANARY, f'["{CANARY}"]', f'{{"{path[-1]}": "{CANARY}"}}', f"[{CANARY}", f"\udcff{CANARY}\n"
    errors = [errors_of(read, MINIMAL, {name: value}) for value in values]
    assert CANARY.lower() not in "".join(errors).lower()
    assert any(errors)
