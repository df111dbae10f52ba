"""The dashboard as a person gets it: the printed address in a real browser, from a real server."""

import json
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request

import psutil
import pytest
from browser import Browser
from clock import wait
from tracked import end, free_port, make_chain, start

from orchestrator import dashboard, track
from orchestrator.errors import TrackingError
from orchestrator.store import Sent, connect

# What plotly has drawn, by the chart's title: {title: {legend entry: [[x...], [y...]]}}
CURVES = """Object.fromEntries([...document.querySelectorAll('.js-plotly-plot')].map(plot => [
    plot.closest('[data-testid=experiment-view-compare-runs-card]').innerText.split('\\n')[0],
    Object.fromEntries(plot.data.filter(t => t.x && t.x.length).map(t => [t.name, [[...t.x], [...t.y]]]))]))"""
TEXT = "document.body ? document.body.innerText : ''"


def fill(run, steps: int, scale: float) -> dict[str, list]:
    """Log and send a run; return its training loss as [[steps], [values]]."""
    attempt = start(run)
    lines = track.Metrics(run, "1")
    loss = [scale / (1 + step) for step in range(1, steps + 1)]
    for step, value in enumerate(loss, 1):
        values = {"train/loss": value, "train/lr": 1e-3, "train/grad_norm": 1.0, "perf/tokens_per_s": 9.0}
        lines.log(step, values | ({"val/loss": value} if step % 10 == 0 else {}), tokens=step)
    lines.close()
    end(run, attempt, "done")
    track.sync(run)
    return [list(range(1, steps + 1)), loss]


def all_drawn(charts: dict | None, *, stages: int) -> dict | None:
    """``charts``, once the four on the first screen show so many curves each; they are drawn one by one."""
    first = ("train/loss", "val/loss", "train/lr", "train/grad_norm")
    return charts if charts and all(len(charts.get(title, {})) == stages for title in first) else None


def test_addresses_are_newest_first_and_each_on_its_server(tmp_path):
    for name, uri, submitted_at in (("old", None, 1.0), ("new", None, 2.0), ("elsewhere", "http://10.0.0.1:5", 3.0)):
        for run in make_chain(tmp_path, name=name, uri=uri):
            run.submissions[0].submitted_at = submitted_at
            run.save()
            Sent(uri=track.tracking_uri(tmp_path, uri), experiment_id=f"id-{name}", run_id="r").save(run)
    unheard_of = make_chain(tmp_path, name="untracked")[0]
    base = "http://127.0.0.1:1"
    found = dashboard.addresses(tmp_path, None, base)
    assert [name for name, _ in found] == ["elsewhere", "new", "old"]
    assert found[0][1].startswith("http://10.0.0.1:5/#/experiments/id-elsewhere/")
    assert found[1][1].startswith(f"{base}/#/experiments/id-new/runs?compareRunsMode=CHART")
    assert [name for name, _ in dashboard.addresses(tmp_path, "http://10.0.0.1:5", base)] == ["elsewhere"]
    assert dashboard.dashboard_url(unheard_of, base) is None


def test_the_loss_curve_is_drawn_with_its_baselines(tmp_path):
    run = make_chain(tmp_path)[0]
    assert dashboard.draw_loss(run) is None
    fill_only = track.Metrics(run, "1")
    fill_only.log(1, {"train/loss": 5.0, "val/loss": 5.1}, tokens=1000)
    fill_only.log(2, {"train/loss": 4.0}, tokens=2000)
    fill_only.close()
    plain = dashboard.draw_loss(run).read_bytes()
    assert plain.startswith(b"\x89PNG")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "dataset.json").write_text(json.dumps({"baselines": {"unigram": 5.3, "bigram": 3.6}}))
    assert dashboard.draw_loss(run).read_bytes() == plain  # nothing new was logged
    (run.folder / "loss-curve.png").unlink()
    assert dashboard.draw_loss(run).read_bytes() != plain


def test_the_reward_of_a_policy_is_drawn_beside_its_loss(tmp_path):
    run = make_chain(tmp_path)[1]
    lines = track.Metrics(run, "1")
    lines.log(1, {"train/loss": 0.5}, tokens=1000)
    assert dashboard.draw_reward(run) is None
    lines.log(2, {"train/loss": 0.4, "train/reward": -0.5, "val/reward": -0.25}, tokens=2000)
    lines.close()
    picture = dashboard.draw_reward(run)
    assert picture.name == "reward-curve.png" and picture.read_bytes().startswith(b"\x89PNG")
    assert dashboard.draw_loss(run).read_bytes() != picture.read_bytes()


