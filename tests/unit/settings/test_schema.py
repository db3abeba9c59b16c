"""The settings: defaults, all keys, the list of effective values, and the documented example."""

import re
from datetime import date
from pathlib import Path

import pytest
from pydantic import BaseModel

from configs import CANARY, DIGEST, MINIMAL, OTHER_DIGEST, Read
from proxy.settings.masking import MASK, SecretUrl
from proxy.settings.schema import effective


def test_defaults(read: Read) -> None:
    settings = read()
    assert settings.server.model_dump() == {
        "host": "127.0.0.1",
        "port": 8080,
        "workers": 1,
        "max_body_bytes": 262_144,
        "request_timeout_s": 15.0,
        "head_timeout_s": 10.0,
        "drain_delay_s": 5.0,
        "drain_s": 30.0,
        "cors_origins": (),
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
    assert (settings.store.timeout_s, settings.store.connect_timeout_s) == (0.25, 2.0)
    assert settings.cache.url is None
    assert settings.cache.ttl_s == 3600.0
    assert (settings.cache.learn, settings.cache.learn_from, settings.cache.audit_one_in) == ("observe", 100, 25)
    assert (settings.cache.never_learn, settings.teams["design"].infer) == ((), True)
    assert settings.org.id == "default"
    assert settings.org.zone.key == "UTC"
    assert settings.teams["design"].tokens[0].sha256 == DIGEST
    assert (settings.log.level, settings.log.format) == ("info", "auto")


def test_every_setting_can_be_set(read: Read, tmp_path: Path) -> None:
    (tmp_path / "key").write_text("k2\n")
    settings = read(
        f"""
        [server]
        host = "::1"
        port = 0
        max_body_bytes = 2
        request_timeout_s = 1
        head_timeout_s = 2
        drain_s = 0
        cors_origins = ["https://tools.example.com", "http://localhost:3000", "http://[::1]:8080"]
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
        timeout_s = 0.05
        connect_timeout_s = 60
        [cache]
        url = "redis://:p@evicting/1"
        ttl_s = 1.5
        learn = "use"
        never_learn = ["prompt", "loras.0.weight"]
        learn_from = 300
        audit_one_in = 1
        [org]
        id = "studio-1"
        timezone = "Europe/Berlin"
        [teams.a]
        name = "Ä \\"b\\""
        account = "second-1"
        disabled = true
        infer = false
        tokens = [{{ sha256 = "{DIGEST}", label = "ci", expires = 2027-06-30 }}, "{OTHER_DIGEST}"]
        [log]
        level = "debug"
        format = "json"
        """
    )
    assert settings.server.host == "::1"
    assert settings.server.cors_origins == (
        "https://tools.example.com",
        "http://localhost:3000",
        "http://[::1]:8080",
    )
    assert settings.accounts["second-1"].api_key.get_secret_value() == "k2"
    assert settings.store.url is not None
    assert settings.store.url.get_secret_value() == "redis://u:p%40@s_1:6380/3"
    assert settings.store.data_dir == tmp_path / "data"
    assert settings.store.on_outage == "admit"
    assert (settings.store.timeout_s, settings.store.connect_timeout_s) == (0.05, 60.0)
    assert settings.cache.url == SecretUrl("redis://:p@evicting/1")
    assert (settings.cache.learn, settings.cache.learn_from, settings.cache.audit_one_in) == ("use", 300, 1)
    assert settings.cache.never_learn == ("prompt", "loras.0.weight")
    assert settings.teams["a"].infer is False
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
    assert len(rows) == 60


MANUAL = Path(__file__).parents[3] / "docs" / "configuration.md"


def unset(section: BaseModel, parent: str = "") -> list[str]:
    """Returns the paths of all settings that have their default."""
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


def test_the_documented_example_is_valid_and_has_every_setting(read: Read, tmp_path: Path) -> None:
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
