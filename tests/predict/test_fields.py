"""Which columns a stage reads: those of its own sources first, and what flags say instead."""

import pytest

from llm3.config.data_schema import SourceConfig
from llm3.errors import UserError
from llm3.predict.fields import choose_fields
from llm3.predict.run import choose_kind
from llm3.predict.trained import open_trained
from tests.helpers import tiny_predict as tiny
from tests.helpers.tiny_export import STAGE

ASKED = SourceConfig("x", prompt="Q: {question}", answer="reply")
TALK = SourceConfig("x", messages="turns")
TEXT = SourceConfig("x", text="body", pair="other", transforms=["no_such_module:function"])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    run = tiny.write(tmp_path_factory.mktemp("fields"), "answers", sources={"asked": ASKED, "talk": TALK, "body": TEXT})
    found = open_trained(run, STAGE)
    found.meta["config"]["stage"]["data"] = {"talk": 0.5, "asked": 0.5}  # `body` is that of an evaluation
    return found


def chosen(trained, what, name=None, transforms=False, **given):
    _, plugin = choose_kind(trained, what)
    answered = getattr(plugin, "ANSWERED", False)
    fields = choose_fields(trained, what, plugin.FORMATS, given, name, transforms=transforms, answered=answered)
    return fields.name, fields.row_format, fields.columns


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"what": "answers"}, ("talk", "dialogue", ["turns"])),
        ({"what": "answers", "name": "asked"}, ("asked", "dialogue", ["question"])),
        ({"what": "answers", "prompt": "{a}/{b}"}, ("talk", "dialogue", ["a", "b"])),
        ({"what": "answers", "name": "asked", "messages": "m"}, ("asked", "dialogue", ["m"])),
        ({"what": "answers", "text": "t"}, ("", "text", ["t"])),
        ({"what": "scores"}, ("talk", "dialogue", ["turns"])),
        ({"what": "scores", "name": "asked"}, ("asked", "dialogue", ["question", "reply"])),
        ({"what": "scores", "text": "t"}, ("", "text", ["t"])),
        ({"what": "scores", "name": "body", "text": "t"}, ("body", "text", ["t", "other"])),
        ({"what": "embeddings", "name": "body"}, ("body", "text", ["body", "other"])),
    ],
)
def test_the_columns_are_those_of_a_source_of_the_stage_or_of_flags(trained, arguments, expected):
    assert chosen(trained, **arguments) == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"what": "scores", "pair": "b"}, "expected --text=COLUMN"),
        (
            {"what": "scores", "text": "a", "prompt": "b"},
            "--text, --prompt: expected --text and --pair, or --prompt",
        ),
        ({"what": "scores", "prompt": "p"}, "nothing names the answers"),
        ({"what": "answers", "text": "{a"}, "expected a column, or a template"),
        ({"what": "answers", "name": "tall"}, "--source=tall: did you mean 'talk'"),
        (
            {"what": "embeddings", "name": "body", "transforms": True},
            "--config=FILE, beside which it is",
        ),
    ],
)
def test_fields_that_do_not_go_together_are_refused(trained, arguments, message):
    with pytest.raises(UserError) as error:
        chosen(trained, **arguments)
    assert message in str(error.value)
