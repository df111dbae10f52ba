"""`launch/slurmbox`: every box here is a real Slurm, with its daemons, its database and its nodes' networks."""

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from clock import slowness, wait

from launch import _slurmbox
from orchestrator.errors import LaunchError

SLURMBOX = Path(_slurmbox.__file__).with_name("slurmbox")
AS_ROOT = [] if os.geteuid() == 0 else ["unshare", "--user", "--map-root-user"]
DAEMONS = {"munged", "mariadbd", "slurmdbd", "slurmctld", "slurmd"}
HOST_FOLDERS = ("/run", "/etc/slurm", "/var/lib/mysql", "/var/lib/munge", "/var/log/slurm", "/var/log/munge")

pytestmark = pytest.mark.slurm


@pytest.fixture(autouse=True)
def able():
    try:
        _slurmbox.check()
    except LaunchError as error:
        pytest.skip(f"{error}; {error.hint}")


def box(*arguments: str | Path, ok: int = 0, timeout: float = 1200, before: tuple[str, ...] = ()) -> tuple[str, str]:
    """Run `slurmbox` with ``arguments``; return what it printed and what it said."""
    command = [*before, str(SLURMBOX), *map(str, arguments)]
    ran = subprocess.run(command, check=False, capture_output=True, text=True, timeout=timeout)
    assert ran.returncode == ok, f"{ran.returncode} instead of {ok}\n{ran.stdout}\n{ran.stderr}"
    return ran.stdout, ran.stderr


@pytest.fixture
def started(tmp_path) -> Iterator[tuple[subprocess.Popen, list[psutil.Process]]]:
    """A box of two nodes with a job on both, and all of its processes."""
    script = 'srun -N2 sleep 300 & while [ "$(squeue -h -t R -o %D)" != 2 ]; do sleep .1; done; touch "$1"; wait'
    outer = subprocess.Popen([SLURMBOX, "2", "--", "sh", "-c", script, "sh", tmp_path / "ready"])
    inside: list[psutil.Process] = []
    try:
        wait((tmp_path / "ready").exists)
        inside += psutil.Process(outer.pid).children(recursive=True)
        yield outer, inside
    finally:
        outer.kill()
        outer.wait()
        for process in inside:
            if process.is_running():  # the same one: psutil compares its start time
                process.kill()


def on_disk() -> set[str]:
    """What a Slurm, MariaDB or munge of this machine itself would write to."""
    return {str(path) for folder in HOST_FOLDERS for path in Path(folder).rglob("*")}


def test_two_nodes_with_gpus_and_accounting():
    before = on_disk()
    script = """
        srun -N2 --gpus-per-node=8 --job-name=seen sh -c 'echo $(hostname) $(hostname -I) $CUDA_VISIBLE_DEVICES'
        while ! sacct -n -X -o JobName,State,NNodes | grep COMPLETED; do sleep .2; done
        ping=$(scontrol ping); echo "$(hostname): $ping"
    """
    printed, said = box(2, "--", "sh", "-c", script)
    lines = [" ".join(line.split()) for line in printed.splitlines()]
    assert sorted(lines[:2]) == ["node1 10.77.0.2 0,1,2,3,4,5,6,7", "node2 10.77.0.3 0,1,2,3,4,5,6,7"]
    assert lines[2] == "seen COMPLETED 2"
    assert lines[3] == "login: Slurmctld(primary) at login is UP"
    assert said == "", "a start that does not take long is silent"
    assert on_disk() == before
    assert "slurmbox" not in Path("/proc/self/mountinfo").read_text()


def test_the_exit_status_is_that_of_the_command(tmp_path):
    keep = tmp_path / "kept"
    box("--keep", keep, 1, "--", "sh", "-c", "exit 7", ok=7)
    assert "slurmctld version" in (keep / "log" / "slurmctld.log").read_text()
    assert (keep / "slurm.conf").exists()
    assert "is not empty" in box("--keep", keep, 1, "--", "true", ok=125)[1]
    assert "`no-such-command`" in box(1, "--", "no-such-command", ok=127)[1]


