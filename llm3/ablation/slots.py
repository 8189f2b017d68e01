"""What stage runs that train at the same time get of this machine: each its own cores and its own GPUs."""

import os
import shutil
import subprocess
from typing import NamedTuple

from llm3.errors import UserError, counted

VISIBLE = "CUDA_VISIBLE_DEVICES"


class Slot(NamedTuple):
    """The share of one stage run."""

    number: int
    cores: frozenset[int]
    gpus: tuple[str, ...]  # (): there are none

    @property
    def variables(self) -> dict[str, str]:
        """The variables of its process."""
        return {VISIBLE: ",".join(self.gpus)} if self.gpus else {}


def slots(jobs: int) -> list[Slot]:
    """The shares of so many stage runs. Raises UserError if there are GPUs, but too few."""
    cores, gpus = sorted(os.sched_getaffinity(0)), visible_gpus()
    if gpus and len(gpus) < jobs:
        raise UserError(f"--jobs={jobs}: there are {counted(len(gpus), 'GPU')}, and each stage run needs its own")
    return [Slot(i, frozenset(cores[i::jobs] or cores), tuple(gpus[i::jobs])) for i in range(jobs)]


def visible_gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them; [] without any."""
    if VISIBLE in os.environ:
        return [each for each in os.environ[VISIBLE].split(",") if each]
    if shutil.which("nvidia-smi") is None:
        return []
    asked = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
    done = subprocess.run(asked, capture_output=True, text=True, timeout=60, check=False)
    return done.stdout.split() if done.returncode == 0 else []
