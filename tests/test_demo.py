"""`make demo`, whole: every stage learns what the study of three seeds says it does (benchmarks/study.py)."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]


@pytest.mark.slow
@pytest.mark.parity
def test_the_road_to_chatgpt(tmp_path):
    spec = importlib.util.spec_from_file_location("study", REPO / "benchmarks" / "study.py")
    study = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(study)
    orch = Path(sys.executable).with_name("orch")
    config = REPO / "configs" / "chatgpt-demo.yaml"
    subprocess.run([orch, "submit", config, "--launcher", "local"], cwd=tmp_path, check=True, capture_output=True)
    found = study.learned(tmp_path / "runs" / "chatgpt-demo")
    assert not study.beyond(found), found
