"""The container image of `deploy/`: its content, its user, its signals and its health check."""

import json
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from starlette.applications import Starlette
from starlette.responses import Response
from starlette.routing import Route

from deploy_files import DEPLOY, PROJECT, image_environment, instructions, of_image, stages
from serving import free_port, serving


def health_code() -> str:
    (check,) = of_image("HEALTHCHECK")
    python, option, code = json.loads(check.partition("CMD ")[2])
    assert (python, option) == ("python", "-c")
    return str(code)


def test_the_image_has_pinned_bases_and_only_plain_instructions() -> None:
    bases = [rest.split()[0] for word, rest in instructions() if word == "FROM"]
    assert len(bases) == 2
    assert len(set(bases)) == 1, "packages built for one Python would run on another"
    assert re.fullmatch(r"python:3\.\d+\.\d+-slim-[a-z]+", bases[0])
    words = {word for word, _ in instructions()}
    assert words == {"FROM", "WORKDIR", "COPY", "RUN", "ENV", "USER", "EXPOSE", "HEALTHCHECK", "ENTRYPOINT", "CMD"}


def test_every_dependency_of_the_image_is_a_wheel_with_a_hash_in_the_lock() -> None:
    fetched, *others = [
        command for _, rest in instructions() for command in re.findall(r"-m pip (?!uninstall)[^&]+", rest)
    ]
    for option in (
        "download",
        "--require-hashes",
        "--no-deps",
        "--only-binary :all:",
        "--requirement requirements.lock",
    ):
        assert option in fetched
    assert len(others) == 3
    assert all("--no-index" in other for other in others)


def test_the_image_has_no_build_tools() -> None:
    assert ("COPY", "--from=build /opt/estimate-proxy /opt/estimate-proxy") in stages()[-1]
    assert len(of_image("COPY")) == 1
    (run,) = of_image("RUN")
    assert "pip uninstall" in run
    assert not re.search(r"apt|curl|pip (install|download|wheel)", run)
    assert any("venv --without-pip /opt/estimate-proxy" in rest for _, rest in stages()[0])


def test_the_image_runs_as_a_fixed_user_id() -> None:
    assert of_image("USER") == ["10001:10001"]
    assert [word for word, _ in stages()[-1]].index("USER") > [word for word, _ in stages()[-1]].index("RUN")
    data_dir = image_environment()["ESTIMATE_PROXY_STORE__DATA_DIR"]
    assert f"install --directory --owner 10001 --group 10001 --mode 0700 {data_dir}" in of_image("RUN")[0]


def test_signals_reach_the_supervisor_of_the_image() -> None:
    assert [json.loads(rest) for rest in of_image("ENTRYPOINT") + of_image("CMD")] == [["estimate-proxy"], ["serve"]]
    assert of_image("STOPSIGNAL") == []
    assert image_environment()["PATH"].startswith("/opt/estimate-proxy/bin:")


def test_the_image_listens_on_its_exposed_port() -> None:
    environment = image_environment()
    assert environment["ESTIMATE_PROXY_SERVER__HOST"] == "0.0.0.0"  # noqa: S104 -- of a container
    assert of_image("EXPOSE") == [environment["ESTIMATE_PROXY_SERVER__PORT"]]


@pytest.mark.parametrize(("status", "healthy"), [(200, True), (503, False)])
def test_the_health_check_follows_the_gateways_readiness(status: int, *, healthy: bool) -> None:
    with serving(Starlette(routes=[Route("/healthz", lambda _: Response(status_code=status))])) as url:
        assert is_healthy(int(url.rpartition(":")[2])) == healthy


def test_the_health_check_fails_if_nothing_listens() -> None:
    assert not is_healthy(free_port())


def is_healthy(port: int) -> bool:
    """Runs the image's health check in an environment with a proxy, which it must not use."""
    environ = {"ESTIMATE_PROXY_SERVER__PORT": str(port), "http_proxy": "http://127.0.0.1:1"}
    command = [sys.executable, "-c", health_code()]
    return subprocess.run(command, env=environ, stderr=subprocess.DEVNULL, check=False).returncode == 0


def copied() -> list[str]:
    """Returns the paths that the Dockerfile copies."""
    sources = [rest.split()[:-1] for word, rest in stages()[0] if word == "COPY"]
    return [source for group in sources for source in group]


def test_the_build_context_contains_only_copied_files() -> None:
    lines = (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    assert rules[0] == "*"
    assert sorted(rule[1:] for rule in rules if rule[0] == "!") == sorted(copied())
    assert [rule for rule in rules[1:] if rule[0] != "!"] == ["**/__pycache__"]


def test_the_copied_files_are_all_that_the_wheel_needs(tmp_path: Path) -> None:
    for name in copied():
        source, target = PROJECT / name, tmp_path / name
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, target)
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-t", "wheel"], cwd=tmp_path, check=True)
    (wheel,) = tmp_path.glob("dist/*.whl")
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("proxy/")}
    assert packed == {path.relative_to(tmp_path).as_posix() for path in tmp_path.glob("proxy/**/*") if path.is_file()}
