"""A real SLURM cluster for tests: emulated hosts on this machine, without systemd, removed afterwards.

Each node is a set of namespaces (network, host name, processes, mounts) with its own IP address, /tmp and /dev/shm; the
working directory is shared, as a cluster's NFS would be. Killing a node's first process is a power cut, taking its
network link down a cut cable. Needs root, and Debian's slurm-wlm, munge and iproute2.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import stat
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.paths import ROOT

TOOLS = ("munged", "slurmctld", "slurmd", "sbatch", "ip", "nsenter", "unshare")
PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"

SLURM_CONF = """\
ClusterName=mini
SlurmctldHost={host}({net}.254)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
StateSaveLocation={folder}/state
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmdLogFile={folder}/slurmd-%n.log
SlurmdSpoolDir={folder}/spool-%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
MailProg=/bin/true
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
GresTypes=gpu
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmdParameters=config_overrides
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0
ReturnToService=2
JobRequeue=1
SlurmdTimeout=10
KillWait=5
InactiveLimit=0
MessageTimeout=5
TCPTimeout=2
UnkillableStepTimeout=15
MinJobAge=3600
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc={folder}/jobcomp.txt
NodeName=n[1-{nodes}] NodeAddr={net}.[1-{nodes}] Port={node_port} CPUs=4 Boards=1 Sockets=1 CoresPerSocket=4 \
ThreadsPerCore=1 RealMemory=8000 Gres=gpu:2 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE DefaultTime=30 PriorityTier=1 State=UP
PartitionName=urgent Nodes=ALL MaxTime=INFINITE DefaultTime=30 PriorityTier=2 State=UP
"""
# CR_Core_Memory: a job that names no memory has its nodes for itself. config_overrides: nodes may claim more cores than
# there are. cred_expire=5: a requeued job starts after seconds, not two minutes. SlurmdTimeout=10: a lost node is acted
# upon within about 20 s. jobcomp: `sacct -c` knows ended jobs. urgent: its jobs take the nodes of main's.

GRES_CONF = "NodeName=n[1-{nodes}] Name=gpu File={folder}/gpu[0-1] Flags=nvidia_gpu_env\n"
"""GPUs that can be allocated but not used: devices like /dev/null."""

FIRST_PROCESS = """
node=$1 state=$2; shift 2
hostname "$node"
mount -t tmpfs tmpfs /mnt
for i in $(seq $#); do mkdir "/mnt/$i" && mount --bind "${!i}" "/mnt/$i"; done
mount -t tmpfs tmpfs /tmp && mount -t tmpfs tmpfs /dev/shm && chmod 1777 /tmp /dev/shm
for i in $(seq $#); do mkdir -p "${!i}" && mount --bind "/mnt/$i" "${!i}"; done
mount --bind "$state/hosts" /etc/hosts
touch "$state/ready-$node"
while :; do sleep 3600 & wait $!; done
"""
"""Arguments: node, state folder, and folders that all nodes share although they may be below the host's /tmp."""


def missing() -> str:
    """Returns why no cluster can run here; empty where one can."""
    if os.geteuid() != 0:
        return "a SLURM cluster of namespaces needs root"
    lacking = [tool for tool in TOOLS if not shutil.which(tool, path=PATH)]
    return f"needs {', '.join(lacking)}: apt-get install slurm-wlm munge iproute2" if lacking else ""


def require_slurm() -> None:
    """Skips the test where no cluster can run; fails it where AURICLE_REQUIRE_SLURM is set, as in .ci/run."""
    if reason := missing():
        if os.environ.get("AURICLE_REQUIRE_SLURM"):
            pytest.fail(f"AURICLE_REQUIRE_SLURM is set, and {reason}")
        pytest.skip(reason)


def wait_for(condition: Callable[[], object], seconds: float, what: str, log: Callable[[], str] = str) -> None:
    """Waits for a condition; raises AssertionError naming `what`, with the text of `log`, after `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not happen within {seconds:g} s; {log()}"
        time.sleep(0.1)


class MiniSlurm:
    """A cluster whose state is in `folder` (a short path: those of UNIX sockets are limited to 108 bytes).

    The nodes share `folder`'s parent, this checkout, and everything outside of /tmp, with this host.
    """

    def __init__(self, folder: Path, nodes: int = 3) -> None:
        self.folder = folder
        self.nodes = [f"n{number}" for number in range(1, nodes + 1)]
        self._tag = f"a{os.getpid() % 10**6}"
        self._net = f"10.77.{os.getpid() % 256}"
        self._port = 17000 + os.getpid() % 20000
        self._inits: dict[str, int] = {}
        self.environment = {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": PATH}

    def start(self) -> None:
        """Starts all daemons and waits until all nodes are idle."""
        self.folder.mkdir(parents=True)
        (self.folder / "state").mkdir()
        host = socket.gethostname().split(".")[0]
        values = {"host": host, "net": self._net, "port": self._port, "node_port": self._port + 1}
        conf = SLURM_CONF.format(folder=self.folder, nodes=len(self.nodes), **values)
        (self.folder / "slurm.conf").write_text(conf)
        (self.folder / "gres.conf").write_text(GRES_CONF.format(folder=self.folder, nodes=len(self.nodes)))
        for gpu in ("gpu0", "gpu1"):
            os.mknod(self.folder / gpu, 0o666 | stat.S_IFCHR, os.makedev(1, 3))
        names = [f"{self._net}.{number} {name}" for number, name in enumerate(self.nodes, 1)]
        hosts = ["127.0.0.1 localhost", f"{self._net}.254 {host}", *names]
        (self.folder / "hosts").write_text("\n".join(hosts) + "\n")
        (self.folder / "munge.key").write_bytes(os.urandom(128))
        (self.folder / "munge.key").chmod(0o600)
        self.folder.chmod(0o755)
        files = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        self._run("munged", "--force", *(f"--{option}={self.folder}/munge.{name}" for option, name in files.items()))
        self._run("ip", "link", "add", f"br{self._tag}", "type", "bridge")
        self._run("ip", "addr", "add", f"{self._net}.254/24", "dev", f"br{self._tag}")
        self._run("ip", "link", "set", f"br{self._tag}", "up")
        self.start_controller()
        for node in self.nodes:
            self.boot(node)
        wait_for(lambda: len(self.idle()) == len(self.nodes), 30, f"idle nodes; logs in {self.folder}")

    def start_controller(self) -> None:
        """Starts slurmctld, also after it was killed."""
        self._run("slurmctld", "-f", self.environment["SLURM_CONF"])

    def stop(self) -> None:
        """Ends every daemon, job and namespace."""
        subprocess.run(["scancel", "-u", "root", "--full"], env=self._environment(), capture_output=True, timeout=20)
        for node in self.nodes:
            self.power_off(node)
            self._run("ip", "netns", "del", f"{self._tag}{node}", check=False)
            self._run("ip", "link", "del", f"v{self._tag}{node}", check=False)
        for name in ("slurmctld.pid", "munge.pid"):
            pid_file = self.folder / name
            if pid_file.exists():
                _kill(int(pid_file.read_text()), signal.SIGKILL)
        self._run("ip", "link", "del", f"br{self._tag}", check=False)

    def boot(self, node: str) -> None:
        """Switches a node on, or starts its slurmd again."""
        if node not in self._inits:
            self._inits[node] = self._first_process(node)
        self._on(node, "slurmd", "-f", self.environment["SLURM_CONF"], "-N", node)

    def power_off(self, node: str) -> None:
        """Kills everything on the node at once."""
        if node in self._inits:
            _kill(self._inits.pop(node), signal.SIGKILL)

    def kill_slurmd(self, node: str) -> None:
        """Kills only slurmd; the job steps on the node continue."""
        for pid in self.processes(node, "slurmd"):
            _kill(pid, signal.SIGKILL)

    def cut(self, node: str) -> None:
        """Pulls the node's network cable."""
        self._run("ip", "link", "set", f"v{self._tag}{node}", "down")

    def mend(self, node: str) -> None:
        """Connects the node's network cable again."""
        self._run("ip", "link", "set", f"v{self._tag}{node}", "up")

    def idle(self) -> list[str]:
        """Returns the names of idle nodes."""
        done = subprocess.run(
            ["sinfo", "-h", "-N", "-p", "main", "-o", "%N %T"],
            env=self._environment(),
            capture_output=True,
            text=True,
            timeout=20,
        )
        rows = [line.split() for line in done.stdout.splitlines()]
        return [node for node, state in rows if state == "idle"]

    def processes(self, node: str, word: str) -> list[int]:
        """Returns the host's ids of the processes on a node whose command line contains `word`."""
        if node not in self._inits:
            return []
        place = Path(f"/proc/{self._inits[node]}/ns/pid").readlink()
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                here = (entry / "ns" / "pid").readlink() == place
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue
            if here and word in command:
                found.append(int(entry.name))
        return found

    def _first_process(self, node: str) -> int:
        """Creates the node's namespaces; returns the host's id of its process 1."""
        space, number = f"{self._tag}{node}", self.nodes.index(node) + 1
        if not Path(f"/run/netns/{space}").exists():
            link = f"v{self._tag}{node}"
            self._run("ip", "netns", "add", space)
            self._run("ip", "link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", space)
            self._run("ip", "link", "set", link, "master", f"br{self._tag}", "up")
            self._run("ip", "-n", space, "addr", "add", f"{self._net}.{number}/24", "dev", "eth0")
            self._run("ip", "-n", space, "link", "set", "lo", "up")
            self._run("ip", "-n", space, "link", "set", "eth0", "up")
        ready = self.folder / f"ready-{node}"
        ready.unlink(missing_ok=True)
        spaces = ["--uts", "--mount", "--ipc", "--pid", "--fork", "--kill-child=KILL", "--mount-proc"]
        command = ["nsenter", f"--net=/run/netns/{space}", "unshare", *spaces, "bash", "-c", FIRST_PROCESS]
        parent = subprocess.Popen(
            [*command, "init", node, str(self.folder), str(self.folder.parent), str(ROOT)],
            env=self._environment(),
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        wait_for(ready.exists, 10, f"node {node}")
        children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()
        return int(children[0])

    def _on(self, node: str, *command: str) -> None:
        spaces = ("--net", "--uts", "--mount", "--ipc", "--pid")
        self._run("nsenter", "-t", str(self._inits[node]), *spaces, "--", *command)

    def _environment(self) -> dict[str, str]:
        return os.environ | self.environment

    def _run(self, *command: str, check: bool = True) -> None:
        done = subprocess.run(command, env=self._environment(), capture_output=True, text=True, timeout=30)
        assert not check or done.returncode == 0, f"{' '.join(command)}: {done.stderr}"


def _kill(pid: int, sign: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, sign)
