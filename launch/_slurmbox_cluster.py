"""The inside of a slurmbox: a Slurm cluster in the namespaces of this process, and the faults it can be dealt.

Called by process 1 of a box (`launch/_slurmbox.py`), and by `slurmbox cut|kill|heal` from the command it runs.
"""

import ipaddress
import os
import pwd
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

from orchestrator.errors import LaunchError

COMMAND = Path(__file__).with_name("slurmbox")
BOX = Path("/run/slurmbox")  # short, as a socket's path may have 107 characters; /run is the box's own
BIN = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"  # Debian's users have no sbin in theirs
GPUS = 8
START_S, PATIENCE_S = 120.0, 5.0  # until a start is given up, and until it says what it waits for
LOGIN = ipaddress.ip_address("10.77.0.1")
KEEP = "`--keep DIR` keeps all logs"

# AuthInfo: a requeued job may start again after `cred_expire`, 121 s by default; 5 works, 1 is ignored.
# GraceTime and preempt_send_user_signal: without both, preemption kills and does not signal.
# KillOnBadExit is left at Slurm's default: the launcher has to ask for it.
SLURM_CONF = """\
ClusterName=box
SlurmctldHost=login
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={box}/munge.sock,cred_expire=5
StateSaveLocation={box}/state
SlurmdSpoolDir={box}/spool/%n
SlurmctldPidFile={box}/slurmctld.pid
SlurmdPidFile={box}/spool/%n/slurmd.pid
SlurmctldLogFile={box}/log/slurmctld.log
SlurmdLogFile={box}/log/%n.log
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
ReturnToService=2
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=4000
GresTypes=gpu
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0,bf_interval=1,bf_continue
SlurmctldParameters=preempt_send_user_signal
DependencyParameters=kill_invalid_depend
EnforcePartLimits=ALL
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
KillWait=2
SlurmdTimeout=10
TCPTimeout=2
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=login
AccountingStoragePass={box}/munge.sock
AccountingStorageTRES=gres/gpu
NodeName=node[1-{nodes}] Sockets=2 CoresPerSocket=64 ThreadsPerCore=1 RealMemory=1000000 Gres=gpu:{gpus}
PartitionName=main Nodes=ALL Default=YES PriorityTier=10 GraceTime=20
PartitionName=urgent Nodes=ALL PriorityTier=100 PreemptMode=OFF
"""

# Only links to a device are taken for GPUs; a plain file, or a count without files, is not.
GRES_CONF = """\
AutoDetect=off
NodeName=node[1-{nodes}] Name=gpu File={box}/gpu[0-{last_gpu}]
"""

SLURMDBD_CONF = """\
AuthType=auth/munge
AuthInfo=socket={box}/munge.sock
DbdHost=login
SlurmUser={user}
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StorageUser={user}
PidFile={box}/slurmdbd.pid
LogFile={box}/log/slurmdbd.log
"""

# Process 1 of a node: it reaps what slurmd leaves, and stays when slurmd is killed, as a machine would.
NODE = 'hostname "$1"; slurmd -N "$1"; sleep infinity & wait'


def mount(*arguments: str) -> None:
    """Call `mount`."""
    run("mount", *arguments)


