"""Tracking against a real MLflow: a sqlite store, and a server that comes and goes."""

import json
import math
import os
import random
import signal
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from clock import slowness, wait
from tracked import end, free_port, make_chain, start, stored, written

from orchestrator import dashboard, track
from orchestrator.errors import TrackingError
from orchestrator.run import Run
from orchestrator.store import Sent, connect, mask, tracking_uri
from orchestrator.system import parse_gpus


def log_steps(run: Run, attempt: str, steps: range, *, pause_s: float = 0.0, metrics: int = 5) -> None:
    lines = track.Metrics(run, attempt)
    for step in steps:
        values = {"train/loss": 5 / (1 + step), "perf/step_s": random.random()}
        lines.log(step, values | {f"train/m{i}": i / step for i in range(metrics)}, tokens=step * 1024)
        time.sleep(pause_s)
    lines.close()


# --- the job's side -------------------------------------------------------------------------------


def test_a_line_survives_json_and_a_kill_in_mid_line(tmp_path):
    run = make_chain(tmp_path)[0]
    path = run.folder / "metrics.jsonl"
    path.write_text('{"step": 1, "time": 1.0, "attempt": "1", "tokens": 8, "train/loss": 2.5}\n{"step": 2, "ti')
    lines = track.Metrics(run, "1r1")
    lines.log(2, {"train/loss": math.nan, "train/grad_norm": math.inf, "train/lr": 0.1 + 0.2}, tokens=16)
    read = run.metrics()  # while it is open: a reader sees a line at once
    lines.close()
    assert list(read) == [1, 2]
    assert read[2]["attempt"] == "1r1"
    assert read[2]["tokens"] == 16
    assert math.isnan(read[2]["train/loss"])
    assert read[2]["train/grad_norm"] == math.inf
    assert read[2]["train/lr"] == 0.1 + 0.2  # to the last bit


def test_heartbeat_and_machine_load_come_from_beside_the_training(tmp_path):
    run = make_chain(tmp_path)[0]
    lines = track.Metrics(run, "1")
    lines.heartbeat(step=1, steps=9, tokens=8, loss=2.5, tokens_per_s=3.0)
    first = wait(run.heartbeat)
    lines.heartbeat(step=2, steps=9, tokens=16)
    assert run.heartbeat() == first  # at most once a second
    wait(lambda: lines._system)
    lines.log(2, {}, tokens=16)
    lines.log(3, {}, tokens=24)
    lines.close()
    assert set(first) == {"attempt", "step", "steps", "tokens", "loss", "tokens_per_s", "time"}
    assert run.heartbeat()["step"] == 2
    sampled, after = run.metrics()[2], run.metrics()[3]
    total_mb = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e6
    assert 0 < sampled["system/system_memory_usage_megabytes"] < total_mb
    assert 0 <= sampled["system/cpu_utilization_percentage"] <= 100
    disk = os.statvfs(tmp_path)
    assert sampled["system/disk_available_megabytes"] == pytest.approx(disk.f_bavail * disk.f_frsize / 1e6, rel=0.05)
    assert "system/cpu_utilization_percentage" not in after


def test_a_full_disk_costs_lines_and_not_the_training(tmp_path, caplog):
    run = make_chain(tmp_path)[0]
    (run.folder / "metrics.jsonl").symlink_to("/dev/full")  # every write there fails with ENOSPC
    lines = track.Metrics(run, "1")
    lines.log(1, {"train/loss": 1.0}, tokens=8)
    lines.close()
    assert "step 1 is missing in metrics.jsonl" in caplog.text


def test_names_and_units_of_gpus_are_mlflows():
    # Fields and form as `nvidia-smi --help-query-gpu` describes them; the second card does not report power.
    text = "0, 97, 70000, 81559, 650.00, 700.00\n1, 0, 3, 81559, [N/A], [N/A]\n"
    found = parse_gpus(text)
    assert found["gpu_0_utilization_percentage"] == 97
    assert found["gpu_0_memory_usage_megabytes"] == pytest.approx(70000 * 2**20 / 1e6)
    assert found["gpu_0_power_usage_percentage"] == pytest.approx(100 * 650 / 700)
    assert found["gpu_1_memory_usage_percentage"] == pytest.approx(100 * 3 / 81559)
    assert "gpu_1_power_usage_watts" not in found


