"""RUN/lock: one run, one writer. Two of them would mix its logs and delete each other's checkpoints.

Process 0 takes it before anything of the run is read or touched, and gives it back at the end. The file says
who holds it: host, pid and the process's start time, scheduler's job and its start, since when. What a killed
process leaves behind is taken over by the next start, where the holder is known to be gone:

    a process of this machine    /proc has no such process, or another one under a pid that is used again
    this job, started again      the scheduler ends a start before it begins the next one
    another job                  squeue or qstat has none of that number that waits or runs
    before a reboot              this machine's boot id is another by now

Nothing else tells, so all other starts are refused: a person may know, and delete the file.
"""

import contextlib
import errno
import fcntl
import json
import os
import re
import secrets
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from errors import UserError
from files import read_json, remove_leftovers, temporary
from launch.distributed import get_host
from launch.logs import get_job_id

NO_LINKS = errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK
HOST_PIDS = 4026531836  # inode of the pid namespace that a machine begins with: PROC_PID_INIT_INO of Linux


@dataclass
class Lock:
    """A lock that this process holds."""

    path: Path
    id: str  # of this one among all locks
    made: list[Path]  # the run's folder and those above it, where `take` made them, innermost first
    notes: list[str] = field(default_factory=list)  # from whom it was taken over

    def close(self) -> None:
        """Give it back, and take away the folders that were made for it and have nothing in them. Where
        somebody deleted the file and another process has locked the run since, that lock stays."""
        try:
            if read_holder(self.path).get("id") == self.id:
                self.path.unlink()
        except FileNotFoundError:
            pass
        except OSError as error:
            raise UserError(f"{self.path} can't be removed: {error.strerror}") from None
        remove_folders(self.made)


def take(run_dir: Path) -> Lock:
    """Take the lock of the run, making its folder if need be. Raises UserError where another process holds
    it or may do so, and OSError where the machine refuses."""
    own, path = describe_self(os.environ), run_dir / "lock"
    made = [folder for folder in (run_dir, *run_dir.parents) if not folder.exists()]
    lock = Lock(path, own["id"], made)
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        remove_leftovers(run_dir, "lock.*.tmp")
        with temporary(path) as partial:
            with open(partial, "w") as file:
                json.dump(own, file, indent=1)
                file.flush()
                os.fsync(file.fileno())  # or a crash could leave a name without its content
            while not create(partial, path):
                try:
                    note = take_over(partial, path, own)
                except FileNotFoundError:  # given back just now: there is none to take over
                    continue
                if note:  # else another process has taken it over: ask again, about that one
                    lock.notes.append(note)
                    break
    except BaseException:
        remove_folders(made)
        raise
    return lock


def remove_folders(folders: list[Path]) -> None:
    """Those that are empty."""
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rmdir()


# ----------------------------------------------------------------------------------------------------
# the file


def create(partial: Path, path: Path) -> bool:
    """Give the file `partial` the name `path` as well. False if that is taken: of several processes that come
    at once, one has it."""
    try:
        os.link(partial, path)
        return True
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
    # A file system without hard links. For a moment the lock is empty there.
    text = partial.read_text()
    try:
        with open(path, "x") as file:
            file.write(text)
    except FileExistsError:
        return False
    except OSError:
        path.unlink(missing_ok=True)
        raise
    return True


def take_over(partial: Path, path: Path, own: dict) -> str | None:
    """Put the file `partial` in the place of a lock whose holder is gone. Returns a sentence about that, None
    where another process was faster. Raises UserError where the holder is not known to be gone,
    FileNotFoundError where there is no lock any more.

    Of several processes that find the same one, the first to have an flock on the dead holder's file replaces
    it; the others then see that the file under that name is another."""
    try:
        file = open(path, "r+b")
    except PermissionError:  # another user's
        check_gone(path, read_holder(path), own)
        raise
    with file:
        holder = read_holder(path)
        check_gone(path, holder, own)
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            raise UserError(
                f"{path} was left by {describe(holder)}, which is gone, and can't be taken over safely, "
                f"because this file system has no locks ({error.strerror}): delete the file"
            ) from None
        if not os.path.samestat(os.fstat(file.fileno()), path.stat()):
            return None
        os.replace(partial, path)
    return f"{path} was left by {describe(holder)}, which is gone: taken over"


def read_holder(path: Path) -> dict:
    """What a lock says of its holder. Raises UserError for what is no lock, FileNotFoundError where there is
    none."""
    for is_last in (False, True):
        try:
            return read_json(path)
        except UserError:
            path.stat()  # which raises FileNotFoundError if it was given back
            if not is_last:
                time.sleep(1)  # `create` may be writing it
    raise UserError(
        f"{path} is damaged, so nobody knows whose it is: delete it if no other process works on the run"
    )