def start(nodes: int) -> None:
    """Bring the cluster up; when this returns, all nodes are idle."""
    socket.sethostname("login")
    write_files(nodes)
    database = ["--no-defaults", f"--datadir={BOX}/db", "--innodb-log-file-size=8M", "--innodb-buffer-pool-size=16M"]
    database += [f"--tmpdir={BOX}/scratch"]  # its names in /tmp are made of process ids, which all boxes share
    database += ["--user=root"] if os.geteuid() == 0 else []
    installing = spawn("mariadb-install-db", *database, "--skip-test-db", "--skip-name-resolve")
    run("munged", "--force", f"--key-file={BOX}/munge.key", f"--socket={BOX}/munge.sock",
        f"--pid-file={BOX}/munged.pid", f"--log-file={BOX}/log/munged.log",
        f"--seed-file={BOX}/munge.seed")  # fmt: skip
    wire(nodes)
    if installing.wait(START_S):
        raise LaunchError(f"no accounting database:\n{last_words('mariadb-install-db')}", hint=KEEP)
    # Without passwords: it listens on an address that only CMD can reach, and holds nothing but this box's jobs.
    served = spawn("mariadbd", *database, "--skip-grant-tables", "--bind-address=127.0.0.1", f"--socket={BOX}/db.sock",
                   f"--pid-file={BOX}/mariadbd.pid", "--skip-name-resolve", "--innodb-lock-wait-timeout=900",
                   "--innodb-flush-log-at-trx-commit=0")  # fmt: skip
    until("mariadbd", lambda: listens("127.0.0.1", 3306), of=served)
    run("slurmdbd")
    until("slurmdbd", lambda: listens("login", 6819))
    run("sacctmgr", "-i", "add", "cluster", "box")
    run("slurmctld")
    until("slurmctld", lambda: listens("login", 6817))
    for node in names(nodes):
        boot(node)
    until(f"all of {nodes} nodes to be idle", lambda: states() == f"idle {nodes}", log="slurmctld")


def write_files(nodes: int) -> None:
    """Write the configuration, fake GPUs and /etc/hosts."""
    for folder in ("bin", "db", "log", "state", "spool", "scratch"):
        (BOX / folder).mkdir()
    (BOX / "bin" / "slurmbox").symlink_to(COMMAND.resolve())
    for gpu in range(GPUS):
        (BOX / f"gpu{gpu}").symlink_to("/dev/null")
    user = pwd.getpwuid(os.getuid()).pw_name
    values = {"box": BOX, "user": user, "nodes": nodes, "gpus": GPUS, "last_gpu": GPUS - 1}
    for name, text in {"slurm.conf": SLURM_CONF, "gres.conf": GRES_CONF}.items():
        (BOX / name).write_text(text.format(**values))
    for name, content in {
        "slurmdbd.conf": SLURMDBD_CONF.format(**values).encode(),
        "munge.key": secrets.token_bytes(1024),
    }.items():
        (BOX / name).touch(mode=0o600)
        (BOX / name).write_bytes(content)
    hosts = ["127.0.0.1 localhost", "::1 localhost", f"{LOGIN} login"]
    hosts += [f"{address(node)} {node}" for node in names(nodes)]
    (BOX / "hosts").write_text("\n".join(hosts) + "\n")
    mount("--bind", str(BOX / "hosts"), "/etc/hosts")


def names(nodes: int) -> list[str]:
    """The nodes' host names."""
    return [f"node{i}" for i in range(1, nodes + 1)]


