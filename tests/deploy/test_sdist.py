"""The source distribution has all tracked files, and the wheel can be built from it."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from deploy_files import PROJECT, said_by
from programs import program

STRAY = (
    ".env",
    ".venv/bin/python",
    ".coverage.host.1",
    ".hypothesis/examples",
    "deploy/secrets/rendernet_api_key",
    "dist/estimate_proxy-0.0.1.tar.gz",
    "estimate-proxy.toml",
    "gateway.log",
    "proxy/__pycache__/app.cpython-311.pyc",
    "bench/__pycache__/load.cpython-311.pyc",
)
"""Stray files of a working copy: secrets, data, and files of tools."""


@pytest.fixture(scope="module")
def tracked() -> frozenset[str]:
    """Returns the files that git tracks."""
    git = program("git", "the source distribution was not compared with what is tracked")
    if not (PROJECT / ".git").exists():
        pytest.skip("this is no checkout: the source distribution was not compared with what is tracked")
    names = said_by(git, "-C", PROJECT, "ls-files", "-z").rstrip("\0").split("\0")
    return frozenset(name for name in names if (PROJECT / name).exists())


@pytest.fixture(scope="module")
def sdist(tracked: frozenset[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Builds the distribution in a copy of the tracked files plus some stray ones, and unpacks it."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("sdist")
    for name in tracked:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(PROJECT / name, source / name)
    for name in STRAY:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text("stray")
    (archive,) = built("sdist", source, target)
    said_by(program("tar", "the source distribution was not unpacked"), "xzf", archive, "-C", target)
    return target / archive.name.removesuffix(".tar.gz")


def built(kind: str, source: Path, target: Path) -> list[Path]:
    command = [sys.executable, "-m", "hatchling", "build", "-t", kind, "-d", str(target)]
    subprocess.run(command, cwd=source, check=True, stdout=subprocess.DEVNULL)
    return list(target.glob("*.whl" if kind == "wheel" else "*.tar.gz"))


def files_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_it_has_exactly_the_tracked_files(sdist: Path, tracked: frozenset[str]) -> None:
    assert files_in(sdist) == tracked | {"PKG-INFO"}


def test_its_scripts_are_executable(sdist: Path) -> None:
    programs = {path.name for path in (sdist / "scripts").iterdir() if path.stat().st_mode & 0o100}
    assert programs == {path.name for path in (PROJECT / "scripts").iterdir()} - {"_environment"}


def test_the_wheel_can_be_built_from_it(sdist: Path, tmp_path: Path) -> None:
    (wheel,) = built("wheel", sdist, tmp_path)
    with zipfile.ZipFile(wheel) as packed:
        names = {name for name in packed.namelist() if ".dist-info/" not in name}
    assert names == {name for name in files_in(sdist) if name.startswith("proxy/")}
