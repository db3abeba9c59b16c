"""Readers of the files in `deploy/`.

No container engine is needed: what the files say is checked, and what can be run without one is run. What was tried by
hand, and what was not tried at all, stands in docs/deployment.md.
"""

import re
import shlex
import subprocess
from collections.abc import Collection, Mapping
from pathlib import Path, PurePosixPath

from proxy.settings.loader import load
from proxy.settings.schema import Settings

PROJECT = Path(__file__).parents[2]
DEPLOY = PROJECT / "deploy"
WORKER_GRACE_S = STORES_GRACE_S = 5
"""What the supervisor takes beyond `drain_s`: for workers that do not end, and for embedded stores."""

CONFIG = PurePosixPath("/etc/estimate-proxy/config.toml")
"""Where the command looks for it by itself."""


def said_by(*command: str | Path) -> str:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    assert done.returncode == 0, done.stdout
    return done.stdout


def settings_of(config: Path, environ: Mapping[str, str], mounted: Collection[PurePosixPath], folder: Path) -> Settings:
    """`config` as the gateway reads it where the files `mounted`, and no others, are there; each holds "secret"."""
    root = folder / "root"
    for path in mounted:
        file = root / path.relative_to("/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("secret")
    copy = folder / "config.toml"
    copy.write_text(re.sub(r'(_file = ")(/)', rf"\g<1>{root}/", config.read_text()))
    return load(copy, environ)


def drain_of(settings: Settings) -> float:
    """From SIGTERM until the last worker has ended, at the most."""
    return settings.server.drain_delay_s + settings.server.drain_s + WORKER_GRACE_S


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile's instructions with what stands behind them, each in one line."""
    lines = [line for line in (DEPLOY / "Dockerfile").read_text().splitlines() if not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    return [(word, rest.strip()) for word, _, rest in (line.partition(" ") for line in joined.splitlines() if line)]


def stages() -> list[list[tuple[str, str]]]:
    found: list[list[tuple[str, str]]] = []
    for word, rest in instructions():
        if word == "FROM":
            found.append([])
        found[-1].append((word, rest))
    return found


def of_image(word: str) -> list[str]:
    """What the last stage says with this instruction."""
    return [rest for found, rest in stages()[-1] if found == word]


def image_environment() -> dict[str, str]:
    return dict(part.split("=", 1) for rest in of_image("ENV") for part in shlex.split(rest))
