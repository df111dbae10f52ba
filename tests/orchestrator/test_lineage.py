"""From the corpus to a run: what the folders say, what MLflow is told of it, and what is noticed when it changes."""

import hashlib
import json
import sqlite3
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from omegaconf import OmegaConf
from tracked import end, free_port, make_chain, start

from jobs.runtime import checkpoint
from jobs.runtime.job import Job, Ranks
from orchestrator import dashboard, lineage, track
from orchestrator.cli import cli
from orchestrator.run import Run
from orchestrator.store import Sent, connect, tracking_uri
from orchestrator.submit import state

TOKENIZER, FINGERPRINT = hashlib.sha256(b"a tokenizer").hexdigest(), "b" * 64


def save_checkpoint(run: Run, step: int, weights: str) -> None:
    """A checkpoint, committed by the code that commits all of them."""
    state = {"identity": {"tokenizer": TOKENIZER, "data": FINGERPRINT}, "position": {"step": step}}
    folder = checkpoint.folder_of(run.checkpoints, step)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "weights").write_text(weights)
    checkpoint._commit(folder, state, checkpoint._hash(folder, ["weights"]))


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def chain(tmp_path) -> list[Run]:
    return trained(tmp_path, None)


def trained(root: Path, uri: str | None) -> list[Run]:
    """`pretrain` and `sft`, done, over a corpus and a file of examples."""
    runs = make_chain(root, uri=uri)
    (root / "data").mkdir()
    (root / "data" / "tokenizer.json").write_text("a tokenizer")
    split = {"documents": 3, "tokens": 900, "bytes": 2_500_000, "bin_sha256": "c" * 64}
    record = {"tokenizer_sha256": TOKENIZER, "vocab": 512, "sources": {"py": {"train": split, "val": split}}}
    (root / "data" / "dataset.json").write_text(json.dumps(record))
    (root / "asked.jsonl").write_text('{"prompt": "a", "response": "b"}\n')
    examples = root / "asked.jsonl"
    for run, read in zip(runs, ({}, {str(examples): sha256(examples)}), strict=True):
        attempt = start(run)
        attempt.read = read
        spec = run.spec()
        job = Job(
            run=run,
            experiment=spec,
            stage=spec.stages[run.stage],
            options=None,
            ranks=Ranks(),
            attempt="1",
            record=attempt,
        )
        if run is runs[1]:
            job.has_loaded("pretrain", runs[0].checkpoints / "step-0000100")
        lines = track.Metrics(run, "1")
        lines.log(100, {"train/loss": 2.5, "val/loss": 2.25}, tokens=1000)
        lines.close()
        save_checkpoint(run, 100, run.stage)
        end(run, attempt, "done")
    return runs


def told(root: Path, *words: str) -> str:
    result = CliRunner().invoke(cli, ["--runs", str(root), "lineage", *words], catch_exceptions=False)
    assert result.exit_code == 0
    return result.stdout


def test_the_folders_alone_say_what_a_run_was_made_of(chain, tmp_path):
    found = json.loads(told(tmp_path, "demo/sft", "--json"))
    assert list(found["stages"]) == ["pretrain", "sft"]
    pretrain, sft = found["stages"].values()
    manifest = sha256(chain[0].checkpoints / "step-0000100" / "MANIFEST.json")
    assert sft["loaded"] == {"pretrain": {"step": 100, "manifest_sha256": manifest}}
    assert pretrain["saved"] == {
        "step": 100,
        "manifest_sha256": manifest,
        "tokenizer_sha256": TOKENIZER,
        "data_sha256": FINGERPRINT,
    }
    assert sft["read"] == {str(tmp_path / "asked.jsonl"): sha256(tmp_path / "asked.jsonl")}
    assert (sft["measured"], sft["made_from"], sft["mlflow_run_id"]) == ({"val/loss": 2.25}, ["pretrain"], "")
    assert found["corpus"]["sources"]["py"]["train"]["bin_sha256"] == "c" * 64
    assert list(json.loads(told(tmp_path, "demo/pretrain", "--json"))["stages"]) == ["pretrain"]

    lines = told(tmp_path, "demo").splitlines()
    depth = {word: next(line.index(word) for line in lines if word in line) for word in ("corpus", "pretrain ", "sft ")}
    assert depth["corpus"] < depth["pretrain "] < depth["sft "]
    assert any("3 documents, 2.5 MB, 900 tokens cccccccccccc" in line for line in lines)
    assert any(f"from `pretrain` at step 100 {manifest[:12]}" in line for line in lines)
    assert "changed" not in "".join(lines)