def describe(holder: Mapping) -> str:
    job = f" of job {holder['job']}" if holder.get("job") else ""
    return f"process {holder.get('pid')} on {holder.get('host')}{job}"


# ----------------------------------------------------------------------------------------------------
# whether its holder is alive


def check_gone(path: Path, holder: Mapping, own: Mapping) -> None:
    """Raise UserError unless the lock's holder is known to be gone."""
    alive = is_alive(holder, own)
    who = f"{describe(holder)}, since {holder.get('since')}"
    if alive:
        raise UserError(
            f"{path.parent} is in use by {who}: wait for it or stop it, or choose another --run_dir"
        )
    if alive is None:
        raise UserError(
            f"{path.parent} is in use by {who}, and nothing tells from here whether it still runs: if it is "
            f"gone, delete {path}"
        )


def describe_self(env: Mapping[str, str]) -> dict:
    """What this process writes into a lock."""
    scheduler, job, restarts, cluster = None, None, None, None
    if "SLURM_JOB_ID" in env:
        scheduler, job, cluster = "slurm", get_job_id(env), env.get("SLURM_CLUSTER_NAME")
        restarts = env.get("SLURM_RESTART_COUNT", "0")
    elif "PBS_JOBID" in env:
        scheduler, job, restarts = "pbs", env["PBS_JOBID"], get_pbs_run_count(env["PBS_JOBID"])
    return {
        "host": get_host(),
        "pid": os.getpid(),
        "started": get_start_time(os.getpid()),
        "boot": Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
        "machine": get_machine_id(),
        "pid_namespace": os.stat("/proc/self/ns/pid").st_ino,  # a container's pids are its own
        "scheduler": scheduler,
        "job": job,
        "cluster": cluster,
        "restarts": restarts,
        "since": time.strftime("%F %T"),
        "id": secrets.token_hex(8),
    }


def get_machine_id() -> str | None:
    """What tells this machine from others, whatever their host names; None where nothing does, as in a
    container, whose /etc is its image's."""
    if os.stat("/proc/self/ns/pid").st_ino != HOST_PIDS:
        return None
    try:
        return Path("/etc/machine-id").read_text().strip() or None
    except OSError:
        return None


def get_start_time(pid: int) -> int | None:
    """When a process began, in ticks since this machine's start; None where there is none, or only what its
    parent has yet to hear of."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    state, *fields = text.rpartition(")")[2].split()  # the name before it may have spaces and brackets
    return None if state in "ZX" else int(fields[18])  # field 22 of proc(5)


def is_hidden(pid: int) -> bool:
    """Whether there is such a process of another user's, and /proc does not show it (its option hidepid)."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return not Path(f"/proc/{pid}").exists()
    return False


def is_alive(holder: Mapping, own: Mapping) -> bool | None:
    """Whether a lock's holder is alive, as the process that `own` describes can know it. None: it can't."""
    same = lambda *names: all(holder.get(name) == own[name] for name in names)
    if same("boot", "pid_namespace"):
        return is_hidden(holder["pid"]) or get_start_time(holder["pid"]) == holder["started"]
    if holder.get("job"):
        if not same("scheduler", "cluster", "job"):
            return is_active(holder)
        # Within one start of a job it is another of its steps, which may run beside this one.
        return None if same("restarts") else False
    if same("host", "machine") and own["machine"] and not same("boot"):
        return False
    return None


# ----------------------------------------------------------------------------------------------------
# asking the scheduler


def is_active(holder: Mapping) -> bool | None:
    """Whether the scheduler has the holder's job waiting or running. None: there is no answer."""
    if holder.get("scheduler") == "slurm":
        if holder.get("cluster") != get_cluster():  # two of them may share a file system, and job numbers
            return None
        asked, gone = ask("squeue", "-h", "-j", holder["job"], "-o", "%T"), ["Invalid job id"]
    else:
        asked, gone = ask("qstat", holder["job"]), ["has finished", "Unknown Job Id"]
    if asked is None:
        return None
    if asked.returncode:
        return False if any(text in asked.stderr for text in gone) else None
    return bool(asked.stdout.strip())


def get_cluster() -> str | None:
    """The name of this machine's Slurm, None where it does not answer."""
    asked = ask("scontrol", "show", "config")
    found = re.search(r"^ClusterName\s*=\s*(\S+)", asked.stdout, re.MULTILINE) if asked else None
    return found and found[1]


def get_pbs_run_count(job: str) -> str | None:
    """How often PBS has started the job, which it tells nobody in the environment."""
    asked = ask("qstat", "-f", job)
    found = re.search(r"^\s*run_count\s*=\s*(\d+)", asked.stdout, re.MULTILINE) if asked else None
    return found and found[1]


def ask(*command: str) -> subprocess.CompletedProcess | None:
    """Run one of the scheduler's commands. None where there is no such command, or no answer in a minute."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
