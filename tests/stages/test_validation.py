"""The best evaluation of a stage, and how long it has waited for a better one."""

import json
import math
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest

from llm3.distributed.watchdog import Watchdog
from llm3.errors import UserError
from llm3.stages.evaluate import progress
from llm3.stages.start import changed_evaluations, check_same_data
from llm3.stages.validation import Best


def counted(values, min_delta=0.0) -> Best:
    best = Best("loss")
    for step, value in enumerate(values, 1):
        best.add(step, value, min_delta)
    return best


@pytest.mark.parametrize(
    ("values", "min_delta", "step", "waited"),
    [
        ([3.0, 2.0, 1.0], 0.0, 3, 0),
        ([1.0, 2.0, 3.0], 0.0, 1, 2),
        ([1.0, 2.0, 0.5], 0.0, 3, 0),
        ([1.0, 1.0], 0.0, 2, 1),  # the later of equal ones is the best, as for checkpoints, and no improvement
        ([1.0, 0.9, 0.8, 0.7], 0.25, 4, 0),  # small steps add up: 0.7 is an improvement on 1.0
        ([1.0, 0.9, 0.8, 0.76], 0.25, 4, 3),
        ([math.inf, 5.0, math.inf], 0.0, 2, 1),
        ([math.inf, math.inf], 0.0, 0, 2),
        ([-0.5, -0.6], 0.0, 2, 0),  # higher is better, signed
    ],
)
def test_the_best_step_and_the_evaluations_since_the_last_improvement(values, min_delta, step, waited):
    best = counted(values, min_delta)
    assert (best.step, best.waited) == (step, waited)
    assert best.value == (values[step - 1] if step else None)


def test_the_count_goes_on_from_what_a_checkpoint_holds():
    values = [1.0, 0.1 + 0.2, 0.3, 0.4, 1 / 3]
    for cut in range(len(values)):
        resumed = Best(**json.loads(json.dumps(vars(counted(values[:cut])))))
        for step, value in enumerate(values[cut:], cut + 1):
            resumed.add(step, value)
        assert resumed == counted(values)


@pytest.mark.parametrize(
    ("best", "judge_now", "other_now", "scored", "refused"),
    [
        ("text_nll", "y", "x", {"scored": {"name": "text_nll"}}, True),
        ("text_nll", "y", "x", {"validation": {"metric": "text_nll"}}, True),
        ("text_nll", "x", "y", {"scored": {"name": "text_nll"}}, False),
        ("text_nll", "y", "x", {"scored": {"name": "other_nll"}}, False),  # another metric chooses from now on
        ("", "y", "y", {"scored": {"name": "text_nll"}}, False),
    ],
)
def test_the_best_step_is_not_chosen_from_values_of_different_documents(best, judge_now, other_now, scored, refused):
    meta = {"tokenizer_hash": "t", "data": {}, "config": {"evaluated": {"text": "x", "other": "x"}}, **scored}
    stage = SimpleNamespace(
        config=SimpleNamespace(best=best),
        data=SimpleNamespace(fingerprints={}),
        record={"evaluated": {"text": judge_now, "other": other_now, "new": "x"}},
    )
    changed = {name for name, now in (("text", judge_now), ("other", other_now)) if now == "y"}
    assert {*changed_evaluations(stage, meta)} == changed
    with pytest.raises(UserError, match="other documents than evaluation 'text'") if refused else nullcontext():
        check_same_data(Path("run"), stage, "t", meta)


def test_each_batch_of_an_evaluation_tells_the_watchdog_that_it_goes_on(capsys):
    watchdog = Watchdog(0)
    with progress("a: domain", lambda: watchdog.at(7, "evaluating"))(10, "windows") as advance:
        assert watchdog.place() is None
        advance(4)
        assert watchdog.place()[:2] == (7, "evaluating")
    assert capsys.readouterr().out == "", "what is short is no line of a log"
