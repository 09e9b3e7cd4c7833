"""The demo's whole path, at a fiftieth of its length."""

from __future__ import annotations

import csv
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("tokenizers")


def test_a_short_demo(tmp_path):
    root = Path(__file__).parent.parent
    command = [sys.executable, "-m", "examples.demo", "--steps-scale", "0.02", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=root, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    for word in ("teacher", "labels only", "forward KL", "reverse KL", "held-out loss", "agreement", "surprisal"):
        assert word in done.stdout
    # the fourth student repeats the second from the store: the same run up to the rounding of its log-probs
    with (tmp_path / "results.csv").open() as file:
        rows = {row["model"]: row for row in csv.DictReader(file)}
    loss = {name: float(row["loss"]) for name, row in rows.items() if row["loss"]}
    assert abs(loss["forward KL, stored"] - loss["forward KL"]) < 2e-3 < abs(loss["forward KL"] - loss["reverse KL"])
    # the teacher and the student write alone; RSD's text is both models'
    shares = [float(rows[f"+ {kind} traces"]["acceptance"]) for kind in ("teacher", "RSD", "student")]
    assert shares[0] == shares[2] == 1 > shares[1] >= 0
    assert 2.5 * 32 < float(re.search(r"From the store, ([0-9.]+) bytes a token", done.stdout)[1]) < 3.5 * 32 + 16
    for name, passes in {"common start: explicit CoT": 10, "no CoT": 1, "KaVa": 4}.items():
        assert int(rows[name]["passes"]) == passes and 0 <= float(rows[name]["accuracy"]) <= 1
    names = {p.suffix for p in tmp_path.iterdir()}
    assert ".png" in names and names & {".csv", ".json"}
