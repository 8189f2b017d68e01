"""A SLURM cluster of one node on loopback, for as long as a context or a command lasts.

`python slurm_cluster.py COMMAND ...` runs a command in it. Needs root, and Debian's slurm-wlm and munge; no systemd.
"""

import contextlib
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator

CONFIG = """
ClusterName=one
SlurmctldHost=localhost
SlurmUser=root
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
AuthType=auth/munge
AuthInfo=socket={directory}/munge.socket,cred_expire=5
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/spool
SlurmctldPidFile={directory}/slurmctld.pid
SlurmdPidFile={directory}/slurmd.pid
SlurmctldLogFile={directory}/slurmctld.log
SlurmdLogFile={directory}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
KillWait=60
ReturnToService=2
MpiDefault=none
NodeName=localhost CPUs=2 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
DAEMONS = ("munged", "slurmctld", "slurmd")  # in the order of their start
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY"}


def why_not() -> str | None:
    """What is missing here, in words."""
    if os.geteuid():
        return "SLURM's daemons need root"
    missing = [name for name in (*DAEMONS, "scontrol") if not shutil.which(name)]
    return f"not installed: {', '.join(missing)} (apt-get install slurm-wlm munge)" if missing else None


def until(true: Callable[[], object], seconds: float, what: str, log: pathlib.Path | None = None) -> None:
    """Wait for something to be true."""
    end = time.monotonic() + seconds
    while not true():
        if time.monotonic() > end:
            raise TimeoutError(f"{seconds:g} s, and still not: {what}\n{log.read_text() if log else ''}")
        time.sleep(0.1)


class Cluster:
    """What runs, and how its jobs stand."""

    def __init__(self, directory: pathlib.Path):
        self.directory = directory
        self.environment = os.environ | {"SLURM_CONF": str(directory / "slurm.conf")}

    def ask(self, *command: object) -> str:
        """The output of one of SLURM's commands."""
        command = [str(each) for each in command]
        return subprocess.run(command, env=self.environment, capture_output=True, text=True, check=True).stdout

    def job(self, number: object) -> dict[str, str]:
        """The fields of a job."""
        return dict(re.findall(r"(\w+)=(\S*)", self.ask("scontrol", "show", "job", number)))

    def ended(self, *numbers: object, seconds: float) -> list[str]:
        """The states in which jobs have ended, waited for."""

        def states() -> list[str]:
            return [self.job(number)["JobState"] for number in numbers]

        until(lambda: ENDED.issuperset(states()), seconds, f"jobs {numbers} ended")
        return states()


@contextlib.contextmanager
def cluster() -> Iterator[Cluster]:
    """A cluster of two cores that is ready for jobs; nothing of it is left afterwards."""
    directory = pathlib.Path(tempfile.mkdtemp(prefix="slurm-"))
    directory.chmod(0o755)  # munged wants its socket to be within everybody's reach
    try:
        here = Cluster(directory)
        try:
            _start(here)
            yield here
            _end_jobs(here)
        finally:
            _stop(directory)
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _start(here: Cluster) -> None:
    directory, logs = here.directory, {}
    (directory / "slurm.conf").write_text(CONFIG.format(directory=directory, ports=_free_ports(2)))
    key = directory / "munge.key"
    key.touch(mode=0o600)
    key.write_bytes(os.urandom(128))
    for name in ("state", "spool"):
        (directory / name).mkdir()
    munge = {"key-file": key} | {f"{name}-file": directory / f"munged.{name}" for name in ("pid", "seed")}
    munge["socket"] = directory / "munge.socket"
    commands = {
        "munged": ["munged", "--foreground", *(f"--{name}={value}" for name, value in munge.items())],
        "slurmctld": ["slurmctld", "-D", "-i"],
        "slurmd": ["slurmd", "-D"],
    }
    for name in DAEMONS:
        logs[name] = directory / f"{name}.out"
        with logs[name].open("w") as log:
            subprocess.Popen(
                commands[name],
                env=here.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        if name == "munged":
            until(munge["socket"].exists, 120, "munged listens", logs[name])

    def idle() -> bool:
        asked = subprocess.run(["sinfo", "-h", "-o", "%T"], env=here.environment, capture_output=True, text=True)
        return asked.stdout.strip() == "idle"

    until(idle, 120, "the node is idle", logs["slurmctld"])


def _end_jobs(here: Cluster) -> None:
    here.ask("scancel", "--user=root", "--state=PENDING")
    here.ask("scancel", "--user=root", "--state=RUNNING", "--full", "--signal=KILL")
    until(lambda: not here.ask("squeue", "--noheader"), 120, "no job is left")


def _stop(directory: pathlib.Path) -> None:
    for name in reversed(DAEMONS):
        file = directory / f"{name}.pid"
        if file.is_file():
            pid = int(file.read_text())
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, 0)


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


if __name__ == "__main__":
    if reason := why_not():
        sys.exit(f"no SLURM here: {reason}")
    with cluster() as here:
        sys.exit(subprocess.run(sys.argv[1:], env=here.environment).returncode)
