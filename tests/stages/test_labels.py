"""The sources that a stage classifies have the same classes."""

from types import SimpleNamespace

import pytest

from llm3.errors import UserError
from llm3.stages.stage import _read_labels


def test_sources_with_different_labels_are_refused_with_the_labels_that_only_one_has():
    labels = {"a": ["neg", "pos"], "b": ["neg", "pos"], "c": ["Pos", "neg"]}
    library = SimpleNamespace(labels=labels.__getitem__)

    def read(*sources):
        config = SimpleNamespace(data=dict.fromkeys(sources, 1.0))
        stage = SimpleNamespace(objective=SimpleNamespace(HEAD="labels"), config=config, where="config.stages.x")
        return _read_labels(stage, library)

    assert read("a", "b") == ["neg", "pos"]
    with pytest.raises(UserError, match=r"x\.data: the sources a and c have different labels: 'Pos' of c, 'pos' of a"):
        read("a", "b", "c")