def test_importing_it_loads_nothing_slow():
    slow = "{'mlflow', 'matplotlib', 'torch', 'psutil', 'omegaconf', 'sqlalchemy', 'numpy'}"
    code = f"import sys, orchestrator.track; print(sorted({slow} & set(sys.modules)))"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"


def test_a_step_takes_microseconds_while_mlflow_is_away(tmp_path):
    run = make_chain(tmp_path, uri=f"http://127.0.0.1:{free_port()}")[0]
    attempt = start(run)
    lines, forwarder = track.Metrics(run, "1"), track.start_forwarder(run)
    try:
        wait(lambda: "trying again" in (run.folder / "logs" / "forwarder.log").read_text())
        took_s = []
        for step in range(1, 2001):
            before = time.perf_counter()
            lines.log(step, {f"train/m{i}": i / step for i in range(10)}, tokens=step)
            lines.heartbeat(step=step, steps=2000, tokens=step)
            took_s.append(time.perf_counter() - before)
        assert statistics.median(took_s) < 200e-6  # measured: 12 us; one client call would be 30 s
        assert max(took_s) < 0.5
        assert len(run.metrics()) == 2000
    finally:
        lines.close()
        forwarder.kill()
        forwarder.wait()
    end(run, attempt, "done")


# --- addresses and secrets ------------------------------------------------------------------------


def test_a_password_is_masked_and_found_again(monkeypatch, tmp_path):
    address = "https://me:pa55@mlflow.example.org/x"
    assert mask(address) == "https://***@mlflow.example.org/x"
    assert mask(f'{{"uri":"{address}","mail":"a@b.c"}}') == '{"uri":"https://***@mlflow.example.org/x","mail":"a@b.c"}'
    assert mask("sqlite:////tmp/a@b.db") == "sqlite:////tmp/a@b.db"
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert tracking_uri(tmp_path, mask(address)) == "https://mlflow.example.org/x"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    assert tracking_uri(tmp_path, mask(address)) == address
    assert tracking_uri(tmp_path, "https://***@elsewhere.example.org") == "https://elsewhere.example.org"


def test_unreachable_is_said_soon_and_without_the_password(tmp_path):
    runs = make_chain(tmp_path, uri=f"http://me:pa55@127.0.0.1:{free_port()}")
    log_steps(runs[0], "1", range(1, 4))
    began = time.monotonic()
    for call in (lambda: track.open_runs(runs, runs[0].spec().tracking.uri), lambda: track.sync(runs[0])):
        with pytest.raises(TrackingError, match="refused") as caught:
            call()
        assert "pa55" not in str(caught.value)
        assert "orch sync" in caught.value.hint
    assert time.monotonic() - began < 5
    assert not (runs[0].folder / "tracking.json").exists()


# --- into a sqlite store --------------------------------------------------------------------------


