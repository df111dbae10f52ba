"""benchmarks/gpu_check.py in miniature: the same path on a CPU, also where little is installed."""

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "gpu_check.py"
NOT_NEEDED = ("omegaconf", "submitit", "mlflow", "rich", "click", "matplotlib", "psutil", "tokenizers", "transformers")


@pytest.fixture(scope="module")
def gpu_check():
    spec = importlib.util.spec_from_file_location("gpu_check", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(tmp_path, *args, without=()):
    """Run the script where the packages ``without`` cannot be imported; its exit status, rows and output."""
    for name in without:
        (tmp_path / f"{name}.py").write_text(f"raise ImportError('no {name} on this machine')\n")
    env = {**os.environ, "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
    figures = tmp_path / "figures.json"
    command = [sys.executable, str(SCRIPT), "--mini", "--models", "mini-2x64", "--steps", "2", "--micro-batches", "2"]
    done = subprocess.run(
        [*command, "--json", str(figures), *args], env=env, capture_output=True, text=True, check=False
    )
    assert figures.exists(), done.stderr
    return done.returncode, json.loads(figures.read_text())["rows"], done.stdout


@pytest.mark.slow
def test_where_only_torch_is_installed(tmp_path):
    missing = (*NOT_NEEDED, "deepspeed")
    status, (torch_row, deepspeed_row), out = run(tmp_path, "--engines", "torch,deepspeed", without=missing)
    assert torch_row["right"]
    assert torch_row["loss_fp32"] == pytest.approx(math.log(301), abs=0.1)
    assert torch_row["losses"][0] == pytest.approx(torch_row["loss_fp32"], abs=2e-3)
    assert len(torch_row["losses"]) == 4
    assert torch_row["tokens_per_s"] == pytest.approx(2 * 2 * 64 / torch_row["step_s"])
    assert deepspeed_row["error"] == "engine `deepspeed` cannot be imported here: no deepspeed on this machine"
    assert deepspeed_row["error"] in out
    assert status == 1


@pytest.mark.slow
def test_deepspeed_with_banded_attention_and_recompute(tmp_path):
    status, (row,), _ = run(
        tmp_path, "--engines", "deepspeed", "--attention", "alternating", "--recompute", "full", "--zero", "2"
    )
    assert (status, row["right"], row["spec"]["attention"]) == (0, True, "alternating")
    assert row["losses"][0] == pytest.approx(row["loss_fp32"], abs=2e-3)


@pytest.mark.slow
@pytest.mark.parity
def test_every_setup_of_an_engine_beside_the_torch_engine(tmp_path):
    status, rows, out = run(tmp_path, "--engines", "torch,colossalai", "--every-setup")
    assert [(r["engine"], r["setup"]) for r in rows] == [
        ("torch", "ddp"),
        ("torch", "recompute"),
        ("torch", "fsdp2"),
        ("colossalai", "zero-1"),
        ("colossalai", "gemini"),
    ]
    assert status == 0 and all(r["right"] for r in rows), out
    assert rows[0]["loss_difference"] is None
    assert all(0 < r["loss_difference"] + 1e-9 < 5e-3 for r in rows[1:])
    assert all(r["planned_memory_gb"] > 0.001 for r in rows)


def test_peaks_are_found_by_device_name(gpu_check):
    names = {"NVIDIA H200": 989, "NVIDIA H100 PCIe": 756, "NVIDIA H100 80GB HBM3": 989, "NVIDIA A100-SXM4-80GB": 312}
    assert {name: gpu_check.peak_tflops(name) for name in names} == names
    assert gpu_check.peak_tflops("a card of next year") is None


def test_a_wrong_loss_is_told_from_a_right_one(gpu_check):
    row = {"loss_fp32": 10.0, "losses": [10.001, 9.5]}
    assert gpu_check.right(row)
    assert not gpu_check.right({**row, "losses": [10.2, 9.5]})
    assert not gpu_check.right({**row, "losses": [10.001, 10.5]})
    assert not gpu_check.right({**row, "losses": [10.001, math.nan, 9.5]})
    assert not gpu_check.right({**row, "error": "out of memory"})
    assert gpu_check.right({**row, "loss_difference": 1e-3})
    assert not gpu_check.right({**row, "loss_difference": 0.1})


def test_misspelt_names_are_usage_errors(gpu_check, capsys):
    for args, said in (
        (["--engines", "deepsped"], "no engine `deepsped`"),
        (["--models", "gpt3-7b"], "no model `gpt3-7b`"),
    ):
        with pytest.raises(SystemExit) as e:
            gpu_check.parse(args)
        assert e.value.code == 2
        assert said in capsys.readouterr().err


def test_the_models_are_those_of_the_paper(gpu_check):
    """Brown et al. 2020, table D.1: parameters in millions."""
    table = {"gpt3-125m": 125, "gpt3-1.3b": 1320, "gpt3-2.7b": 2650, "gpt3-6.7b": 6660}
    assert {n: spec.params / 1e6 for n, (spec, _) in gpu_check.MODELS.items()} == pytest.approx(table, rel=0.01)
