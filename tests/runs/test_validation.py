"""Evaluations while a stage trains: what they measure, that they change no bit, and where they end a stage."""

import json
import types

import jax
import pytest

from llm3.__main__ import main
from llm3.checkpoints.stage_checkpoints import Checkpoints
from llm3.errors import UserError
from llm3.evals import perplexity
from llm3.stages import run_stage
from tests.helpers import tiny_cluster
from tests.helpers import tiny_run as tiny
from tests.helpers.tiny_damage import truncate

SHARED = """fast = dict(learning_rate=0.05, schedule="constant")
c.evaluations = dict(
    general=c.evaluations.general, few=dict(c.evaluations.general, max_documents=3),
    task=dict(c.evaluations.task, split="validation"),
)
fit = dict(
    c.stages.finetune.to_dict(), frozen="nf4", train=["lora", "head/.*"],
    adapters=dict(x=dict(rank=2, dora=True, dropout=0.1)),
    unfreeze=[[6, "top(1)"]], steps=8, save_every=2, optimizer=dict(fast, ema=0.5),
)
c.stages = dict(pretrain=dict(c.stages.pretrain.to_dict(), steps=24, optimizer=fast, save_every=4), finetune=fit)
start = lambda **more: dict(stage="pretrain", fresh=["head/.*", ".*/lora/.*"], **more)
"""
# the first stage stops early; the second one goes on from its result
VALIDATING = """c.stages.finetune.update(start=start(), eval_every=3, best="task_nll")
c.stages.pretrain.update(eval_every=3, eval_names=["general"], eval_documents=3)
c.stages.pretrain.update(best="general_bits_per_byte", patience=2, min_delta=0.02)
"""
BEST, STOPPED = 12, 18
ORIGINALS = perplexity.evaluate, run_stage.write_row
# the same training without evaluations; the second stage starts from the step that is the result above
PLAIN = f"""c.stages.finetune.update(start=start(step={BEST}))
c.stages.pretrain.update(save_every=3, keep=9)
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    directory = tmp_path_factory.mktemp("base")
    tiny.write_texts(directory / "texts")
    return directory


@pytest.fixture(scope="module")
def first(base):
    """The first stage of a run with validation, uninterrupted."""
    config, workdir = tiny.write_config(base / "config.py", base, SHARED + VALIDATING), base / "whole"
    command = ("run", f"--config={config}", f"--workdir={workdir}", "--stages=pretrain")
    output, again, _ = tiny.process(command, command).stdout.split(tiny.NEXT)
    return types.SimpleNamespace(workdir=workdir, config=config, output=output, again=again)


@pytest.fixture(scope="module")
def whole(first):
    """That run with its second stage."""
    workdir = f"--workdir={first.workdir}"
    done = tiny.process(("run", f"--config={first.config}", workdir), ("lineage", workdir))
    lineage = done.stdout.split(tiny.NEXT)[1]
    return types.SimpleNamespace(workdir=first.workdir, config=first.config, lineage=lineage)


def checkpoints(workdir, stage="pretrain") -> Checkpoints:
    return Checkpoints(workdir / stage / "checkpoints", read_only=True)


def measured(workdir, stage) -> dict[int, dict]:
    """{step: the metrics of its evaluation}"""
    lines = [line for line in tiny.metrics(workdir / stage) if "loss" not in line]
    assert len({line["step"] for line in lines}) == len(lines)
    return {line.pop("step"): line for line in lines}


def test_evaluations_between_steps_are_lines_of_their_own_and_in_the_log(first):
    found = measured(first.workdir, "pretrain")
    assert list(found) == [3, 6, 9, BEST, 15, STOPPED]
    assert {tuple(each) for each in found.values()} == {("general_bits_per_byte",)}
    value = found[BEST]["general_bits_per_byte"]
    assert f"pretrain: step {BEST}: general_bits_per_byte {value:.4g}, the best so far\n" in first.output
    lines = [line for line in first.output.splitlines() if line.startswith("pretrain  ") and "/24 " in line]
    assert "bpb" not in lines[0] and f"general bpb {value:.4g}" in next(line for line in lines if " 14/24 " in line)
    assert [line["step"] for line in tiny.metrics(first.workdir / "pretrain") if "loss" in line][-2:] == [16, STOPPED]


def test_the_sample_of_an_evaluation_is_the_one_of_max_documents(first):
    row = tiny.rows(first.workdir)["pretrain"]  # of the same parameters
    sampled = measured(first.workdir, "pretrain")[BEST]["general_bits_per_byte"]
    assert sampled == pytest.approx(row["few_bits_per_byte"], rel=1e-6) != row["general_bits_per_byte"]


@pytest.mark.slow
def test_the_average_of_the_weights_is_evaluated_where_a_stage_keeps_one_also_after_the_last_step(whole):
    assert list(measured(whole.workdir, "finetune")) == [3, 6, 8]
    row, last = tiny.rows(whole.workdir)["finetune"], measured(whole.workdir, "finetune")[8]
    for name in ("task_nll", "task_accuracy", "general_bits_per_byte"):
        assert last[name] == pytest.approx(row[name], rel=1e-5)


def test_a_stage_that_stops_early_leaves_the_parameters_of_its_best_step(first):
    found = {step: each["general_bits_per_byte"] for step, each in measured(first.workdir, "pretrain").items()}
    assert min(found, key=found.get) == BEST and found[BEST] < found[9] - 0.02
    row, kept = tiny.rows(first.workdir)["pretrain"], checkpoints(first.workdir)
    ended = row["early_stopping"]
    assert ended["why"] == "general_bits_per_byte has not improved in 2 evaluations"
    assert (ended["stopped_at"], ended["result_step"], row["steps"]) == (STOPPED, BEST, STOPPED)
    assert kept.steps() == [BEST, 16, STOPPED]
    meta = kept.meta(STOPPED)
    assert meta["finished"] and meta["early_stopping"] == ended and meta["params_digest"] == row["params_digest"]
    assert meta["scored"] == {"name": "general_bits_per_byte", "value": found[BEST]}
    assert f"pretrain: the result is step {BEST}: {ended['why']}" in first.output
    assert f"The result is step {BEST} of {STOPPED}: {ended['why']}." in (first.workdir / "report.md").read_text()


@pytest.mark.slow
def test_a_child_starts_from_the_result_and_its_lineage_says_which_step_that_is(whole):
    parent, link = checkpoints(whole.workdir), checkpoints(whole.workdir, "finetune").meta(8)["lineage"][0]
    assert link["params_digest"] == parent.meta(STOPPED)["params_digest"]
    assert link["early_stopping"] == parent.meta(STOPPED)["early_stopping"]
    assert whole.lineage.count(f"pretrain step {STOPPED}, the parameters of step {BEST} [stopped early") == 2


def test_a_stage_that_has_stopped_early_is_finished(first):
    assert "Nothing left to do: pretrain is finished" in first.again


@pytest.mark.slow
def test_without_patience_the_result_is_the_last_step_and_the_best_one_is_kept(whole):
    found = {step: each["task_nll"] for step, each in measured(whole.workdir, "finetune").items()}
    best, kept = min(found, key=found.get), checkpoints(whole.workdir, "finetune")
    assert "early_stopping" not in kept.meta(8)
    assert kept.steps() == sorted({best, 6, 8})
    assert {step: (kept.meta(step)["scored"] or {}).get("value") for step in kept.steps()} == {
        step: found.get(step) for step in kept.steps()
    }


@pytest.mark.slow
def test_evaluations_between_steps_change_no_bit_of_what_is_trained(base, whole):
    """Parameters after every third step of the one stage, and after adapters, NF4 and an average in the other."""
    config, workdir = tiny.write_config(base / "plain.py", base, SHARED + PLAIN), base / "plain"
    tiny.process(("run", f"--config={config}", f"--workdir={workdir}", "--config.evaluations={}"))
    steps = checkpoints(workdir)
    assert steps.meta(BEST)["params_digest"] == tiny.digests(whole.workdir)["pretrain"]
    assert tiny.digests(workdir)["finetune"] == tiny.digests(whole.workdir)["finetune"]


@pytest.mark.slow
def test_a_run_that_dies_around_evaluations_stops_at_the_same_step_with_the_same_bits(base, whole):
    workdir = base / "disturbed"
    command = ("run", f"--config={whole.config}", f"--workdir={workdir}")
    # a start traces all stages that it is to train
    first = (*command, "--stages=pretrain")
    tiny.process(first, deaths=["SIGKILL@evaluating:pretrain:9"], point="SIGKILL@row:pretrain", status=-9)
    last = workdir / "pretrain" / "checkpoints" / str(STOPPED) / "params"
    truncate(max((path for path in last.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size))
    said = tiny.process(command, point="SIGTERM@evaluating:finetune:3", status=75).stdout
    assert f"step {STOPPED} is damaged and was skipped" in said and "pretrain: resumes at step 16" in said
    assert checkpoints(workdir, "finetune").latest() == 3, "the step at which the signal came during an evaluation"
    tiny.process(command)
    assert tiny.digests(workdir) == tiny.digests(whole.workdir)
    for stage in ("pretrain", "finetune"):
        assert measured(workdir, stage) == measured(whole.workdir, stage)
        last = checkpoints(workdir, stage).latest()
        own, expected = (checkpoints(each, stage).meta(last) for each in (workdir, whole.workdir))
        for key in ("validation", "early_stopping", "scored", "params_digest", "opt_digests"):
            assert own.get(key) == expected.get(key), key
    assert tiny.rows(workdir)["pretrain"]["early_stopping"] == tiny.rows(whole.workdir)["pretrain"]["early_stopping"]


@pytest.mark.slow
def test_several_processes_stop_at_the_same_step_and_save_during_an_evaluation(base, whole):
    workdir = base / "two"
    command = ["run", f"--config={whole.config}", f"--workdir={workdir}", "--stages=pretrain"]
    for each in tiny_cluster.run(*command, points={1: "SIGTERM@evaluating:pretrain:6"}):
        assert each.status == 75, each.stderr
    assert 6 <= checkpoints(workdir).latest() < BEST
    for each in tiny_cluster.run(*command):
        assert each.status == 0, each.stderr
    row, expected = tiny.rows(workdir)["pretrain"], tiny.rows(whole.workdir)["pretrain"]
    assert row["early_stopping"] == expected["early_stopping"]
    assert row["general_bits_per_byte"] == pytest.approx(expected["general_bits_per_byte"], rel=1e-4)


# {stage: how it differs, and what is measured for its row}
TAKEN_OVER = {
    "plain": ("", []),
    "sampled": ("eval_documents=3", ["general"]),
    # its result is the step before the last
    "best": (
        "best='few_bits_per_byte', patience=5, optimizer=dict(learning_rate=10.0, warmup_steps=10)",
        ["general", "few"],
    ),
    # its steps compute with rounded parameters
    "rounded": ("train='top(1)', frozen='int8'", ["general", "few"]),
}


@pytest.mark.slow
def test_a_row_takes_over_what_was_measured_after_the_last_step(tmp_path, base, monkeypatch, caplog):
    """If it was measured on all documents, and of the result. A run that dies before its row measures all again.

    All of it is compiled once, also where the parameters lie in pieces.
    """
    stages = ", ".join(f"{name}=plain | own | dict({change})" for name, (change, _) in TAKEN_OVER.items())
    extra = f"""c.mesh = dict(fsdp=2)