def test_what_is_not_any_more_what_was_read_is_told(chain, tmp_path):
    (tmp_path / "asked.jsonl").write_text('{"prompt": "a", "response": "other"}\n')
    save_checkpoint(chain[0], 100, "trained anew")
    (tmp_path / "data" / "tokenizer.json").write_text("another one")
    stages = lineage.of([chain[1]], state).stages
    assert [what.partition(" was ")[0] for what in stages["sft"].changed] == [
        f"`{tmp_path / 'asked.jsonl'}`",
        "step 100 of `pretrain`",
        f"the tokenizer `{tmp_path / 'data' / 'tokenizer.json'}`",
    ]
    assert len(stages["pretrain"].changed) == 1
    assert "changed since" in told(tmp_path, "demo/sft")
    (tmp_path / "asked.jsonl").unlink()
    assert "and is gone" in lineage.of([chain[1]], state).stages["sft"].changed[0]


def begin(run: Run, name: str, read: dict[str, str], step: int | None) -> None:
    """An attempt that failed at once, or after it had gone on from ``step``."""
    attempt = start(run, name)
    attempt.read, attempt.loaded = read, {"pretrain": {"step": 200, "manifest_sha256": "d" * 64}}
    if step is not None:
        attempt.from_step, attempt.phases["checkpoint"] = step, 1.5
    end(run, attempt, "error")


def test_a_refused_attempt_has_no_part_in_what_is_saved(chain, tmp_path):
    sft, file = chain[1], str(tmp_path / "asked.jsonl")
    read, loaded = lineage.noted(sft)
    begin(sft, "2", {file: "e" * 64}, None)
    assert lineage.noted(sft) == (read, loaded) and read[file] != "e" * 64
    begin(sft, "3", {"more.jsonl": "f" * 64}, 100)
    assert lineage.noted(sft)[0] == {**read, "more.jsonl": "f" * 64}
    begin(sft, "4", {"more.jsonl": "9" * 64}, 0)  # there was no checkpoint: it began anew
    assert lineage.noted(sft)[0] == {"more.jsonl": "9" * 64}


def test_each_stage_stands_under_what_its_own_run_was_made_from(chain, tmp_path):
    """`sft` was made from `pretrain`; then the config was edited, and `dpo` submitted."""
    last = chain[1].spec()
    sft, dpo = replace(last.stages["sft"], init_from=None), replace(last.stages["sft"], kind="dpo", init_from="sft")
    edited = replace(last, stages={"sft": sft, "dpo": dpo})  # `pretrain` is gone from it
    folder = tmp_path / "demo" / "dpo"
    (folder / "attempts").mkdir(parents=True)
    (folder / "spec.yaml").write_text(OmegaConf.to_yaml(OmegaConf.structured(edited)))
    run = Run(folder=folder, experiment="demo", stage="dpo", index=2, key="k")
    run.save()
    stages = lineage.of([run], state).stages
    made_from = [(name, link.made_from) for name, link in stages.items()]
    assert made_from == [("pretrain", []), ("sft", ["pretrain"]), ("dpo", ["sft"])]
    lines = told(tmp_path, "demo/dpo").splitlines()
    depth = [next(line.index(word) for line in lines if word in line) for word in ("pretrain ", "sft ", "dpo ")]
    assert depth == sorted({*depth})


def test_a_checkpoint_says_its_tokenizer_where_nothing_was_prepared(chain, tmp_path):
    (tmp_path / "data" / "dataset.json").unlink()
    manifest = sha256(chain[0].checkpoints / "step-0000100" / "MANIFEST.json")
    shown = told(tmp_path, "demo/pretrain")
    assert f"checkpoint at step 100 {manifest[:12]}, tokenizer {TOKENIZER[:12]}" in shown


