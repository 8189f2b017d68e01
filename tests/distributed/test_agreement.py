"""What differs between processes is said by all of them, with the process that differs; all have one exit status."""

from types import SimpleNamespace

import pytest

from llm3.distributed import agreement, lock
from llm3.errors import Exit, Unreachable, UserError
from llm3.stages.agreement import compare_data
from tests.helpers.several import together


def test_equal_facts_are_no_matter_for_words(monkeypatch):
    facts = {"config": {"steps": 3, "data": {"general": 1.0}}, "code": (1, "a")}
    assert together(monkeypatch, lambda _: agreement.compare(facts), count=3) == [None] * 3
    agreement.compare({"alone": 1})


def test_all_processes_refuse_what_differs_in_one_and_name_it_with_both_values(monkeypatch):
    def run(index):
        rate = 0.5 if index == 1 else 0.01
        agreement.compare({"config": {"stages": {"pretrain": {"rate": rate, "steps": 3}}}, "code": "a"})

    errors = together(monkeypatch, run, count=3)
    assert [error.exit for error in errors] == [Exit.BAD_INPUT] * 3
    [message] = {str(error) for error in errors}
    assert "process 1 (on " in message and "process 2" not in message
    assert "config.stages.pretrain.rate: 0.5, there 0.01" in message
    assert "steps" not in message and "code" not in message


@pytest.mark.parametrize(
    ("fact", "line"),
    [
        ("documents", "data of pretrain.general: 'y', there 'x'"),
        ("evaluation", "evaluations.text: 'y', there 'x'"),
        ("tokenizer", "tokenizer: 'y', there 'x'"),
        ("template", "chat template: "),
    ],
)
def test_each_fact_of_the_data_is_compared(monkeypatch, fact, line):
    def run(index):
        own = dict.fromkeys(("documents", "evaluation", "tokenizer", "template"), "x")
        own |= {fact: "y"} if index == 1 else {}
        data = SimpleNamespace(fingerprints={"general": own["documents"]})
        experiment = SimpleNamespace(
            stages={"pretrain": SimpleNamespace(name="pretrain", data=data)},
            evaluation_entries={"text": {"data": own["evaluation"]}},
            tokenizer=SimpleNamespace(hash=own["tokenizer"]),
            library=SimpleNamespace(template=own["template"]),
        )
        compare_data(experiment)

    [message] = {str(error) for error in together(monkeypatch, run)}
    heading, *lines = message.splitlines()
    assert "process 1 (on " in heading and len(lines) == 1 and line in lines[0]


def test_what_one_process_cannot_do_none_does(monkeypatch):
    def refused_by(one, index):
        def make():
            if index == one:
                raise Unreachable("it is gone")
            return index

        return agreement.all_or_none(make, Unreachable)

    errors = together(monkeypatch, lambda index: refused_by(1, index))
    assert [(type(each), str(each)) for each in errors] == [
        (Unreachable, "process 1: it is gone"),
        (Unreachable, "it is gone"),
    ]
    assert together(monkeypatch, lambda index: refused_by(7, index)) == [0, 1]


@pytest.mark.parametrize("shared", [True, False])
def test_a_workdir_that_is_not_one_and_the_same_is_refused_by_all(tmp_path, monkeypatch, shared):
    monkeypatch.setattr(agreement, "SEEN_SECONDS", 0.0)
    monkeypatch.setattr(agreement.until_seen, "__defaults__", (0.0,))
    (tmp_path / "1").mkdir()
    with lock.lock(tmp_path / "0"):
        found = together(
            monkeypatch, lambda index: agreement.check_shared(tmp_path / ("0" if shared else str(index))), count=2
        )
    assert [each and each.exit for each in found] == [None if shared else Exit.BAD_INPUT] * 2
    assert shared or all("process 1 (on " in str(each) and "disk that all hosts share" in str(each) for each in found)


def test_a_listing_that_is_old_is_waited_for(monkeypatch):
    looks = iter([False, False, True])
    monkeypatch.setattr(agreement, "POLL_SECONDS", 0.0)
    found = together(monkeypatch, lambda index: agreement.until_seen(lambda: index == 0 or next(looks), 60.0))
    assert found == [True, True] and not agreement.until_seen(lambda: False, 60.0)


def test_an_error_of_another_kind_stays_with_its_process(monkeypatch):
    def run(index):
        return agreement.all_or_none(lambda: 1 // index, UserError)

    first, _ = together(monkeypatch, run)
    assert isinstance(first, ZeroDivisionError)