def test_a_chain_is_opened_once(tmp_path):
    runs = make_chain(tmp_path, options={"note": "x" * 7000, "where": "s3://key:pa55@bucket/x"})
    (runs[0].folder / "plan.json").write_text('{"fits":true}')
    ids = track.open_runs(runs, None)
    before = (runs[0].folder / "tracking.json").read_text()
    assert track.open_runs(runs, None) == ids
    assert (runs[0].folder / "tracking.json").read_text() == before
    (runs[0].folder / "tracking.json").unlink()  # died before it was noted: found again by its key
    assert track.open_runs(runs, None) == ids

    with connect(tracking_uri(tmp_path, None)) as client:
        experiment = client.get_experiment_by_name("demo")
        pretrain, sft = (client.get_run(i) for i in ids)
        artifacts = {f.path for f in client.list_artifacts(ids[0])}
        assert len(client.search_runs([experiment.experiment_id])) == 2
    assert experiment.artifact_location == (tmp_path / "mlartifacts" / "demo").as_uri()
    assert artifacts == {"spec.yaml", "plan.json"}
    assert [r.info.run_name for r in (pretrain, sft)] == ["1-pretrain", "2-sft"]
    assert pretrain.info.status == "SCHEDULED"
    assert sft.data.tags | {
        "chain": "demo",
        "stage": "sft",
        "stage_index": "2",
        "orch.key": runs[1].key,
        "init_from": "pretrain",
    } == (sft.data.tags)
    assert "mlflow.parentRunId" not in sft.data.tags
    params = pretrain.data.params
    assert params["model.hidden"] == "64"
    # 12 L h^2 + 13 L h + (V + s) h + 2 h, counted by hand for L 2, h 64, V 50257, s 2048
    assert params["model.params"] == str(12 * 2 * 64**2 + 13 * 2 * 64 + (50257 + 2048) * 64 + 2 * 64)
    assert params["optimizer.betas"] == "[0.9, 0.95]"
    assert params["options.note"].endswith("... (7000 characters, all in spec.yaml)")
    assert len(params["options.note"]) == 6000
    sent_text = Path(tmp_path / "mlartifacts/demo" / ids[0] / "artifacts/spec.yaml").read_text()
    assert "pa55" not in json.dumps(params) + sent_text


def test_every_point_is_stored_once(tmp_path):
    run = make_chain(tmp_path)[0]
    attempt = start(run)
    log_steps(run, "1", range(1, 131))
    assert track.sync(run) == 130
    log_steps(run, "1r1", range(101, 161))  # from the checkpoint of step 100: same loss, other timings
    noted = (run.folder / "tracking.json").read_text()
    assert track.sync(run) == 30
    (run.folder / "tracking.json").write_text(noted)  # killed after sending, before noting
    assert track.sync(run) == 30
    assert track.sync(run) == 0
    assert stored(tmp_path / "mlflow.db", run) == written(run)
    assert len(written(run)["train/loss"]) == 160
    assert Sent.load(run).status == "SCHEDULED"  # whether it lives is not for `sync` to say
    end(run, attempt, "done")
    track.sync(run)
    with connect(tracking_uri(tmp_path, None)) as client:
        info = client.get_run(Sent.load(run).run_id).info
        curve = [f for f in client.list_artifacts(info.run_id) if f.path == "loss-curve.png"]
    assert (info.status, info.end_time) == ("FINISHED", int(attempt.ended_at * 1000))
    assert curve[0].file_size == (run.folder / "loss-curve.png").stat().st_size > 10_000


def test_a_store_that_was_emptied_is_filled_again(tmp_path):
    run = make_chain(tmp_path)[0]
    end(run, start(run), "done")
    log_steps(run, "1", range(1, 6))
    assert track.sync(run) == 5
    (tmp_path / "mlflow.db").unlink()
    command = [sys.executable, "-m", "orchestrator.cli", "--runs", str(tmp_path), "sync", run.name]
    told = subprocess.run(command, capture_output=True, text=True, check=True)  # this process has the old one open
    assert (told.stdout, "not in MLflow any more" in told.stderr) == (f"{run.name}: 5 steps sent\n", True)
    assert stored(tmp_path / "mlflow.db", run) == written(run)
    assert Sent.load(run).status == "FINISHED" and set(Sent.load(run).artifacts) >= {"spec.yaml", "loss-curve.png"}


def test_an_infinite_value_leaves_a_gap_and_not_a_cliff(tmp_path):
    run = make_chain(tmp_path)[0]
    lines = track.Metrics(run, "1")
    for step, value in enumerate((1.0, math.inf, math.nan, 2.0), 1):
        lines.log(step, {"train/loss": value}, tokens=step)
    lines.close()
    noted = (run.folder / "tracking.json", json.dumps({}))
    track.sync(run)
    noted[0].write_text(noted[1])
    track.sync(run)  # a NaN sent twice is stored once, too
    values = [value for _, value, _ in stored(tmp_path / "mlflow.db", run)["train/loss"]]
    assert values[::3] == [1.0, 2.0]
    assert [math.isnan(v) for v in values] == [False, True, True, False]