def test_sigterm_reaches_the_command(tmp_path):
    script = 'touch "$1"; exec sleep 60'
    outer = subprocess.Popen([SLURMBOX, "1", "--", "sh", "-c", script, "sh", tmp_path / "ready"])
    try:
        wait((tmp_path / "ready").exists)
        outer.terminate()
        assert outer.wait(20 * slowness()) == 128 + signal.SIGTERM
    finally:
        outer.kill()
        outer.wait()


def test_sigkill_leaves_no_process_and_the_next_box_works(started):
    outer, inside = started
    there = {process.name() for process in inside}
    assert DAEMONS | {"sleep", "srun"} <= there, there
    outer.kill()
    outer.wait()
    _, alive = psutil.wait_procs(inside, timeout=60 * slowness())
    assert not alive
    printed, _ = box(2, "--", "srun", "-N2", "hostname")
    assert sorted(printed.split()) == ["node1", "node2"]


def test_two_boxes_do_not_meet(tmp_path):
    script = """
        touch "$1/$2"; while [ ! -e "$1/$3" ]; do sleep .1; done
        srun -N2 --job-name="$2" true
        touch "$1/$2-ran"; while [ ! -e "$1/$3-ran" ]; do sleep .1; done
        while ! sacct -n -X -o JobName | grep -q "$2"; do sleep .2; done
        sacct -n -X -o JobID,JobName
    """
    boxes = [
        subprocess.Popen([SLURMBOX, "2", "--", "sh", "-c", script, "sh", tmp_path, *pair], stdout=-1, text=True)
        for pair in (("one", "two"), ("two", "one"))
    ]
    try:
        printed = [process.communicate(timeout=300 * slowness())[0].split() for process in boxes]
    finally:
        for process in boxes:
            process.kill()
            process.wait()
    assert printed == [["1", "one"], ["1", "two"]]


def test_partition_power_cut_and_healing(tmp_path):
    """node1 stays, node2 is cut off and goes on, node3 is dead; both are DOWN, and come back."""
    script = """
        cd "$1"
        down() { sinfo -h -p main -t "$1" -o %D; }
        sbatch --parsable -w node2,node3 -N2 --no-requeue -o out --wrap \
            'srun -l sh -c "while :; do date +%s.%N > beat-\\$(hostname); sleep .2; done"' >/dev/null
        while [ ! -e beat-node2 ] || [ ! -e beat-node3 ]; do sleep .1; done
        slurmbox cut node2; slurmbox kill node3; date +%s.%N > faults
        while [ "$(down down)" != 2 ]; do sleep .2; done
        sinfo -h -p main -t down -o %N
        cp beat-node2 late-node2; cp beat-node3 late-node3
        slurmbox heal node2; slurmbox heal node3
        while [ "$(down idle)" != 3 ]; do sleep .2; done
        srun -N3 hostname
    """
    printed, _ = box(3, "--", "sh", "-c", script, "sh", tmp_path)
    first, *rest = printed.split()
    assert first == "node[2-3]"
    assert sorted(rest) == ["node1", "node2", "node3"]
    at = {name: float((tmp_path / name).read_text()) for name in ("faults", "late-node2", "late-node3")}
    assert at["late-node3"] <= at["faults"], "a node without power went on"
    assert at["late-node2"] > at["faults"] + 2, "a node off the network must go on: that is what splits a brain"


def test_the_controller_is_killed_and_started_again():
    script = """
        sbatch --parsable --wrap 'sleep 300' -o /dev/null
        while [ "$(squeue -h -o %T)" != RUNNING ]; do sleep .1; done
        touch /run/slurmbox/now; scontrol update JobId=1 Comment=seen
        while [ ! /run/slurmbox/state/job_state -nt /run/slurmbox/now ]; do sleep .1; done
        slurmbox kill slurmctld
        timeout 20 scontrol ping
        slurmbox heal slurmctld
        squeue -h -o '%i %T'
    """
    printed, _ = box(1, "--", "sh", "-c", script)
    lines = printed.splitlines()
    assert lines[0] == "1"
    assert lines[1].endswith("is DOWN")
    assert lines[-1] == "1 RUNNING"


