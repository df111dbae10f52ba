"""A real Slurm of N nodes on this machine, for as long as one command runs: what `launch/slurmbox` executes.

    slurmbox                      turns into `unshare`, which turns into Python again, now in fresh namespaces
     └─ process 1                 dies when its parent does, by whatever death; with it dies all that is below
         ├─ munged, mariadbd, slurmdbd, slurmctld
         ├─ node1 ... nodeN       a network, host name and process 1 of its own each, so that it can lose either
         │   └─ slurmd            and the job steps
         └─ CMD                   on the host `login`

Everything these write lies on a tmpfs that only they see, so nothing is left behind. An ordinary user gets
the same through a user namespace. Uses the standard library only: it runs before anything is installed.
"""

import argparse
import ctypes
import os
import pwd
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from launch._slurmbox_cluster import BIN, BOX, COMMAND, FAULTS, START_S, mount, say, start
from orchestrator.errors import LaunchError

MOST_NODES = 1000  # a Linux bridge has 1024 ports
FAILED = 125  # as with `env` and `timeout`: the box failed, not CMD

PACKAGES = {
    "slurmctld": "slurmctld",
    "slurmd": "slurmd",
    "srun": "slurm-client",
    "munged": "munge",
    "slurmdbd": "slurmdbd",
    "mariadbd": "mariadb-server",
    "mariadb-install-db": "mariadb-server",
    "ip": "iproute2",
    "unshare": "util-linux",
    "mount": "mount",
}
INSTALL = (
    "apt-get install --no-install-recommends "
    "slurmctld slurmd slurm-client munge slurmdbd slurm-wlm-mysql-plugin mariadb-server iproute2"
)


def main() -> None:
    """Parse the command line, do what it says, and leave with CMD's exit status."""
    argv = sys.argv[1:]
    try:
        if argv[:1] == ["_inside"]:
            sys.exit(inside(int(argv[1]), argv[2], argv[3:]))
        if argv[:1] and argv[0] in FAULTS:
            fault(argv)
        else:
            outside(argv)
    except LaunchError as error:
        report(error)
        sys.exit(FAILED)


def report(error: LaunchError) -> None:
    """Tell the user what is wrong and the way out."""
    say(f"error: {error}")
    if error.hint:
        say(f"hint: {error.hint}")


# Before the box.


def outside(argv: Sequence[str]) -> None:
    """Check what is needed, then become the box's outermost process."""
    split = list(argv).index("--") if "--" in argv else len(argv)
    parser = argparse.ArgumentParser(
        prog="slurmbox",
        usage="slurmbox [--keep DIR] N [-- CMD...]\n       slurmbox cut|kill|heal NODE   (in a box)\n"
        "       slurmbox kill|heal slurmctld  (in a box)",
        description="A real Slurm of N nodes on this machine while CMD (or a shell) runs; its exit status is CMD's.",
    )
    parser.add_argument("nodes", metavar="N", type=int, help=f"number of nodes, 1 to {MOST_NODES}, 8 fake GPUs each")
    parser.add_argument("--keep", metavar="DIR", help="keep logs, configuration and state in DIR, new or empty")
    given = parser.parse_args(argv[:split])
    if not 1 <= given.nodes <= MOST_NODES:
        parser.error(f"N is {given.nodes}; it may be 1 to {MOST_NODES}")
    check()
    keep = kept(Path(given.keep).absolute()) if given.keep else ""
    command = list(argv[split + 1 :]) or [os.environ.get("SHELL", "/bin/sh")]
    os.environ["PATH"] = search_path()
    box = [sys.executable, str(COMMAND), "_inside", str(given.nodes), str(keep), *command]
    os.execvp("unshare", ["unshare", *namespaces(), "--", *box])  # noqa: S606


def search_path() -> str:
    """The user's PATH, and where daemons live."""
    return f"{os.environ.get('PATH', '')}:{BIN}".lstrip(":")


def namespaces() -> list[str]:
    """Options of `unshare` for a box; an ordinary user keeps name and, within the box, capabilities."""
    as_user = [] if os.geteuid() == 0 else ["--user", "--map-current-user", "--keep-caps"]
    return [*as_user, "--net", "--mount", "--uts", "--pid"]


def check() -> None:
    """Raise LaunchError if this machine cannot hold a box, with the command that changes it."""
    missing = {
        program: package for program, package in PACKAGES.items() if not shutil.which(program, path=search_path())
    }
    if missing:
        raise LaunchError(
            f"not installed: {', '.join(f'`{program}`' for program in missing)}",
            hint=f"on Debian or Ubuntu `make slurm`, or as root `{INSTALL}`",
        )
    try:
        pwd.getpwuid(os.getuid())
    except KeyError:
        raise LaunchError(
            f"user id {os.getuid()} has no name, and Slurm needs one", hint="run as another user"
        ) from None
    trial = ["unshare", *namespaces(), "--fork", "--mount-proc", "mount", "-t", "tmpfs", "slurmbox", "/run"]
    tried = subprocess.run(
        trial, check=False, env={"PATH": search_path()}, capture_output=True, text=True, timeout=START_S
    )
    if tried.returncode:
        raise LaunchError(f"no namespaces for user {os.getuid()}: {tried.stderr.strip()}", hint=how_to_allow())


