"""A real Slurm cluster on one Debian machine: munged, slurmctld, and a slurmd per virtual node.

A virtual node has its own network, UTS, process, mount and IPC namespace, so its own address, host name, ports,
/dev/shm, and 8 GPUs that are twins of /dev/null. Nothing leaves the machine, nothing needs systemd, cgroups or Docker.
Everything is ended by the process ids it was started with: when process 1 of a namespace ends, so does all within.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.apt import install

PACKAGES = ("slurmctld", "slurmd", "slurm-client", "munge", "iproute2", "util-linux")
PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged", "ip", "nsenter", "unshare")
SUBNET = "10.77.0"
GPUS = 8
LONGEST_SECONDS = 3600  # a cluster whose tests were killed ends by itself

SLURM_CONF = """
ClusterName=virtual
SlurmctldHost=login({subnet}.254)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/munge.sock,cred_expire=5
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SlurmdParameters=config_overrides
GresTypes=gpu
MpiDefault=none
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
StateSaveLocation={folder}/controller
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/pid/slurmctld.pid
SlurmdPidFile={folder}/pid/slurmd-%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd-%n.log
ReturnToService=2
SlurmdTimeout=10
MessageTimeout=5
KillWait=5
JobRequeue=1
EnforcePartLimits=ALL
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SchedulerParameters=batch_sched_delay=0,sched_min_interval=100000,sched_interval=1,bf_interval=2
NodeName=DEFAULT Sockets=2 CoresPerSocket=56 ThreadsPerCore=1 RealMemory=2000000 Gres=gpu:h100:{gpus} State=UNKNOWN
{nodes}
PartitionName=gpu Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=9 PreemptMode=OFF
"""

INIT = """#!/usr/bin/env bash
# init HOST: process 1 of a virtual host
hostname "$1"
export SLURM_CONF={folder}/slurm.conf
mount --make-rprivate /
mount --bind {folder}/hosts /etc/hosts
mount -t tmpfs tmpfs /dev/shm
if [ "$1" = login ]; then
    munged --key-file={folder}/munge/munge.key --socket={folder}/munge/munge.sock --pid-file={folder}/pid/munged.pid \\
        --log-file={folder}/log/munged.log --seed-file={folder}/munge/seed
    slurmctld -c
else
    mkdir -p {folder}/spool/$1
    slurmd -N "$1"