def test_an_urgent_job_preempts_with_a_signal(tmp_path):
    """The defaults that a preempted run needs to save: the signal it asked for, and time."""
    victim = 'trap "echo told; sleep 4; echo saved; exit" USR2; echo begun; while :; do sleep .1; done'
    script = """
        sbatch -N1 --exclusive --requeue --signal=USR2@60 --open-mode=append -o "$1" --wrap "$2" >/dev/null
        while ! grep -q begun "$1" 2>/dev/null; do sleep .1; done
        srun -p urgent -N1 --exclusive hostname
    """
    printed, _ = box(1, "--", "sh", "-c", script, "sh", tmp_path / "out", f"exec srun sh -c '{victim}'")
    assert printed.split() == ["node1"]
    lines = (tmp_path / "out").read_text().splitlines()
    assert lines[0] == "begun"
    assert "told" in lines, "it was not asked to save"
    assert "saved" in lines, "it was not given the time to"


def test_an_ordinary_user(tmp_path):
    place = Path(tempfile.mkdtemp(prefix="orch-test-", dir="/tmp"))
    try:
        for package in ("launch", "orchestrator"):  # the checkout may lie where nobody can look
            shutil.copytree(
                SLURMBOX.parents[1] / package, place / package, ignore=shutil.ignore_patterns("__pycache__")
            )
        place.chmod(0o755)
        become = () if os.geteuid() else ("setpriv", "--reuid=nobody", "--regid=nogroup", "--clear-groups")
        name = pwd.getpwuid(os.geteuid()).pw_name if os.geteuid() else "nobody"
        plain = ("env", "-i", "PATH=/usr/bin:/bin")
        tried = subprocess.run(
            [*plain, *become, "unshare", "--user", "--map-current-user", "true"], check=False, capture_output=True
        )
        if tried.returncode:
            pytest.skip(
                f"no user namespaces: {tried.stderr.decode().strip()}; `sysctl user.max_user_namespaces` and the like"
            )
        script = (
            "srun -N2 sh -c 'echo $(id -un)@$(hostname)'; slurmbox cut node2; slurmbox heal node2; sacct -n | wc -l"
        )
        command = [*plain, *become, str(place / "launch" / "slurmbox"), "2", "--", "sh", "-c", script]
        ran = subprocess.run(command, check=False, capture_output=True, text=True, timeout=300 * slowness(), cwd="/")
    finally:
        shutil.rmtree(place)
    assert ran.returncode == 0, ran.stderr
    assert sorted(ran.stdout.split()[:2]) == [f"{name}@node1", f"{name}@node2"]


def test_a_missing_package_is_named_with_the_command_that_installs_it():
    hide = 'mount --bind /dev/null "$1"; shift; exec "$@"'
    where = shutil.which("slurmctld", path=_slurmbox.search_path())
    namespace = AS_ROOT or ["unshare"]
    _, said = box(2, "--", "true", ok=125, before=(*namespace, "--mount", "sh", "-c", hide, "sh", str(where)))
    assert said.splitlines()[0] == "error: not installed: `slurmctld`"
    assert "`apt-get install --no-install-recommends slurmctld " in said


def test_without_the_right_to_namespaces():
    _, said = box(2, "--", "true", ok=125, before=(*AS_ROOT, "setpriv", "--bounding-set=-sys_admin"))
    assert said.startswith("error: no namespaces for user 0: unshare: unshare failed: Operation not permitted")
    assert "hint: " in said


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (("0", "--", "true"), 2, "N is 0; it may be 1 to 1000"),
        (("1001", "--", "true"), 2, "N is 1001; it may be 1 to 1000"),
        (("two", "--", "true"), 2, "invalid int value: 'two'"),
        (("cut",), 2, "usage: slurmbox cut NAME"),
        (("cut", "node1"), 125, "is for the command that a box runs"),
        (("--keep", "/run/x", "1", "--", "true"), 125, "a box has a /run of its own"),
    ],
)
def test_what_is_refused(arguments, status, words):
    assert words in box(*arguments, ok=status)[1]


def test_a_fault_at_an_unknown_node():
    _, said = box(1, "--", "sh", "-c", "slurmbox cut ../node1; slurmbox cut node2", ok=125)
    assert "error: no node `../node1`" in said
    assert "error: no node `node2`" in said
