"""Wall time by part, and what is known of the code that a run was made with."""

import itertools
import subprocess

import llm3
from llm3.stages import environment
from llm3.stages.cost import chain_cost
from llm3.stages.stopwatch import Stopwatch


def test_the_time_of_an_inner_part_is_not_counted_in_the_outer_one():
    clock = itertools.count()  # one second at each look
    watch = Stopwatch(lambda: next(clock))
    with watch.part("train"), watch.part("save"), watch.part("evaluate"):
        pass
    assert watch.seconds == {"train": 2, "evaluate": 1, "save": 2}


def test_an_open_part_counts_until_now_and_earlier_time_is_added():
    clock = itertools.count()
    watch = Stopwatch(lambda: next(clock))
    watch.add({"compile": 10.0, "train": 1.0})
    with watch.part("train"):
        assert watch.seconds == {"compile": 10, "train": 2}
        assert watch.seconds == {"compile": 10, "train": 3}


def test_time_goes_on_after_an_error():
    clock = itertools.count()
    watch = Stopwatch(lambda: next(clock))
    try:
        with watch.part("train"):
            raise KeyError
    except KeyError:
        assert watch.seconds == {"train": 1}


def git(folder, *arguments):
    identity = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    subprocess.run(["git", "-C", str(folder), *identity, *arguments], check=True, capture_output=True)


def test_the_commit_is_that_of_llm3_and_says_if_files_were_changed(tmp_path, monkeypatch):
    package = tmp_path / "llm3"
    package.mkdir()
    (package / "__init__.py").write_text("")
    monkeypatch.setattr(llm3, "__file__", str(package / "__init__.py"))
    git(tmp_path, "init")
    assert environment.commit() is None, "a repository around it that does not have llm3"
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "one")
    clean = environment.commit()
    assert len(clean) == 40
    (package / "__init__.py").write_text("changed")
    assert environment.commit() == f"{clean} (dirty: with uncommitted changes)"


def test_the_cost_of_a_chain_is_summed_from_the_first_ancestor():
    cost = {"tokens": 10, "flops": 2.0, "seconds": 0.5, "peak_bytes": 7}
    lineage = [{"model": "some/model"}, {"stage": "posttrain", "cost": cost}]
    assert chain_cost(lineage, cost) == {
        "stages": ["some/model", "posttrain"],
        "unknown": ["some/model"],
        "tokens": 20,
        "flops": 4.0,
        "seconds": 1.0,
    }
