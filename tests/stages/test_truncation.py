"""A source of which much does not fit into the windows is a warning that names the field to raise."""

from types import SimpleNamespace

import numpy as np
import pytest

from llm3.stages.truncation import truncation_warning

FIELD = "config.stages.finetune.sequence_length"


def warning(sizes, length, dropped=0):
    """Of documents of these sizes in windows of `length` tokens."""
    sizes = np.array(sizes, int)
    table = SimpleNamespace(truncated=int(np.sum(sizes > length)), dropped=dropped)
    cache = SimpleNamespace(documents=len(sizes), offsets=np.concatenate([[0], np.cumsum(sizes)]))
    return truncation_warning(table, cache, "task", length, FIELD)


def test_a_large_share_of_cut_documents_is_a_warning_with_the_field_to_raise():
    sizes = [*range(100, 1100, 100), *[8] * 2]
    assert warning(sizes, 256) == (
        "warning: 67 % of the documents of task are cut: a window holds 256 tokens; raise "
        f"{FIELD} (900 would hold 90 % of the documents, the longest has 1,000 tokens)"
    )


@pytest.mark.parametrize(("sizes", "length", "dropped"), [([10] * 9, 10, 0), ([11, 11, 10, 9, 9], 10, 0), ([], 10, 0)])
def test_documents_that_fit_and_a_few_long_ones_are_no_warning(sizes, length, dropped):
    assert warning(sizes, length, dropped) == ""


def test_a_tenth_without_any_target_is_a_warning():
    assert warning([20] * 2 + [5] * 18, 10, dropped=2).startswith(
        "warning: 10 % of the documents of task have no target that fits, and are dropped: a window holds 10 tokens"
    )
    assert warning([20] * 2 + [5] * 19, 10, dropped=2) == ""