def test_how_sure_a_reward_model_is_becomes_a_picture(tmp_path):
    run = make_chain(tmp_path)[0]
    assert dashboard.draw_calibration(run) is None
    curve = [{"claimed": 0.55, "right": 0.5, "pairs": 40}, {"claimed": 0.9, "right": 0.85, "pairs": 80}]
    facts = run.folder / "reward.json"
    facts.write_text(json.dumps({"accuracy": 0.73, "calibration": curve}))
    end(run, start(run), "done")
    track.sync(run)
    with connect(track.tracking_uri(tmp_path, None)) as client:
        sent = {f.path: f.file_size for f in client.list_artifacts(Sent.load(run).run_id)}
    first = (run.folder / "calibration.png").read_bytes()
    assert first.startswith(b"\x89PNG") and sent["calibration.png"] == len(first) > 10_000
    dashboard.draw_calibration(run)
    assert (run.folder / "calibration.png").read_bytes() == first
    facts.write_text(json.dumps({"accuracy": 0.9, "calibration": curve[1:]}))
    assert dashboard.draw_calibration(run).read_bytes() != first


def test_a_server_elsewhere_needs_none_here(tmp_path):
    with dashboard.serve(tmp_path, "https://me:pa55@mlflow.example.org/x") as base:
        assert base == "https://mlflow.example.org/x"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_server_that_cannot_start_says_where_to_look(tmp_path):
    with pytest.raises(TrackingError, match="ended with status") as caught:
        with dashboard.serve(tmp_path, "nonsense://x"):
            pass
    assert str(tmp_path / "mlflow-server.log") in caught.value.hint


@pytest.mark.slow
def test_a_terminated_dashboard_leaves_no_server(tmp_path):
    script = (
        "import sys, time; from pathlib import Path; from orchestrator import dashboard\n"
        "with dashboard.serve(Path(sys.argv[1]), None, 0) as base: print(base, flush=True); time.sleep(300)\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as ui:
        base = ui.stdout.readline().strip()
        servers = psutil.Process(ui.pid).children(recursive=True)
        assert urllib.request.urlopen(f"{base}/health").status == 200  # noqa: S310
        ui.terminate()
    assert ui.returncode == 128 + signal.SIGTERM
    assert servers
    assert not any(p.is_running() for p in servers)


@pytest.mark.slow
def test_the_printed_address_shows_every_stage(tmp_path):
    if not shutil.which("chromium"):
        pytest.skip("no Chromium: `make browser` as root, or `apt install chromium`, enables this test")
    runs = make_chain(tmp_path)
    track.open_runs(runs, None)
    expected = {"1-pretrain": fill(runs[0], 100, 5.0), "2-sft": fill(runs[1], 60, 2.0)}
    empty = make_chain(tmp_path, name="empty")  # submitted; nothing logged yet
    track.open_runs(empty, None)
    port = free_port()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", port))
        taken.listen()
        with dashboard.serve(tmp_path, None, port) as base, Browser(tmp_path / "profile") as browser:
            assert not base.endswith(f":{port}")
            servers = psutil.Process().children(recursive=True)
            servers = [p for p in servers if "mlflow" in " ".join(p.cmdline()) and "chrom" not in p.name()]
            assert sum(p.memory_info().rss for p in servers) < 0.7e9
            assert len(servers) <= 3

            pages = dict(dashboard.addresses(tmp_path, None, base))
            assert pages["demo"] == dashboard.dashboard_url(runs[0], base)
            browser.open(pages["demo"])
            drawn = wait(lambda: all_drawn(browser.evaluate(CURVES), stages=2))
            for name, (steps, loss) in expected.items():
                x, y = drawn["train/loss"][name]
                assert x == steps
                assert y == pytest.approx(loss, rel=1e-12)
                assert drawn["val/loss"][name][0] == [step for step in steps if step % 10 == 0]
            browser.screenshot(tmp_path / "dashboard.png")

            browser.open(pages["empty"])  # the same question has another answer where there is nothing to draw
            wait(lambda: "No charts in this section" in (browser.evaluate(TEXT) or ""))
            time.sleep(3)  # as long as the curves take above
            browser.screenshot(tmp_path / "empty.png")
            assert not any(browser.evaluate(CURVES).values())

            run_id = Sent.load(runs[0]).run_id
            curve = urllib.request.urlopen(f"{base}/get-artifact?run_uuid={run_id}&path=loss-curve.png").read()  # noqa: S310
            assert curve == (runs[0].folder / "loss-curve.png").read_bytes()
            with connect(base) as client:
                assert client.get_run(run_id).info.status == "FINISHED"
    assert not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in servers)
    assert {p.name for p in tmp_path.iterdir()} == {
        *("demo", "empty", "mlartifacts", "mlflow.db", "mlflow-server.log", "profile", "dashboard.png", "empty.png"),
        ".mlflow.db.lock",
    }
