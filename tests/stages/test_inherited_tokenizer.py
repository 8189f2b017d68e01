"""A run takes over the tokenizer and the chat template of the run that a stage of it starts from."""

import json
from contextlib import nullcontext

import pytest

from llm3.__main__ import main
from llm3.config.load import load
from llm3.data import tokenizer as tokenizers
from llm3.data.library import Library
from llm3.errors import UserError
from llm3.files import CHAT_TEMPLATE, TOKENIZER
from llm3.stages import experiment
from llm3.stages import tokenizer as stage_tokenizer
from llm3.stages.experiment import prepare, read_library
from llm3.stages.model import planned_vocabulary
from tests.helpers import tiny_run

TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</{{ m['role'] }}>\n{% endfor %}"
EXTRA = """
for name in ("pretrain", "scratch"):
    del c.stages[name]
del c.evaluations
c.tokenizer = dict()
with c.ignore_type():
    c.stages.posttrain.start = dict(run="@parent", stage="pretrain")
""".strip()


@pytest.fixture(scope="module")
def trained():
    """An extended tokenizer, and another one."""
    texts = tiny_run.documents()
    return tokenizers.train(texts[:9], 280).extended(["acetaminophen"]), tokenizers.train(texts[9:20], 270)


@pytest.fixture
def base(tmp_path, trained):
    """A config over two runs, of which only the tokenizers are there."""
    tiny_run.write_texts(tmp_path / "texts")
    for name, each in zip(("parent", "other"), trained, strict=True):
        each.save(tmp_path / name / TOKENIZER)
    (tmp_path / "parent" / CHAT_TEMPLATE).write_text(TEMPLATE)
    return tmp_path


def config(base, *overrides, extra=""):
    lines = f"{EXTRA}\n{extra}".strip().replace("@", f"{base}/")
    return load(str(tiny_run.write_config(base / "config.py", base, lines)), overrides)


def test_the_tokenizer_with_its_added_tokens_and_the_template_are_those_of_the_parent(base, trained):
    found = read_library(config(base), base / "run")
    assert found.tokenizer.hash == trained[0].hash and "acetaminophen" in found.tokenizer.tokens
    assert found.template == TEMPLATE
    assert planned_vocabulary(config(base), base / "run") == trained[0].vocab_size
    more = config(base, "tokenizer.add=['ibuprofen']")
    assert read_library(more, base / "run").tokenizer.hash == trained[0].extended(["ibuprofen"]).hash
    assert planned_vocabulary(more, base / "run") == trained[0].vocab_size + 1


@pytest.mark.parametrize(
    ("saved", "expected", "refused"), [(0, 0, ""), (None, 0, ""), (1, 0, "/tokenizer.json"), (None, 1, "config")]
)
def test_the_tokenizer_is_that_of_the_stages_whether_it_is_kept_lost_or_replaced(
    base, trained, monkeypatch, saved, expected, refused
):
    if saved is not None:
        trained[saved].save(base / "run" / TOKENIZER)
    own = trained[expected].hash
    monkeypatch.setattr(stage_tokenizer, "newest_meta", lambda *_: {"tokenizer_hash": own})
    with pytest.raises(UserError, match=f"{own[:12]}, and .*{refused} has ") if refused else nullcontext():
        assert read_library(config(base), base / "run").tokenizer.hash == own


def test_a_later_stage_may_name_the_parent_too(base, trained):
    extra = """
    with c.ignore_type():
        c.stages.finetune.start = dict(run="@other", stage="pretrain", fresh=["head/.*"])
    """
    only = config(base, "tokenizer.path=''", extra="\n".join(line[4:] for line in extra.strip("\n").splitlines()))
    del only.stages["posttrain"]
    assert read_library(only, base / "run").tokenizer.hash == trained[1].hash


def test_what_the_config_names_comes_before_what_is_inherited(base, trained):
    given = read_library(config(base, f"tokenizer.path={base / 'other' / TOKENIZER}"), base / "run")
    assert (given.tokenizer.hash, given.template) == (trained[1].hash, "")
    other = TEMPLATE.replace("\n", "\t")
    (base / "mine.jinja").write_text(other)
    assert read_library(config(base, f"tokenizer.chat_template={base / 'mine.jinja'}"), base / "run").template == other


@pytest.mark.parametrize("template", ["", TEMPLATE.replace("\n", " ")])
def test_a_run_that_has_begun_keeps_what_it_began_with(base, trained, template):
    trained[1].save(base / "run" / TOKENIZER)
    if template:
        (base / "run" / CHAT_TEMPLATE).write_text(template)
    found = read_library(config(base), base / "run")
    assert (found.tokenizer.hash, found.template) == (trained[1].hash, template)


def test_two_parents_with_different_tokenizers_are_refused_by_name_before_tokenizing(base, trained, monkeypatch):
    monkeypatch.setattr(Library, "cache", lambda *_: pytest.fail("tokenized"))
    extra = 'with c.ignore_type():\n    c.stages.finetune.start = dict(run="@other", stage="x", fresh=["head/.*"])'
    with pytest.raises(
        UserError, match=r"finetune.start.run='.*/other' has the tokenizer .*, but .*/parent, from which"
    ) as one:
        prepare(config(base, extra=extra), base / "run", ["posttrain", "finetune"])
    assert "stage 'posttrain' starts" in str(one.value) and "parents with one tokenizer" in str(one.value)
    trained[0].extended(["paracetamol"]).save(base / "third.json")
    again = config(base, f"tokenizer.path={base / 'third.json'}")
    with pytest.raises(UserError, match=r"in a new --workdir, set tokenizer.path='.*/parent/tokenizer.json'"):
        prepare(again, base / "run", ["posttrain", "finetune"])


def test_a_parent_that_is_not_there_is_named_with_the_nearest(base):
    with pytest.raises(UserError, match=r"posttrain.start.run='.*/parents': expected a run .* did you mean 'parent'"):
        read_library(config(base, f"stages.posttrain.start.run={base / 'parents'}"), base / "run")


def test_the_verbs_for_data_need_no_tokenizer_fields(base, capsys, monkeypatch):
    """A dialogue is shown as the inherited template writes it."""
    rows = [json.dumps({"q": "Which colour has the sky?", "a": "blue"})] * 9
    (base / "texts" / "pairs.jsonl").write_text("\n".join(rows))
    extra = """
c.sources.pairs = dict(path="json", data_files=dict(train="@texts/pairs.jsonl"), prompt="q", answer="a")
c.stages.posttrain.data = dict(pairs=1.0)
c.stages.posttrain.sequence_length = 128
with c.ignore_type():
    c.stages.posttrain.objective = "instruct"
""".strip()
    config(base, extra=extra)
    line = [f"--config={base / 'config.py'}", "--stages=posttrain"]
    assert main(["data", *line]) == 0
    out = capsys.readouterr().out
    assert "<user>Which colour has the sky?</user>" in out and "blue" in out, out[-3000:]
    assert main(["overlap", *line]) == 0
    seen = []
    monkeypatch.setattr(experiment, "check_parents_tokenizers", lambda *args: seen.append(args[3].hash))
    assert main(["plan", *line]) in (0, 2)  # the parent has no checkpoint here
    assert seen == [tokenizers.Tokenizer.load(base / "parent" / TOKENIZER).hash]
