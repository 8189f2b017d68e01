"""Stage runs that train at the same time share no core and no GPU."""

import os

import pytest

from llm3.ablation.slots import VISIBLE, slots
from llm3.errors import UserError


@pytest.fixture
def machine(monkeypatch):
    def of(cores, gpus=""):
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)))
        monkeypatch.setenv(VISIBLE, gpus)

    return of


@pytest.mark.parametrize(("cores", "jobs"), [(1, 1), (2, 2), (7, 3), (16, 4)])
def test_every_core_belongs_to_one_stage_run(machine, cores, jobs):
    machine(cores)
    shares = [each.cores for each in slots(jobs)]
    assert sorted(core for share in shares for core in share) == list(range(cores))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_more_stage_runs_than_cores_share_them_all(machine):
    machine(2)
    assert [set(each.cores) for each in slots(3)] == [{0}, {1}, {0, 1}]


def test_every_gpu_belongs_to_one_stage_run(machine):
    machine(8, "4,5,6,7")
    assert [each.variables for each in slots(2)] == [{VISIBLE: "4,6"}, {VISIBLE: "5,7"}]


def test_without_a_gpu_nothing_is_said_about_gpus(machine):
    machine(8)
    assert [each.variables for each in slots(2)] == [{}, {}]


def test_fewer_gpus_than_stage_runs_are_refused(machine):
    machine(8, "0")
    with pytest.raises(UserError, match=r"--jobs=2: there are 1 GPU, and each stage run needs its own"):
        slots(2)
