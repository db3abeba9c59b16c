"""The bench's smallest run, end to end, without any check of the measured values."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench.__main__ import run
from bench.machine import ROOT


def test_a_run_prints_its_results_and_the_machine(tmp_path: Path) -> None:
    file = tmp_path / "bench.json"
    done = subprocess.run(
        [sys.executable, "-m", "bench", *f"--only hit --rounds 1 --seconds 0.3 --load own --json {file}".split()],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests' / 'support'}"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "the bench's own loader" in done.stdout
    found = json.loads(file.read_text())
    assert {"date", "commit", "cpu", "cores", "kernel", "python", "packages"} <= found["machine"].keys()
    (measured,) = found["parts"]["table"]["raw"]
    assert found["parts"]["table"]["failures"] == {}
    assert measured["hit"]["requests"] > 0
    assert measured["hit"]["cpu_us"] > 0
    assert measured["hit"]["admission_us"] > 0


def test_an_unknown_case_is_refused_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["bench", "--only", "hits"])
    with pytest.raises(SystemExit, match="2"):
        run()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("bench: unknown case 'hits': choose from bare, ")
