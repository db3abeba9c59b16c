"""The configs in `deploy/` read secrets from separate files."""

import tomllib
from pathlib import Path

import pytest

from deploy_files import DEPLOY
from proxy.settings.errors import SECRET_KEYS
from proxy.urls import parse_store_url


@pytest.mark.parametrize("config", sorted(DEPLOY.glob("*/config.toml")), ids=lambda path: path.parent.name)
def test_no_config_contains_a_secret(config: Path) -> None:
    tree = tomllib.loads(config.read_text())
    tables = [*tree["accounts"].values(), tree["store"], tree.get("cache", {})]
    assert not any(key in table for table in tables for key in SECRET_KEYS)
    urls = [table["url"] for table in tables if "url" in table]
    assert all(parse_store_url(url).password is None for url in urls)