def test_an_experiment_shows_all_its_stages(chain, tmp_path):
    spec = (chain[1].folder / "spec.yaml").read_text()
    (chain[1].folder / "spec.yaml").write_text(spec.replace("init_from: pretrain", "init_from: null"))
    assert list(json.loads(told(tmp_path, "demo", "--json"))["stages"]) == ["pretrain", "sft"]
    assert list(json.loads(told(tmp_path, "demo/sft", "--json"))["stages"]) == ["sft"]


def test_a_file_that_several_stages_read_is_hashed_once(chain, tmp_path, monkeypatch):
    attempt = chain[0].attempts()[0]
    attempt.read = {str(tmp_path / "asked.jsonl"): "0" * 64}
    chain[0].save_attempt(attempt)
    hashed: list[Path] = []
    real = lineage.file_sha256
    monkeypatch.setattr(lineage, "file_sha256", lambda path: hashed.append(path) or real(path))
    stages = lineage.of(chain, state).stages
    assert (len(stages["pretrain"].changed), stages["sft"].changed) == (1, [])
    assert hashed.count(tmp_path / "asked.jsonl") == 1


def test_a_damaged_state_of_a_checkpoint_is_named(chain, tmp_path):
    (chain[0].checkpoints / "step-0000100" / "state.json").write_text("{")
    result = CliRunner().invoke(cli, ["--runs", str(tmp_path), "lineage", "demo"])
    assert (result.exit_code, result.exception.__class__) == (1, SystemExit)
    assert "step-0000100/state.json` cannot be read" in result.stderr and "hint:" in result.stderr


def test_a_stage_that_never_ran_is_missing(tmp_path):
    runs = make_chain(tmp_path)
    (runs[0].folder / "run.json").unlink()
    stages = lineage.of([runs[1]], state).stages
    assert (stages["pretrain"].state, stages["pretrain"].saved, stages["sft"].loaded) == ("missing", None, {})
    assert "missing" in told(tmp_path, "demo/sft")


def in_mlflow(uri: str, run: Run):
    """Inputs, tags and model versions of a run."""
    with connect(uri) as client:
        found = client.get_run(Sent.load(run).run_id)
        versions = client.search_model_versions(f"name = '{run.experiment}-{run.stage}'")
        inputs = {(i.dataset.name, i.dataset.digest, i.tags[0].value) for i in found.inputs.dataset_inputs}
        return inputs, found.data.tags, versions


def check_mlflow(uri: str, chain: list[Run], root: Path) -> str:
    """Send twice, the second time as if nothing had been noted; return where the model version of `sft` lies."""
    for run in chain:
        for _ in range(2):
            track.sync(run)
            sent = Sent.load(run)
            sent.registered, sent.dataset = "", ""
            sent.save(run)
        track.sync(run)
    inputs, tags, versions = in_mlflow(uri, chain[1])
    assert {(name, use) for name, _, use in inputs} == {("data", "training"), ("asked.jsonl", "examples")}
    assert ("asked.jsonl", sha256(root / "asked.jsonl")[:32], "examples") in inputs
    manifest = sha256(chain[0].checkpoints / "step-0000100" / "MANIFEST.json")
    assert tags["from.pretrain"] == f"step 100, manifest {manifest}"
    mine = sha256(chain[1].checkpoints / "step-0000100" / "MANIFEST.json")
    (version,) = versions
    assert version.run_id == Sent.load(chain[1]).run_id
    wanted = {"step": "100", "manifest_sha256": mine, "val/loss": "2.25", "orch.run": "demo/sft"}
    assert wanted.items() <= version.tags.items()
    return version.source


def test_mlflow_has_inputs_and_one_version_of_each_model(chain, tmp_path):
    source = check_mlflow(tracking_uri(tmp_path, None), chain, tmp_path)
    assert source == (chain[1].checkpoints / "step-0000100").as_uri()


def test_a_model_is_not_registered_before_its_stage_is_done(chain, tmp_path):
    attempt = chain[1].attempts()[0]
    end(chain[1], attempt, "preempted")
    track.sync(chain[1])
    assert in_mlflow(tracking_uri(tmp_path, None), chain[1])[2] == []