def test_the_status_is_what_the_folder_says(tmp_path):
    run = make_chain(tmp_path)[0]
    track.open_runs([run], None)

    def status() -> str:
        with connect(tracking_uri(tmp_path, None)) as client:
            return client.get_run(Sent.load(run).run_id).info.status

    track.reconcile(run, alive=True)
    assert status() == "SCHEDULED"
    attempt = start(run)
    track.reconcile(run, alive=True)
    assert status() == "RUNNING"
    track.reconcile(run, alive=False)  # killed: nothing was noted
    assert status() == "FAILED"
    track.reconcile(run, alive=True)  # requeued
    assert status() == "RUNNING"
    for cause, expected in (
        ("preempted", "KILLED"),
        ("cancelled", "KILLED"),
        ("error", "FAILED"),
        ("done", "FINISHED"),
    ):
        end(run, attempt, cause)
        track.reconcile(run, alive=False)
        assert status() == expected


def test_the_data_set_shows_as_input(tmp_path):
    run = make_chain(tmp_path)[0]
    (tmp_path / "data").mkdir()
    described = {"tokenizer_sha256": "a" * 64, "sources": {"py": {"train": {"bin_sha256": "b" * 64}, "val": {}}}}

    def inputs(change: dict) -> list[tuple[str, str]]:
        (tmp_path / "data" / "dataset.json").write_text(json.dumps(described | change))
        track.sync(run)
        with connect(tracking_uri(tmp_path, None)) as client:
            found = client.get_run(Sent.load(run).run_id).inputs.dataset_inputs
        return [(i.dataset.name, i.dataset.digest) for i in found]

    first = inputs({"encode_s": 1.0})
    assert [name for name, _ in first] == ["data"]
    assert inputs({"encode_s": 2.0}) == first  # the same tokens
    assert len(inputs({"tokenizer_sha256": "c" * 64})) == 2