fi
sleep {seconds} &
wait $!
"""


def why_not() -> str | None:
    """Why no cluster can be brought up here; None when one can."""
    if os.geteuid() != 0:
        return "a Slurm cluster in namespaces needs root"
    if (reason := install(PACKAGES, PROGRAMS)) is not None:
        return reason
    tried = subprocess.run(
        ["unshare", "--net", "--uts", "--ipc", "--mount", "--pid", "--fork", "true"],
        text=True, capture_output=True, check=False,
    )  # fmt: skip
    return f"namespaces are not allowed here: {tried.stderr.strip()}" if tried.returncode else None


class Cluster:
    """Up from the first to the last test; `folder` holds its configuration, logs and spool."""

    def __init__(self, folder: Path, nodes: int) -> None:
        self.folder, self.count = folder, nodes
        self.prefix = f"cpt{os.getpid()}"
        self._processes: dict[str, subprocess.Popen[bytes]] = {}  # host -> unshare, whose child is process 1

    @property
    def nodes(self) -> list[str]:
        return [f"node{number}" for number in range(1, self.count + 1)]

    def up(self) -> None:
        """Bring the cluster up and wait until every node is idle."""
        self._write_configuration()
        self._lay_network()
        self._boot("login")
        until(lambda: (self.folder / "munge/munge.sock").exists(), "munged listens", 20)
        for node in self.nodes:
            self._boot(node)
        until(lambda: self.states().count("idle") == self.count, "all nodes are idle", 60)

    def down(self) -> None:
        """End what `up` started, by process id, then remove the networks."""
        for host in list(self._processes):
            self._kill(host)
        for name in ("login", *self.nodes):
            _quietly("ip", "netns", "del", f"{self.prefix}-{name}")

    def states(self) -> list[str]:
        """The state of each node in one word."""
        return self.ask("sinfo", "-h", "-N", "-p", "gpu", "-o", "%t", check=False).split()

    # --- commands

    def call(
        self, *command: str, host: str = "login", cwd: Path | None = None, environ: dict[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run a command on a host of the cluster."""
        environ = {**os.environ, **(environ or {}), "SLURM_CONF": str(self.folder / "slurm.conf")}
        inside = ["nsenter", "-t", self._process_1(host), "--net", "--uts", "--ipc", "--mount", "--pid"]
        where = [f"--wd={cwd or Path.cwd()}", "--"]
        return subprocess.run(
            [*inside, *where, *command], env=environ, text=True, capture_output=True, check=False, timeout=120
        )

    def ask(self, *command: str, host: str = "login", check: bool = True) -> str:
        """What a command prints."""
        done = self.call(*command, host=host)
        assert not check or done.returncode == 0, (command, done.stdout, done.stderr)
        return done.stdout.strip()

    def job_state(self, job: str) -> str:
        """PENDING, RUNNING, COMPLETED and so on; empty for a job that Slurm has forgotten."""
        return self.ask("squeue", "-h", "--states=all", f"--jobs={job}", "-o", "%T", check=False).partition("\n")[0]

    def job_field(self, job: str, field: str) -> str:
        """A field of `scontrol show job`."""
        words = self.ask("scontrol", "show", "job", job, check=False).split()
        return next((word.partition("=")[2] for word in words if word.startswith(f"{field}=")), "")

    def exit_code(self, job: str, seconds: float = 180) -> int:
        """The exit code of a job once it has ended for good; what it was doing when it does not end."""
        over = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        until(lambda: self.job_state(job) in over, f"job {job} has ended", seconds, lambda: self._words_on(job))
        return int(self.job_field(job, "ExitCode").split(":")[0])

    def job_named(self, name: str) -> str:
        """The id of the newest job of this name; of an array without its tasks."""
        return self.ask("squeue", "-h", "--states=all", f"--name={name}", "--sort=-i", "-o", "%F").split()[0]

    def nodes_of(self, job: str) -> list[str]:
        return self.ask("scontrol", "show", "hostnames", self.job_field(job, "NodeList")).split()

    def _words_on(self, job: str) -> str:
        log = Path(self.job_field(job, "StdOut"))
        text = log.read_text()[-3000:] if log.is_file() else "no log"
        return f"{self.ask('squeue', check=False)}\n{text}"

    # --- faults

    def power_off(self, node: str) -> None:
        """Silence first: its peers must not see connections being closed."""
        self.partition(node)
        self._kill(node)

    def boot(self, node: str) -> None:
        self.heal(node)
        self._boot(node)

    def partition(self, node: str) -> None:
        _must("ip", "-n", f"{self.prefix}-{node}", "link", "set", "eth0", "down")

    def heal(self, node: str) -> None:
        _must("ip", "-n", f"{self.prefix}-{node}", "link", "set", "eth0", "up")

    def kill_slurmd(self, node: str) -> None:
        self.ask("kill", "-9", (self.folder / f"pid/slurmd-{node}.pid").read_text().strip(), host=node)

    def start_slurmd(self, node: str) -> None:
        self.ask("slurmd", "-N", node, host=node)

    def kill_controller(self) -> None:
        self.ask("kill", "-9", (self.folder / "pid/slurmctld.pid").read_text().strip())

    def start_controller(self) -> None:
        """As after a restart of its service: it takes its jobs from StateSaveLocation."""
        self.ask("slurmctld")

    def processes(self, node: str, words: str) -> list[int]:
        """Ids, on this machine, of the processes of a node whose command line contains `words`."""
        inside = subprocess.run(
            ["ip", "netns", "pids", f"{self.prefix}-{node}"], text=True, capture_output=True, check=True
        )
        found = []
        for pid in map(int, inside.stdout.split()):
            with contextlib.suppress(OSError):
                line = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                if words in line and not line.startswith(("srun", "timeout")):
                    found.append(pid)
        return found

    # --- building it

    def _write_configuration(self) -> None:
        folder = self.folder
        for name in ("controller", "log", "munge", "dev", "pid", "spool"):
            (folder / name).mkdir(parents=True)
        for path in (folder.parent, folder, folder / "munge"):
            path.chmod(0o755)  # else munged refuses a socket that others cannot reach
        for number in range(GPUS):
            os.mknod(folder / f"dev/nvidia{number}", 0o666 | 0o020000, os.makedev(1, 3))
        nodes = f"node[1-{self.count}]"
        (folder / "gres.conf").write_text(
            f"NodeName={nodes} Name=gpu Type=h100 File={folder}/dev/nvidia[0-{GPUS - 1}]\n"
        )
        (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        address = {f"node{number}": f"{SUBNET}.{number}" for number in range(1, self.count + 1)}
        lines = [f"{ip} {name}\n::ffff:{ip} {name}\n" for name, ip in address.items()]
        (folder / "hosts").write_text(f"127.0.0.1 localhost\n{SUBNET}.254 login\n{''.join(lines)}")
        named = "\n".join(f"NodeName={name} NodeAddr={ip}" for name, ip in address.items())
        text = SLURM_CONF.format(folder=folder, subnet=SUBNET, gpus=GPUS, nodes=named)
        (folder / "slurm.conf").write_text(text)
        key = folder / "munge/munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        (folder / "init").write_text(INIT.format(folder=folder, seconds=LONGEST_SECONDS))

    def _lay_network(self) -> None:
        """A bridge inside the login host's namespace; nothing leaves the machine."""
        login = f"{self.prefix}-login"
        _must("ip", "netns", "add", login)
        _must("ip", "-n", login, "link", "set", "lo", "up")
        _must("ip", "-n", login, "link", "add", "br0", "type", "bridge")
        _must("ip", "-n", login, "addr", "add", f"{SUBNET}.254/24", "dev", "br0")
        _must("ip", "-n", login, "link", "set", "br0", "up")
        for number, node in enumerate(self.nodes, 1):
            name = f"{self.prefix}-{node}"
            _must("ip", "netns", "add", name)
            _must("ip", "-n", name, "link", "set", "lo", "up")
            peer = ("type", "veth", "peer", "name", f"v{number}", "netns", login)
            _must("ip", "-n", name, "link", "add", "eth0", *peer)
            _must("ip", "-n", login, "link", "set", f"v{number}", "master", "br0", "up")
            _must("ip", "-n", name, "addr", "add", f"{SUBNET}.{number}/24", "dev", "eth0")
            _must("ip", "-n", name, "link", "set", "eth0", "up")

    def _boot(self, host: str) -> None:
        """nsenter rather than `ip netns exec`, which mounts another /sys."""
        spaces = ["nsenter", f"--net=/run/netns/{self.prefix}-{host}"]
        new = ["unshare", "--uts", "--ipc", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
        with (self.folder / f"log/{host}.init.log").open("ab") as log:
            self._processes[host] = subprocess.Popen(
                [*spaces, *new, "bash", str(self.folder / "init"), host],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def _process_1(self, host: str) -> str:
        pid = self._processes[host].pid
        children = Path(f"/proc/{pid}/task/{pid}/children")
        until(lambda: children.read_text().strip() != "", f"{host} is booted", 10)
        return children.read_text().split()[0]

    def _kill(self, host: str) -> None:
        process = self._processes.pop(host, None)
        if process is not None:
            process.send_signal(signal.SIGKILL)
            process.wait()
            named = f"{self.prefix}-{host}"
            until(lambda: _output("ip", "netns", "pids", named) == "", f"nothing runs on {host}", 20)


def until(holds: Callable[[], bool], what: str, seconds: float = 60, describe: Callable[[], str] = lambda: "") -> None:
    """Wait until `holds()`; fail with `what` was waited for."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}\n{describe()}"
        time.sleep(0.1)


@contextlib.contextmanager
def cluster_up(folder: Path, nodes: int) -> Iterator[Cluster]:
    remove_leftovers()
    cluster = Cluster(folder, nodes)
    try:
        cluster.up()
        yield cluster
    finally:
        cluster.down()


def remove_leftovers() -> None:
    """Networks of test processes that are dead; what ran in them ended by itself or does so within the hour."""
    for line in _output("ip", "netns", "list").splitlines():
        name = line.split()[0]
        owner = name.removeprefix("cpt").partition("-")[0]
        if name.startswith("cpt") and owner.isdigit() and not Path(f"/proc/{owner}").exists():
            for pid in _output("ip", "netns", "pids", name).split():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            _quietly("ip", "netns", "del", name)


def _must(*command: str) -> None:
    done = subprocess.run(command, text=True, capture_output=True, check=False)
    assert done.returncode == 0, (command, done.stderr)


def _quietly(*command: str) -> None:
    subprocess.run(command, capture_output=True, check=False)


def _output(*command: str) -> str:
    done = subprocess.run(command, text=True, capture_output=True, check=False)
    return done.stdout.strip()