@pytest.mark.slow
def test_a_server_that_takes_no_path_gets_a_pointer(tmp_path):
    port = free_port()
    with dashboard.serve(tmp_path / "server", None, port) as base:
        chain = trained(tmp_path / "runs", base)
        source = check_mlflow(base, chain, tmp_path / "runs")
        run_id = Sent.load(chain[1]).run_id
        assert source == f"runs:/{run_id}/checkpoint"
        with connect(base) as client:
            where = json.loads(
                Path(client.download_artifacts(run_id, "checkpoint/where.json", str(tmp_path))).read_text()
            )
    assert where["folder"] == str(chain[1].checkpoints / "step-0000100")


def test_samples_are_one_table_however_often_they_are_sent(tmp_path):
    run = make_chain(tmp_path)[0]
    folder = run.folder / "samples"
    folder.mkdir()

    def write(step: int, *scores: float) -> None:
        lines = [{"prompt": "p", "response": f"r{step}", "score": s, "rules": {"parses": 1.0}} for s in scores]
        (folder / f"step-{step:07d}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    def table() -> dict:
        track.sync(run)
        with connect(tracking_uri(tmp_path, None)) as client:
            run_id = Sent.load(run).run_id
            tag = json.loads(client.get_run(run_id).data.tags["mlflow.loggedArtifacts"])
            text = Path(client.download_artifacts(run_id, "samples.json")).read_text()
        assert tag == [{"path": "samples.json", "type": "table"}]
        return json.loads(text, parse_constant=pytest.fail)  # what a browser does with NaN

    write(0, 0.5, float("nan"))
    first = table()
    assert first == {
        "columns": ["step", "prompt", "response", "score", "rules"],
        "data": [[0, "p", "r0", 0.5, '{"parses": 1.0}'], [0, "p", "r0", "NaN", '{"parses": 1.0}']],
    }
    assert table() == first
    write(10, 1.0)
    assert [row[0] for row in table()["data"]] == [0, 0, 10]
    write(10, 2.0)  # once more, after a resume
    assert [row[3] for row in table()["data"]] == [0.5, "NaN", 2.0]


def test_samples_with_any_character_are_sent_and_damaged_ones_stop_nothing(tmp_path, monkeypatch, caplog):
    run = make_chain(tmp_path)[0]
    (run.folder / "samples").mkdir()
    file = run.folder / "samples" / "step-0000000.jsonl"
    said = ["a\u0085b", "c\u2028d", "e\fg"]
    file.write_text("".join(json.dumps({"response": s}, ensure_ascii=False) + "\n" for s in said), encoding="utf-8")
    assert track._table([file])["data"] == [[0, s] for s in said]
    monkeypatch.setattr(track, "MAX_ROWS", 2)
    assert track._table([file])["data"] == [[0, s] for s in said[1:]]
    file.write_text('{"response": "cut o')
    lines = track.Metrics(run, "1")
    lines.log(1, {"train/loss": 2.5}, tokens=10)
    lines.close()
    assert track.sync(run) == 1
    assert "the samples of `demo/pretrain` are no table" in caplog.text


def test_a_registry_that_refuses_keeps_nothing_else_from_mlflow(chain, tmp_path, caplog):
    track.open_runs(chain, None)
    with closing(sqlite3.connect(tmp_path / "mlflow.db")) as database, database:
        refuse = "select raise(abort, 'see https://me:secret@host')"
        database.execute(f"create trigger closed before insert on model_versions begin {refuse}; end")
    track.sync(chain[1])
    assert "`demo/sft` is no registered model" in caplog.text and "secret" not in caplog.text
    sent = Sent.load(chain[1])
    assert sent.registered == "" and {"spec.yaml", "logbook.md"} <= {*sent.artifacts}
    with closing(sqlite3.connect(tmp_path / "mlflow.db")) as database, database:
        database.execute("drop trigger closed")
    track.sync(chain[1])
    assert len(in_mlflow(tracking_uri(tmp_path, None), chain[1])[2]) == 1