@pytest.mark.slow
def test_a_new_store_is_made_by_one_process_and_whole_or_not_at_all(tmp_path):
    (tmp_path / ".mlflow.db.0.new").write_bytes(b"SQLite format 3\0 and then it was killed")
    code = (
        "import sys; from pathlib import Path; from orchestrator.store import connect, tracking_uri\n"
        "with connect(tracking_uri(Path(sys.argv[1]), None)) as client: client.create_experiment(sys.argv[2])\n"
    )
    names = ["a", "b", "c"]
    command = [sys.executable, "-c", code, str(tmp_path)]
    processes = [subprocess.Popen([*command, name], stderr=subprocess.PIPE, text=True) for name in names]
    told = [process.communicate()[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], told
    with connect(tracking_uri(tmp_path, None)) as client:
        assert {e.name for e in client.search_experiments()} == {"Default", *names}
    assert not list(tmp_path.glob("*.new"))


# --- the forwarder, killed, and a server that comes and goes ---------------------------------------


@pytest.mark.slow
def test_attempts_are_read_again_only_when_one_was_replaced(tmp_path):
    """The forwarder looks five times a second, on a file system that a thousand ranks share."""
    run = make_chain(tmp_path)[0]
    attempt, attempts = start(run), track._attempts_of(run)
    assert [a.name for a in attempts()] == ["1"]
    os.utime(run.folder / "attempts", (1.0, 1.0))  # long ago
    read = attempts()
    assert attempts() is read
    attempt.cause = "done"
    run.save_attempt(attempt)
    assert [a.cause for a in attempts()] == ["done"]
    os.utime(run.folder / "attempts", (1.0, 1.0))
    read = attempts()
    attempt.next = "stop"
    run.save_end(attempt)
    assert attempts() is not read and attempts()[0].next == "stop"


def test_killing_the_forwarder_loses_and_doubles_nothing(tmp_path):
    run = make_chain(tmp_path)[0]
    attempt = start(run)
    log_steps(run, "1", range(1, 1001), metrics=10)
    kills = sorted(random.sample(range(60, 900), 2))
    for step in kills:
        forwarder = track.start_forwarder(run)
        wait(lambda s=step: Sent.load(run).step >= s)
        forwarder.kill()  # most likely inside the next batch
        forwarder.wait()
    assert Sent.load(run).step < 1000, kills
    forwarder = track.start_forwarder(run)
    wait(lambda: Sent.load(run).status == "RUNNING")
    end(run, attempt, "done")
    assert forwarder.wait(timeout=600 * slowness()) == 0
    assert stored(tmp_path / "mlflow.db", run) == written(run), kills
    assert Sent.load(run).status == "FINISHED"


@pytest.mark.slow
def test_a_killed_trainer_leaves_no_run_running(tmp_path):
    run = make_chain(tmp_path)[0]
    start(run)
    script = (
        "import sys, time; from pathlib import Path; from orchestrator import track; from orchestrator.run import Run\n"
        "run = Run.load(Path(sys.argv[1])); lines = track.Metrics(run, '1'); print(track.start_forwarder(run).pid)\n"
        "sys.stdout.flush()\n"
        "for step in range(1, 10**9): lines.log(step, {'train/loss': 1 / step}, tokens=step); time.sleep(0.01)\n"
    )
    command = [sys.executable, "-c", script, str(run.folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as trainer:
        try:
            forwarder = int(trainer.stdout.readline())
            wait(lambda: Sent.load(run).status == "RUNNING" and Sent.load(run).step > 0)
            os.kill(forwarder, signal.SIGTERM)  # as Slurm does to all of a job
        finally:
            trainer.kill()
    wait(lambda: not Path(f"/proc/{forwarder}").exists() or "Z" in Path(f"/proc/{forwarder}/stat").read_text())
    assert Sent.load(run).status == "FAILED"
    assert stored(tmp_path / "mlflow.db", run) == written(run)


@pytest.mark.slow
def test_a_server_that_comes_and_goes_gets_every_point_once(tmp_path):
    port, store = free_port(), tmp_path / "server"
    run = make_chain(tmp_path / "runs", uri=f"http://127.0.0.1:{port}")[0]
    attempt = start(run)
    with pytest.raises(TrackingError):
        track.open_runs([run], run.spec().tracking.uri)
    forwarder = track.start_forwarder(run)
    trainer = threading.Thread(target=log_steps, args=(run, "1", range(1, 901)), kwargs={"pause_s": 0.01})
    trainer.start()
    try:
        wait(lambda: "trying again" in (run.folder / "logs" / "forwarder.log").read_text())
        with dashboard.serve(store, None, port):
            wait(lambda: Sent.load(run).step > 0)
            time.sleep(random.random())
        before = Sent.load(run)
        trainer.join()
        log_steps(run, "1r1", range(801, 1001))
        with dashboard.serve(store, None, port) as base:
            assert base.endswith(f":{port}")
            wait(lambda: Sent.load(run).step > before.step)
            forwarder.kill()
            forwarder.wait()
            forwarder = track.start_forwarder(run)
            end(run, attempt, "done")
            assert forwarder.wait(timeout=600 * slowness()) == 0
            noted = run.folder / "tracking.json"
            sent = json.loads(noted.read_text())
            assert (sent["run_id"], sent["status"], sent["step"]) == (before.run_id, "FINISHED", 1000)
            noted.write_text(json.dumps(sent | {"offset": 0, "step": 899, "status": "RUNNING"}))
            track.sync(run)  # over REST, too, what was sent before is stored once
            with connect(base) as client:
                files = {f.path for f in client.list_artifacts(sent["run_id"])}
                assert client.get_run(sent["run_id"]).info.status == "FINISHED"
        assert files == {"spec.yaml", "loss-curve.png", "logbook.md"}
        assert stored(store / "mlflow.db", run) == written(run)
    finally:
        forwarder.kill()
        forwarder.wait()
        trainer.join()
