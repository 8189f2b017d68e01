"""A parent that does not fit, or is damaged, is rejected by name before anything is written."""

import collections
import contextlib
import io
import json
import re
import shutil
import types
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from llm3.__main__ import main
from llm3.checkpoints.stage_checkpoints import Checkpoints
from llm3.config import load as configfile
from llm3.config.data_schema import SourceConfig
from llm3.data.chat_templates import template_hash
from llm3.data.tokenizer import Tokenizer
from llm3.errors import UserError
from llm3.stages import start as parents
from llm3.stages.workdir import check_record
from tests.helpers import tiny_run as tiny
from tests.helpers.tiny_damage import edited, flip, in_file, only_half_written, rewritten, truncate

EXTRA = """
c.evaluations = dict(general=dict(kind="perplexity", source="general", max_documents=4, **small))
c.stages.pretrain.best = "general_bits_per_byte"
c.sources.other = dict(path="json", label="label", data_files=files("other"))
c.sources.three = dict(path="json", label="label", data_files=files("three"))
"""


@pytest.fixture(scope="module")
def parent(tmp_path_factory):
    """A run whose pretrain and posttrain stages are finished and whose finetune stage died at step 8."""
    base = tmp_path_factory.mktemp("handoff")
    tiny.write_texts(base / "texts")
    for file in sorted((base / "texts").glob("task-*.jsonl")):
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        labels = {"other": [f"other {row['label']}" for row in rows]}
        labels["three"] = [row["label"] if i % 3 else "third" for i, row in enumerate(rows)]
        for name, each in labels.items():
            lines = (json.dumps(row | {"label": label}) + "\n" for row, label in zip(rows, each, strict=True))
            file.with_name(file.name.replace("task", name)).write_text("".join(lines))
    config, run = tiny.write_config(base / "config.py", base, EXTRA.strip()), base / "run"
    point = "SIGKILL@saved:finetune:8"
    tiny.process(("run", f"--config={config}", f"--workdir={run}"), point=point, status=-9)
    return types.SimpleNamespace(config=str(config), run=run, base=base)


def start(stage: str, **fields) -> str:
    """An override of finetune's parent, RUN standing for the run's directory."""
    return f"stages.finetune.start={ {'run': 'RUN', 'stage': stage, 'fresh': ['head/.*'], **fields} }"


class Wrong(NamedTuple):
    """A fault in the config or the parent, and the error message that it must give."""

    messages: tuple[str, ...]  # regular expressions
    overrides: tuple[str, ...] = (start("posttrain"),)  # RUN: the parent's run; OTHER: another tokenizer.json
    damage: Callable[[Path], None] = lambda checkpoints: None  # applied to the checkpoint directory of posttrain