def address(node: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """node1 has 10.77.0.2, and so on."""
    return LOGIN + int(node.removeprefix("node"))


def wire(nodes: int) -> None:
    """Give every node a network of its own, with a cable to the login node's bridge."""
    lines = ["link set lo up", "link add box type bridge", f"addr add {LOGIN}/16 dev box", "link set box up"]
    for node in names(nodes):
        lines += [f"netns add {node}", f"link add {node} type veth peer name eth0 netns {node}"]
        lines += [f"link set {node} master box up"]
    run("ip", "-batch", "-", said="\n".join(lines))
    for node in names(nodes):
        within = ["link set lo up", f"addr add {address(node)}/16 dev eth0", "link set eth0 up"]
        run("ip", "-n", node, "-batch", "-", said="\n".join(within))


def boot(node: str) -> None:
    """Start process 1 of ``node``, and with it slurmd."""
    spawn("nsenter", f"--net=/run/netns/{node}", "unshare", "--uts", "--mount", "--pid", "--fork", "--kill-child",
          "--mount-proc", "sh", "-c", NODE, "sh", node, log=f"{node}.boot")  # fmt: skip


def cut(name: str) -> None:
    """Take a node off the network; what runs there goes on."""
    if name == "slurmctld":
        raise LaunchError("the controller cannot be cut off", hint="cut a node, or `slurmbox kill slurmctld`")
    run("ip", "link", "set", name, "down")


def kill(name: str) -> None:
    """Cut a node's power, or kill the controller; return when nothing of it runs any more."""
    if name == "slurmctld":
        pid = int((BOX / "slurmctld.pid").read_text())
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        until("the end of slurmctld", lambda: not Path("/proc", str(pid)).exists())
        return
    cut(name)  # first, so that no process of the node says goodbye to its peers
    for pid in processes(name):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    until(f"the end of {name}", lambda: not processes(name))


def heal(name: str) -> None:
    """Undo ``cut`` and ``kill``: connect a node and boot it if it is off; start the controller again."""
    if name == "slurmctld":
        run("slurmctld")
        until("slurmctld", lambda: "UP" in output("scontrol", "ping"))
        return
    run("ip", "link", "set", name, "up")
    if not processes(name):
        boot(name)


FAULTS: Mapping[str, Callable[[str], None]] = {"cut": cut, "kill": kill, "heal": heal}


def processes(node: str) -> list[int]:
    """Processes in the network of ``node``."""
    return [int(pid) for pid in output("ip", "netns", "pids", node).split()]


def states() -> str:
    """What states nodes are in, and how many: ``idle 2``."""
    return output("sinfo", "-h", "-p", "main", "-o", "%T %D").strip()


def listens(host: str, port: int) -> bool:
    """Whether someone takes connections."""
    with suppress(OSError), socket.create_connection((host, port), timeout=1):
        return True
    return False


def say(text: str) -> None:
    """Tell the user; stdout is CMD's."""
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


def environment() -> dict[str, str]:
    """What a daemon is told: nothing of the user's, so that no secret of theirs reaches a job by this way."""
    return {"PATH": f"{BIN}", "SLURM_CONF": str(BOX / "slurm.conf"), "LANG": "C.UTF-8"}


def run(program: str, *arguments: str, said: str = "") -> None:
    """Run ``program`` to its end, which for a daemon is when it has gone to the background.

    Its output goes to a file: a daemon would hold a pipe open.
    """
    log = (BOX / "log" / f"{program}.out") if (BOX / "log").is_dir() else Path(os.devnull)
    with log.open("ab") as out:
        ended = subprocess.run(
            [program, *arguments],
            check=False,
            input=said.encode(),
            stdout=out,
            stderr=out,
            env=environment(),
            timeout=START_S,
        )
    if ended.returncode:
        raise LaunchError(f"`{program}` ended with {ended.returncode}:\n{last_words(program)}", hint=KEEP)


def spawn(program: str, *arguments: str, log: str = "") -> subprocess.Popen[bytes]:
    """Start ``program`` in the background, in a session of its own: the terminal's signals are CMD's."""
    with (BOX / "log" / f"{log or program}.out").open("ab") as out:
        return subprocess.Popen(
            [program, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            cwd="/",
            env=environment(),
            start_new_session=True,
        )


def output(program: str, *arguments: str) -> str:
    """What ``program`` prints; nothing if it fails."""
    try:
        asked = subprocess.run(
            [program, *arguments], check=False, capture_output=True, text=True, env=environment(), timeout=START_S
        )
    except subprocess.TimeoutExpired:
        return ""
    return asked.stdout


def until(what: str, done: Callable[[], bool], *, log: str = "", of: subprocess.Popen[bytes] | None = None) -> None:
    """Wait; say so if it takes long, and raise LaunchError if it takes too long or the process ``of`` it ends."""
    began = time.monotonic()
    tell_at = began + PATIENCE_S
    while not done():
        now = time.monotonic()
        if of and of.poll() is not None:
            raise LaunchError(f"`{what}` ended with {of.returncode}:\n{last_words(log or what)}", hint=KEEP)
        if now > began + START_S:
            raise LaunchError(f"waited {START_S:g} s for {what}:\n{last_words(log or what)}", hint=KEEP)
        if now > tell_at:
            say(f"slurmbox: waiting for {what}, {now - began:.0f} s")
            tell_at = now + PATIENCE_S
        time.sleep(0.02)


def last_words(program: str) -> str:
    """The ends of what ``program`` logged and printed."""
    told = []
    for name in (f"{program}.log", f"{program}.out"):
        with suppress(OSError):
            told += (BOX / "log" / name).read_text(errors="replace").splitlines()[-5:]
    return "\n".join(f"  {line}" for line in told)
