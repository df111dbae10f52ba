"""Epochs of data on disk, and losses by the published law."""

from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from jobs.data.indexed import ShardWriter
from orchestrator.cli import cli
from orchestrator.compose import compose
from orchestrator.plan import estimate
from orchestrator.scaling import epochs, loss


def written(prefix: Path, tokens: int) -> None:
    with ShardWriter(prefix, "<u2") as shard:
        shard.add(np.zeros(tokens, "<u2"), np.array([tokens]))


def test_epochs_are_tokens_asked_over_tokens_on_disk(tmp_path: Path) -> None:
    written(tmp_path / "wiki", 40_000)
    written(tmp_path / "books-1", 100_000)
    written(tmp_path / "books-2", 60_000)
    overrides = [
        f"data.sources={{wikipedia: {{weight: 1, shards: ['{tmp_path}/wiki']}}, "
        f"books1: {{weight: 3, shards: ['{tmp_path}/books-1', '{tmp_path}/books-2']}}, "
        f"books2: {{weight: 0, shards: ['{tmp_path}/nothing']}}, webtext2: {{weight: 0}}, "
        "common-crawl: {weight: 0}}",
        "stages.pretrain.global_batch=64", "stages.pretrain.steps=10",
        "stages.pretrain.schedule={ramp_from: null, ramp_tokens: 0, warmup_tokens: 0}",
    ]  # fmt: skip
    e = compose("gpt3-125m", overrides).experiment
    asked = 64 * 2048 * 10
    expected = {"wikipedia": asked / 4 / 40_000, "books1": asked * 3 / 4 / 160_000}
    assert epochs(e, "pretrain") == pytest.approx(expected)
    assert estimate(e, "pretrain").epochs == pytest.approx(expected)
    done = CliRunner().invoke(cli, ["plan", "gpt3-125m", *overrides])
    assert "epochs of the data on disk" in done.stdout
    assert "`pretrain` reads source `wikipedia` 8.2 times" in done.stderr
    assert "`pretrain` reads source `books1` 6.1 times" in done.stderr


def test_what_is_not_there_is_not_counted(tmp_path: Path) -> None:
    e = compose("gpt3-125m", [f"data.folder={tmp_path}"]).experiment
    assert epochs(e, "pretrain") == {}
    (tmp_path / "wikipedia-train.idx").write_bytes(b"no header")
    (tmp_path / "wikipedia-train.bin").write_bytes(b"tokens")
    assert epochs(e, "pretrain") == {}


def test_shards_that_prepare_made(tmp_path: Path) -> None:
    written(tmp_path / "python-train", 700 * 16 * 128 // 2)
    e = compose("demo", [f"data.folder={tmp_path}"]).experiment
    assert epochs(e, "pretrain") == {"python": 2.0}
    assert epochs(e, "prepare") == {}


def test_losses_of_chinchilla() -> None:
    # Besiroglu et al. 2024, arXiv:2404.10102: 20 tokens a parameter are about the best for 5.76e23 flops
    flops = 5.76e23
    best = min((n / 10 * 1e9 for n in range(100, 3000)), key=lambda n: loss(n, flops / 6 / n))
    assert 15 < flops / 6 / best / best < 30
    assert loss(70e9, 1.4e12) < loss(280e9, 300e9)  # Chinchilla and Gopher
    assert loss(1e18, 1e18) == pytest.approx(1.8172, abs=0.001)