AS_POSTTRAIN = (
    "stages.finetune.kind=posttrain",
    "stages.finetune.objective=causal",
    "stages.finetune.data={'general': 1.0}",
)
NORM, LEAF = "final_norm/scale", r"(layers|embed|final_norm)[./]\w+"
DATA, INSTEAD = "params/ocdbt.process_0/d/*", r"restore it from a copy, or start from another step \(available: 8\)"
ADD = "tokenizer.add=['paracetamol']"
WRONG = {
    "unknown stage": Wrong(("'postrain'", "did you mean 'posttrain'"), (start("postrain"),)),
    "no such run": Wrong(("RUNS does not exist", "did you mean 'RUN'"), (start("posttrain", run="RUNS"),)),
    "no such step": Wrong(("step=7", "holds the steps 8, 10"), (start("posttrain", step=7),)),
    "misspelt step": Wrong(("step='bets'", "step number, or one of latest, best"), (start("posttrain", step="bets"),)),
    "best without scores": Wrong(
        ("step='best'", r"set stages\.posttrain\.best", r"available: 8, 10"), (start("posttrain", step="best"),)
    ),
    "unfinished parent": Wrong(("finetune", "step 8 of 10", "finish it"), (start("finetune", fresh=[]),)),
    "best of an unfinished parent": Wrong(("step 8 of 10", "finish it"), (start("finetune", step="best", fresh=[]),)),
    "another tokenizer": Wrong(("RUN/tokenizer.json",), (start("posttrain"), "tokenizer.vocab_size=290")),
    "another width": Wrong(
        (
            r"embed/embedding: \(300, 32\) in this model, \(300, 16\) in the parent; .*start\.fresh",
            "layers/mlp/up/kernel",
        ),
        (start("posttrain"), "model.d_model=32"),
    ),
    "other layers": Wrong(
        (r"layers/mlp_norm/scale: \(3, 16\) in this model, \(2, 16\) in the parent",),
        (start("posttrain"), "model.layers=3"),
    ),
    "another leaf": Wrong(
        (r"2 leaves not in the parent: layers/attention/key_norm/scale \(2, 8\)", r"fresh=\['head/\.\*', '.*norm/"),
        (start("posttrain"), "model.qk_norm=head"),
    ),
    "head not declared fresh": Wrong(
        (r"not in the parent: head/bias \(2,\), head/kernel \(16, 2\)", r"add to start: fresh=\['head/\.\*'\]$"),
        (start("posttrain", fresh=[]),),
    ),
    "head left over": Wrong(
        (r"start\.fresh: 'head/\.\*' matches no leaf",), (start("finetune", step=8), *AS_POSTTRAIN)
    ),
    "head not declared dropped": Wrong(
        (r"not in this model: head/bias \(2,\), head/kernel \(16, 2\)", r"add to start: drop=\['head/\.\*'\]$"),
        (start("finetune", step=8, fresh=[]), *AS_POSTTRAIN),
    ),
    "fresh matches nothing": Wrong(
        (r"start\.fresh: 'haed/\.\*' matches no leaf", "did you mean"), (start("posttrain", fresh=["haed/.*"]),)
    ),
    "drop matches nothing": Wrong(
        (r"start\.drop: 'lm_head/\.\*' matches no leaf",), (start("posttrain", drop=["lm_head/.*"]),)
    ),
    "other classes": Wrong(
        (r"\['domain', 'general'\]", r"\['other domain', 'other general'\]", "start.fresh"),
        (start("finetune", step=8, fresh=[]), "stages.finetune.data={'other': 1.0}"),
    ),
    "more classes": Wrong(
        (r"head/bias: \(3,\) in this model, \(2,\) in the parent; .*start\.fresh",),
        (start("finetune", step=8, fresh=[]), "stages.finetune.data={'three': 1.0}"),
    ),
    "a leaf is missing": Wrong(
        (rf"1 leaf not in the parent: {NORM} \(16,\)", r"fresh=\['head/\.\*', 'final_norm/\.\*'\]"),
        damage=rewritten(lambda leaves: {path: leaf for path, leaf in leaves.items() if path != NORM}),
    ),
    "a leaf is left over": Wrong(
        (r"1 leaf not in this model: lm_head/kernel \(16, 300\)", r"add to start: drop=\['lm_head/\.\*'\]$"),
        damage=rewritten(lambda leaves: leaves | {"lm_head/kernel": np.ones((16, 300), np.float32)}),
    ),
    "a leaf of integers": Wrong(
        (f"{NORM} is int32, expected float; start from another step",),
        damage=rewritten(lambda leaves: leaves | {NORM: np.ones(16, np.int32)}),
    ),
    "only half written": Wrong(("holds no complete checkpoint: train posttrain first",), damage=only_half_written),
    "edited metadata": Wrong(
        ("10/meta does not match its digest", INSTEAD),
        damage=edited(lambda meta: meta.update(tokenizer_hash="0"), valid_digest=False),
    ),
    "truncated metadata": Wrong(("10/meta cannot be read", INSTEAD), damage=in_file("meta/data.json", truncate)),
    "deleted metadata": Wrong(("10/meta cannot be read", INSTEAD), damage=in_file("meta/data.json", Path.unlink)),
    # found only by reading all parameters, or by the tokenizer
    "a leaf that is not finite": Wrong(
        (f"10: {NORM} not finite", "start from another step"),
        damage=rewritten(lambda leaves: leaves | {NORM: np.full(16, np.nan, np.float32)}),
    ),
    "the digest of another dtype": Wrong(
        (f"{NORM} is float32 .* bfloat16 .* was saved", INSTEAD),
        damage=edited(lambda meta: meta["shapes"]["params"][NORM].__setitem__(1, "bfloat16"), valid_digest=True),
    ),
    "a flipped byte": Wrong((f"10/params.*{LEAF}", INSTEAD), damage=in_file(DATA, flip)),
    "truncated data": Wrong((f"10/params cannot be read.*{LEAF}", INSTEAD), damage=in_file(DATA, truncate)),
    "deleted data": Wrong((f"10/params cannot be read.*{LEAF}", INSTEAD), damage=in_file(DATA, Path.unlink)),
    "a deleted index": Wrong((f"10/params cannot be read.*{LEAF}",), damage=in_file("params/d/*", Path.unlink)),
    "a deleted manifest": Wrong(
        ("10/params cannot be read: manifest.ocdbt in it is missing", INSTEAD),
        damage=in_file("params/manif*", Path.unlink),
    ),
    "deleted names of leaves": Wrong(
        ("10/params cannot be read.*_METADATA", INSTEAD), damage=in_file("params/_METADATA", Path.unlink)
    ),
    "new tokens without the old": Wrong(("tokenizer.add", "tokenizer.path"), (start("posttrain"), ADD)),
    "new tokens behind other ones": Wrong(
        ("which extends", "set tokenizer.path='RUN/tokenizer.json'"),
        (start("posttrain"), "tokenizer.path=OTHER", ADD),
    ),
    "a new token that is an old one": Wrong(
        (r"tokenizer\.add\[1\]='e': already a token",),
        (start("posttrain"), "tokenizer.path=RUN/tokenizer.json", "tokenizer.add=['paracetamol', 'e']"),
    ),
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_a_wrong_parent_is_rejected_by_name_and_leaves_no_trace(capsys, monkeypatch, tmp_path, parent, wrong):
    run, child, other = tmp_path / "run", tmp_path / "child", tmp_path / "other.json"
    shutil.copytree(parent.run, run)
    wrong.damage(run / "posttrain" / "checkpoints")
    Tokenizer.load(run / "tokenizer.json").extended(["ibuprofen"]).save(other)
    before = tiny.files(tmp_path)
    monkeypatch.setattr("llm3.cli.run.evaluate_first_rows", lambda *_: pytest.fail("the run began"))
    overrides = (each.replace("RUN", str(run)).replace("OTHER", str(other)) for each in wrong.overrides)
    command = ["run", f"--config={parent.config}", f"--workdir={child}", "--stages=finetune"]
    assert main([*command, *(f"--config.{each}" for each in overrides)]) == 2
    error = capsys.readouterr().err.replace(str(run), "RUN")
    for part in wrong.messages:
        assert re.search(part, error), error
    assert "config.stages.finetune.start" in error or "tokenizer.add" in error
    assert tiny.files(tmp_path) == before


def test_a_parent_in_the_same_run_that_is_not_trained_is_rejected(capsys, tmp_path, parent):
    command = ["run", f"--config={parent.config}", f"--workdir={tmp_path}", "--stages=posttrain"]
    assert main(command) == 2
    assert "holds no checkpoints of a stage 'pretrain': train it first" in capsys.readouterr().err
    assert tiny.files(tmp_path) == {}


def test_classes_are_compared_also_with_a_parent_that_is_yet_to_be_trained(capsys, tmp_path, parent):
    """A second fine-tuning stage in the same run would load the head of the first one."""
    options = ["--config.stages.scratch.start=finetune", "--config.stages.scratch.data={'other': 1.0}"]
    assert main(["run", f"--config={parent.config}", f"--workdir={tmp_path}", *options]) == 2
    error = capsys.readouterr().err
    assert "config.stages.scratch.start" in error and "['other domain', 'other general']" in error
    assert tiny.files(tmp_path) == {}


def test_the_best_step_of_a_parent_that_is_yet_to_be_trained_needs_a_metric(capsys, tmp_path, parent):
    best = {"stage": "posttrain", "step": "best", "fresh": ["head/.*"]}
    assert (
        main(["run", f"--config={parent.config}", f"--workdir={tmp_path}", f"--config.stages.finetune.start={best}"])
        == 2
    )
    assert "config.stages.finetune.start.step='best': set stages.posttrain.best" in capsys.readouterr().err
    assert tiny.files(tmp_path) == {}


def test_eval_refuses_another_model_than_the_checkpoint_holds(capsys, parent):
    command = ["eval", f"--config={parent.config}", f"--workdir={parent.run}", "--stages=pretrain"]
    assert main([*command, "--config.model.d_ff=64"]) == 2
    assert "model.d_ff: saved 32, now 64" in capsys.readouterr().err


def test_generate_refuses_a_stage_that_is_not_there_and_options_out_of_range(capsys, parent):
    command = ["generate", f"--config={parent.config}", f"--workdir={parent.run}", "--prompt=a"]
    for option, part in {
        "--stage=postrain": "did you mean 'posttrain'",
        "--top_p=0": "--top_p=0.0",
        "--temperature=-1": "--temperature=-1.0: expected at least 0",
        "--top_k=-1": "--top_k=-1",
        "--max_tokens=0": "--max_tokens=0: expected at least 1",
    }.items():
        assert main([*command, option]) == 2
        assert part in capsys.readouterr().err


def test_a_stage_with_checkpoints_of_its_own_does_not_look_for_its_parent(tmp_path, parent):
    config = configfile.load(parent.config, ["stages.posttrain.start={'run': '/gone', 'stage': 'pretrain'}"])
    with pytest.raises(UserError, match="/gone does not exist"):
        parents.locate_parent(config, tmp_path, "posttrain", [])
    (tmp_path / "posttrain" / "checkpoints" / "4").mkdir(parents=True)
    assert parents.locate_parent(config, tmp_path, "posttrain", []) == (None, None)


def meta_of(stage: Path) -> dict:
    checkpoints = Checkpoints(stage / "checkpoints", read_only=True)
    return checkpoints.meta(checkpoints.latest())


def quickly(stage: str) -> tuple[str, ...]:
    return (f"stages.{stage}.steps=2", "evaluations={}", "mesh={'data': 2, 'fsdp': 2, 'tensor': 2}")


def run_quickly(parent, workdir: Path, stage: str, *overrides: str) -> str:
    """What a run of one stage, of two steps, on eight devices, says. The parent was trained on one."""
    short = quickly(stage)
    command = ["run", f"--config={parent.config}", f"--workdir={workdir}", f"--stages={stage}"]
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as out:
        patch.setattr("llm3.cli.run.write_report", lambda *_: None)
        patch.setattr("llm3.cli.run.evaluate_first_rows", lambda _: None)
        assert main([*command, *(f"--config.{each}" for each in (*overrides, *short))]) == 0
    return out.getvalue()


@pytest.mark.slow
def test_a_head_for_other_classes_replaces_the_parents(tmp_path, parent):
    begin = start("finetune", step=8).replace("RUN", str(parent.run))
    out = run_quickly(parent, tmp_path, "finetune", begin, "stages.finetune.data={'three': 1.0}")
    assert "step 8, 11 leaves loaded; fresh: head/bias, head/kernel; dropped: head/bias, head/kernel" in out
    meta = meta_of(tmp_path / "finetune")
    assert meta["fresh"] == meta["dropped"] == ["head/bias", "head/kernel"]
    assert meta["labels"] == ["domain", "general", "third"]
    assert [link["stage"] for link in meta["lineage"]] == ["pretrain", "posttrain", "finetune"]


def best_of(run) -> str:
    """An override of posttrain's parent."""
    return f"stages.posttrain.start={ {'run': str(run), 'stage': 'pretrain', 'step': 'best'} }"


@pytest.fixture(scope="module")
def child(parent):
    """A run that goes on from the best step of the parent's pretrain stage, with words of the domain as new tokens."""
    run, workdir = parent.base / "copy", parent.base / "child"
    shutil.copytree(parent.run, run)
    text = (parent.base / "texts" / "domain-train.jsonl").read_text()
    words = [word for word, _ in collections.Counter(re.findall(r"\b[a-z]{8,}\b", text)).most_common(2)]
    template = "{% for m in messages %}{{ m.role + ': ' + m.content }}{% endfor %}"
    options = [f"tokenizer.path={run}/tokenizer.json", f"tokenizer.add={words}", f"tokenizer.chat_template={template}"]
    out = run_quickly(parent, workdir, "posttrain", best_of(run), *options)
    checkpoints = Checkpoints(run / "pretrain" / "checkpoints", read_only=True)
    figures = {checkpoints.meta(step)["scored"]["value"]: step for step in checkpoints.steps()}
    shutil.rmtree(run)
    return types.SimpleNamespace(
        run=run,
        workdir=workdir,
        words=words,
        out=out,
        best=figures[min(figures)],
        options=options,
        template=template,
    )


def test_new_tokens_and_the_best_step_are_handed_on(parent, child):
    assert f"starts from {child.run}/pretrain step {child.best}, 11 leaves loaded; extended by the mean" in child.out
    meta, old = meta_of(child.workdir / "posttrain"), Tokenizer.load(parent.run / "tokenizer.json")
    assert meta["extended"] == ["embed/embedding"] and meta["model"]["vocab_size"] == old.vocab_size + 2
    saved = Tokenizer.load(child.workdir / "tokenizer.json")
    assert meta["tokenizer_hash"] == saved.hash == old.extended(child.words).hash


def test_a_run_keeps_its_chat_template_which_a_stage_on_text_alone_does_not_use(child):
    assert (child.workdir / "chat_template.jinja").read_text() == child.template
    assert meta_of(child.workdir / "posttrain")["chat_template"] == ""
    talk, text = SourceConfig("x", messages="messages"), SourceConfig("x")
    library = types.SimpleNamespace(template=child.template)
    sources = types.SimpleNamespace(sources={"talk": talk, "text": text})
    experiment, own = types.SimpleNamespace(library=library, config=sources), template_hash(child.template)

    def used(source, theirs):
        stage = types.SimpleNamespace(data=types.SimpleNamespace(caches={source: None}))
        return parents.conversed(experiment, stage, types.SimpleNamespace(meta={"chat_template": theirs}))

    assert used("talk", "") == used("talk", "another") == used("text", own) == own
    assert used("text", "") == used("text", "another") == ""


def test_lineage_shows_what_was_extended_and_finds_a_moved_parent_by_its_digest(capsys, child, parent, tmp_path):
    """The run that the child started from is gone; the one it was copied from is beside the child."""
    assert main(["lineage", f"--workdir={child.workdir}"]) == 0
    first, second = [line for line in capsys.readouterr().out.splitlines() if " step " in line]
    assert f"{parent.run}/pretrain step {child.best} (pretrain" in first and "extended" not in first
    assert first.endswith(f"; it was at {child.run}")
    moved = shutil.copytree(child.workdir, tmp_path / "moved" / "child")
    assert main(["lineage", f"--workdir={moved}"]) == 0
    first = capsys.readouterr().out.splitlines()[2]
    assert first.startswith(f"  [gone] {child.run}/pretrain step") and "no longer there: --runs=DIR" in first
    assert main(["lineage", f"--workdir={moved}", f"--runs={parent.base}"]) == 0
    first, second = [line for line in capsys.readouterr().out.splitlines() if " step " in line]
    assert f"{parent.run}/pretrain step" in first and f"{moved}/posttrain step 2" in second
    assert main(["lineage", f"--workdir={moved}", "--runs=/gone"]) == 2
    assert "--runs=/gone: no such folder" in capsys.readouterr().err
    main(["lineage", f"--workdir={child.workdir}"])
    second = capsys.readouterr().out.splitlines()[3]
    assert f"{child.workdir}/posttrain step 2" in second
    assert "extended by the mean of the old tokens: embed/embedding" in second


def test_the_parent_of_a_stage_may_be_moved_but_not_replaced(child, parent):
    for run, fits in ((child.run, True), (parent.run, True), (child.workdir, False)):
        config = configfile.load(parent.config, [best_of(run), *child.options, *quickly("posttrain")])
        with contextlib.nullcontext() if fits else pytest.raises(UserError, match=r"stage\.start\.run: saved"):
            check_record(child.workdir, config, "posttrain")
