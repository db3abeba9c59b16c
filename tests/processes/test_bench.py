"""The bench's smallest run, end to end. What it measures is no matter here: a benchmark is not a test."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench.__main__ import run
from bench.machine import ROOT


def test_a_run_tells_what_it_measured_and_where(tmp_path: Path) -> None:
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


def test_what_it_does_not_know_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["bench", "--only", "hits"])
    with pytest.raises(SystemExit, match="2"):
        run()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("bench: unknown case 'hits': choose from bare, ")