c.evaluations = dict(general=c.evaluations.general, few=dict(c.evaluations.general, max_documents=3))
plain = c.stages.pretrain.to_dict()
own = dict(kind="posttrain", start="init", baseline=True, eval_every=5)
c.stages = dict(pretrain=plain, {stages})"""
    config, evaluate, write_row = tiny.write_config(tmp_path / "config.py", base, extra), *ORIGINALS
    names, measured = {4: "general", 3: "few"}, []
    counting = lambda context: measured.append(names[context.config.max_documents]) or evaluate(context)  # noqa: E731
    monkeypatch.setattr(perplexity, "evaluate", counting)

    def run(workdir, stages, dies=False):
        """{stage: what is measured for its row}"""
        found = {}

        def write(session, subject, *rest):
            if dies:
                raise UserError("dies")
            measured.clear()
            write_row(session, subject, *rest)
            found[subject.name] = list(measured)

        monkeypatch.setattr(run_stage, "write_row", write)
        command = ("run", f"--config={config}", f"--workdir={tmp_path / workdir}", f"--stages={','.join(stages)}")
        assert main(command) == (2 if dies else 0)
        return found

    with jax.log_compiles():
        assert run("alone", TAKEN_OVER) == {name: again for name, (_, again) in TAKEN_OVER.items()}
    compiled = [each for each in caplog.messages if each.startswith("Compiling") and "on_every_host" in each]
    assert len(compiled) == 1, "for the row of the untrained model"
    assert run("disturbed", ["plain"], dies=True) == {} and run("disturbed", ["plain"]) == {"plain": ["general", "few"]}
    results = [tiny.rows(tmp_path / "alone")[name].get("early_stopping") for name in TAKEN_OVER]
    assert [ended and ended["result_step"] for ended in results] == [None, None, 5, None]
    stages = [tmp_path / name / "plain" for name in ("alone", "disturbed")]
    rows = [json.loads((each / "evaluation.json").read_text()) for each in stages]
    metrics = [{key: row[key] for key in row if key.startswith(("general", "few", "params"))} for row in rows]
    assert metrics[0] == metrics[1] and list(rows[0]) == list(rows[1])
    kept = [tiny.files(each / "predictions") for each in stages]
    assert len(kept[0]) == 2 and [content for _, content in kept[0].values()] == [each for _, each in kept[1].values()]