def how_to_allow() -> str:
    """The commands that allow namespaces, as far as the kernel says what forbids them."""
    wanted = {
        "kernel.unprivileged_userns_clone": "1",
        "kernel.apparmor_restrict_unprivileged_userns": "0",
        "user.max_user_namespaces": "10000",
    }
    forbids = []
    for name, value in wanted.items():
        with suppress(OSError):
            now = Path("/proc/sys", *name.split(".")).read_text().strip()
            if now == ("1" if value == "0" else "0"):
                forbids.append(f"`sysctl -w {name}={value}`")
    if os.geteuid() == 0:
        return "root of a container needs CAP_SYS_ADMIN and CAP_NET_ADMIN: `docker run --privileged`"
    return f"as root {' and '.join(forbids)}" if forbids else "run slurmbox as root; a container must be privileged"


def kept(folder: Path) -> Path:
    """Make ``folder``, which the user will keep, or refuse it."""
    if folder.is_relative_to("/run"):
        raise LaunchError(f"`--keep {folder}`: a box has a /run of its own", hint="name a folder elsewhere")
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise LaunchError(f"`--keep {folder}`: the folder is not empty", hint="name a new one")
    return folder


# In the box's namespaces.


def inside(nodes: int, keep: str, command: Sequence[str]) -> int:
    """Fork process 1 of the box, hand signals on to it, and return its exit status."""
    alive, held = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(held)
        die_with_parent(alive)
        status = FAILED
        try:
            status = first(nodes, keep, command)
        except LaunchError as error:
            report(error)
        except KeyboardInterrupt:
            status = 128 + signal.SIGINT
        finally:
            os._exit(status)
    pass_on(child)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def die_with_parent(alive: int) -> None:
    """Have the kernel kill this process once its parent is gone; ``alive`` is a pipe the parent holds open."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, int(signal.SIGKILL), 0, 0, 0)
    if select.select([alive], [], [], 0)[0]:  # it was gone before
        os._exit(FAILED)


def pass_on(child: int) -> None:
    """Hand SIGTERM and SIGHUP on to ``child``; SIGINT it gets from the terminal, as we do."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda received, _: os.kill(child, received))
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def first(nodes: int, keep: str, command: Sequence[str]) -> int:
    """Process 1 of the box: start the cluster, run ``command``, reap; its end is the end of everything in the box."""
    signal.signal(signal.SIGTERM, lambda *_: os._exit(128 + signal.SIGTERM))
    mount("-t", "proc", "proc", "/proc")
    mount("-t", "tmpfs", "-o", "mode=755", "slurmbox", "/run")
    BOX.mkdir()
    if keep:
        mount("--bind", keep, str(BOX))
    start(nodes)
    foreign = ("SLURM", "SBATCH_", "SRUN_", "SALLOC_", "XDG_RUNTIME_DIR")  # of another cluster; of another /run
    env = {key: value for key, value in os.environ.items() if not key.startswith(foreign)}
    env |= {"SLURM_CONF": str(BOX / "slurm.conf"), "PATH": f"{BOX}/bin:{os.environ['PATH']}"}
    try:
        child = subprocess.Popen(command, env=env)  # kept, as one that is dropped may reap its process
    except OSError as error:
        say(f"error: `{command[0]}`: {error.strerror}")
        return 127 if isinstance(error, FileNotFoundError) else 126
    pass_on(child.pid)
    while True:
        pid, status = os.wait()
        if pid == child.pid:
            code = os.waitstatus_to_exitcode(status)
            return code if code >= 0 else 128 - code


def fault(argv: Sequence[str]) -> None:
    """`slurmbox cut|kill|heal NAME`, called by CMD."""
    verb, *rest = argv
    if len(rest) != 1:
        say(f"usage: slurmbox {verb} NAME")
        sys.exit(2)
    if socket.gethostname() != "login" or not BOX.is_dir():
        raise LaunchError(f"`slurmbox {verb}` is for the command that a box runs", hint="`slurmbox 2 -- CMD`")
    (name,) = rest
    if not re.fullmatch(r"node[0-9]+|slurmctld", name) or not (
        name == "slurmctld" or Path("/run/netns", name).exists()
    ):
        raise LaunchError(f"no node `{name}`", hint="`sinfo -N` lists the nodes; `slurmctld` is the controller")
    FAULTS[verb](name)
