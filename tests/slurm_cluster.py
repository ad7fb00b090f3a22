"""A real Slurm cluster on this machine: slurmctld, munged and one slurmd per node, all this user's own; no
root, no cgroups.
"""

import ctypes
import getpass
import os
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path

SETTINGS = """\
ClusterName=lab
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={dir}/munge.sock,cred_expire=5
StateSaveLocation={dir}/state
SlurmdSpoolDir={dir}/spool/%n
SlurmctldPidFile={dir}/slurmctld.pid
SlurmdPidFile={dir}/slurmd-%n.pid
SlurmctldLogFile={dir}/log/slurmctld.log
SlurmdLogFile={dir}/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
MailProg=/bin/true
GresTypes=gpu
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SlurmctldParameters=preempt_send_user_signal
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0,bf_interval=1
EnforcePartLimits=ALL
JobRequeue=1
ReturnToService=2
KillWait=15
MinJobAge=3600
SlurmdTimeout=10
FirstJobId={first_job}
NodeName=127.0.0.[11-{last}] NodeAddr=127.0.0.1 Port=[{first_port}-{last_port}] \\
  CPUs=8 RealMemory=4000 Gres=gpu:4 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 \\
  PreemptMode=REQUEUE GraceTime=20
PartitionName=high Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""


def is_installed() -> bool:
    if "/usr/sbin" not in os.environ["PATH"].split(":"):
        os.environ["PATH"] += ":/usr/sbin:/sbin"  # an ordinary user's lacks them
    return all(map(shutil.which, ("slurmctld", "slurmd", "munged", "sbatch")))


class SlurmCluster:
    """Nodes 127.0.0.11 … with 8 CPUs and 4 pretended GPUs each; partitions main and high, which preempts it.
    Sets SLURM_CONF.
    """

    def __init__(self, nodes: int):
        self.dir = Path(
            tempfile.mkdtemp(prefix="slurm", dir="/tmp")
        )  # munge's socket needs a short path that all can traverse
        self.dir.chmod(0o755)
        self.nodes = [f"127.0.0.{11 + i}" for i in range(nodes)]
        for name in ("state", "log", *(f"spool/{node}" for node in self.nodes)):
            (self.dir / name).mkdir(parents=True)
        for i in range(4):
            (self.dir / f"gpu{i}").touch()
        (self.dir / "munge.key").touch(0o600)
        (self.dir / "munge.key").write_bytes(os.urandom(1024))
        (self.dir / "gres.conf").write_text(f"Name=gpu File={self.dir}/gpu[0-3]\n")
        port = find_ports(nodes + 1)
        (self.dir / "slurm.conf").write_text(
            SETTINGS.format(
                dir=self.dir,
                user=getpass.getuser(),
                port=port,
                first_port=port + 1,
                last_port=port + nodes,
                last=10 + nodes,
                first_job=random.randrange(1000, 60_000_000),
            )
        )  # the port of rank 0 follows from it: two clusters may run at once
        os.environ["SLURM_CONF"] = str(self.dir / "slurm.conf")
        d, self.daemons = self.dir, {}
        self.start(
            "munged",
            "munged",
            "-F",
            f"--socket={d}/munge.sock",
            f"--key-file={d}/munge.key",
            f"--pid-file={d}/munged.pid",
            f"--log-file={d}/log/munged.log",
            f"--seed-file={d}/munge.seed",
        )
        wait(lambda: (d / "munge.sock").exists(), 10)
        self.start("slurmctld", "slurmctld", "-D")
        for node in self.nodes:
            self.start_node(node)
        wait(lambda: self("sinfo -h -t idle -o %D").strip() == str(nodes), 30)

    def start(self, name, *command):
        log = open(self.dir / "log" / f"{name}.out", "ab")
        self.daemons[name] = subprocess.Popen(
            command, stdout=log, stderr=log, start_new_session=True, preexec_fn=die_with_parent
        )

    def start_node(self, node):
        self.start(node, "slurmd", "-D", "-N", node)

    def kill_node(self, node):
        self.daemons[node].kill()
        self.daemons[node].wait()

    def __call__(self, command: str) -> str:
        return subprocess.run(command, shell=True, capture_output=True, text=True).stdout

    def field(self, job: str, name: str) -> str:
        """Of `scontrol show job`."""
        words = self(f"scontrol show job -o {job}").split()
        return next((word.split("=", 1)[1] for word in words if word.startswith(f"{name}=")), "")

    def close(self):
        self(f"scancel -f -u {getpass.getuser()}")
        time.sleep(1)
        for daemon in reversed(self.daemons.values()):  # munged last: the others need it
            if daemon.poll() is None:
                daemon.terminate()
                try:
                    daemon.wait(10)
                except subprocess.TimeoutExpired:
                    daemon.kill()
        for process in Path("/proc").glob("[0-9]*"):  # what a killed slurmd left behind
            try:
                mine = (
                    f"SLURM_CONF={self.dir}".encode() in (process / "environ").read_bytes()
                    and int(process.name) != os.getpid()
                )
            except OSError:
                continue
            if mine and b"slurmstepd" in (process / "cmdline").read_bytes():
                os.kill(int(process.name), signal.SIGKILL)
        del os.environ["SLURM_CONF"]
        shutil.rmtree(self.dir, ignore_errors=True)


def die_with_parent():
    ctypes.CDLL(None).prctl(
        1, signal.SIGTERM
    )  # PR_SET_PDEATHSIG: nothing is left where the tests are interrupted


def find_ports(count: int) -> int:
    """The first of so many free ports in a row, below those the system hands out."""
    while True:
        first = random.randrange(10_000, 19_000)
        try:
            for port in range(first, first + count):
                with socket.socket() as s:
                    s.bind(("127.0.0.1", port))
            return first
        except OSError:
            pass


def wait(condition, timeout: float):
    """The condition's value once it is true. Raises TimeoutError."""
    deadline = time.monotonic() + timeout
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise TimeoutError
        time.sleep(0.1)
    return value
