"""Config files of tests, and what is said of them."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from proxy.settings.errors import SettingsError
from proxy.settings.loader import load
from proxy.settings.schema import Settings

CANARY = "CaNaRy5Xq"
DIGEST = "sha256:" + "a" * 64
OTHER_DIGEST = "sha256:" + "b" * 64
ACCOUNT = f'[accounts.default]\napi_key = "{CANARY}"\n'
TEAM = f'[teams.design]\ntokens = ["{DIGEST}"]\n'
MINIMAL = ACCOUNT + TEAM
ENV = "ESTIMATE_PROXY_"


@dataclass(frozen=True)
class Read:
    """Loads a config of some text, in a folder of its own."""

    folder: Path

    def __call__(
        self, text: str | bytes = MINIMAL, environ: Mapping[str, str] | None = None, **options: Any
    ) -> Settings:
        file = self.folder / "config.toml"
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
        return load(file, {"HOME": "/home/op", **(environ or {})}, **options)


@dataclass(frozen=True)
class Problems:
    """The problems of a config by their paths; each is one line, and none shows the canary."""

    read: Read

    def __call__(
        self, text: str | bytes = MINIMAL, environ: Mapping[str, str] | None = None, **options: Any
    ) -> dict[str, str]:
        with pytest.raises(SettingsError) as caught:
            self.read(text, environ, **options)
        problems = caught.value.problems
        said = [f"{problem.path} {problem.message}" for problem in problems]
        assert all(line.isprintable() for line in said), said
        assert CANARY.lower() not in "".join([*said, str(caught.value), repr(caught.value)]).lower()
        assert all(problem.path for problem in problems)
        assert len({problem.path for problem in problems}) == len(problems), said
        return {problem.path: problem.message for problem in problems}
