"""A few steps of the configs of encoders, answers, spans and denoisers: whole runs of every objective."""

import itertools

import pytest

from tests.helpers import tiny_run

pytestmark = pytest.mark.slow

DATA = tiny_run.ROOT.parent / "shared" / "data"
SMALL = {
    "tokenizer.vocab_size": 300,
    "model.layers": 2,
    "model.scan_unroll": 1,
    "model.d_model": 16,
    "model.d_ff": 16,
}


def rows_of(tmp_path, config, stages, **changes):
    """{stage: its row} of a run of two steps a stage, and the metrics of its last stage."""
    steps = {f"stages.{name}.{field}": 2 for name in stages for field in ("steps", "save_every", "log_every")}
    steps |= {f"stages.{name}.optimizer.warmup_steps": 1 for name in stages}
    overrides = [f"--config.{field}={value}" for field, value in (SMALL | steps | changes).items()]
    run = ["run", f"--config={tiny_run.ROOT / 'configs' / config}", f"--workdir={tmp_path / 'run'}"]
    tiny_run.process(tmp_path, [*run, f"--stages={','.join(stages)}", *overrides])
    return tiny_run.rows(tmp_path / "run"), tiny_run.metrics(tmp_path / "run" / stages[-1])


@pytest.fixture
def data():
    if not DATA.exists():
        pytest.skip("the folder of shared real text is absent")
    return {"data_dir": DATA}


def test_an_encoder_reads_chinese_and_points_at_answers(tmp_path, data):
    sizes = {f"sources.{name}.max_documents": 60 for name in ("contexts", "questions")}
    sizes |= {"evaluations.contexts.max_documents": 4, "evaluations.reading.max_documents": 24}
    rows, _ = rows_of(tmp_path, "cmrc.py", ("pretrain", "finetune"), **data, **sizes)
    assert rows["pretrain"]["contexts_items"] > 0 and rows["pretrain"].get("reading_f1") is None
    assert rows["finetune"]["parent"] == "pretrain" and rows["finetune"]["reading_items"] == 24
    assert 0 <= rows["finetune"]["reading_exact_match"] <= rows["finetune"]["reading_f1"] <= 1


def test_answers_are_written_and_chosen_after_every_stage(tmp_path, data):
    sizes = {f"sources.{name}.max_documents": 60 for name in ("general", "medquad", "questions", "pubmedqa")}
    sizes |= {f"evaluations.{name}.max_documents": 4 for name in ("general", "domain", "answers", "reading")}
    sizes |= {"evaluations.answers.options.max_tokens": 8, "evaluations.answers.batch_size": 4}
    sizes |= {"evaluations.reading.batch_size": 4, "evaluations.reading.sequence_length": 1024}
    names = ("pretrain", "posttrain", "finetune")
    rows, metrics = rows_of(tmp_path, "reading.py", names, **data, **sizes)
    for name in ("init", *names):
        for figure in ("answers_f1", "answers_rouge_l", "answers_exact_match", "reading_accuracy"):
            assert 0 <= rows[name][figure] <= 1, (name, figure)
        assert rows[name]["reading_majority_accuracy"] >= 0.25
        assert rows[name]["answers_items"] == rows[name]["reading_items"] == 4
    first, last = (tiny_run.metrics(tmp_path / "run" / name) for name in ("pretrain", "posttrain"))
    assert first[-1]["epochs_general"] > 0 and set(metrics[-1]) >= {"epochs_pubmedqa"}
    assert rows["posttrain"]["epochs"].keys() == {"general", "medquad", "questions"}  # general: replayed
    assert last[-1].keys() >= {"epochs_general", "epochs_medquad", "epochs_questions"}
    report = (tmp_path / "run" / "report.md").read_text(encoding="utf-8")
    assert "## Epochs of each source" in report and "- overlap: " in report


def test_an_encoder_and_a_decoder_of_one_config_have_the_same_parameters_and_tokens(tmp_path, data):
    sizes = {f"sources.{name}.max_documents": 60 for name in ("general", "medquad")}
    sizes |= {f"evaluations.{name}.max_documents": 4 for name in ("general", "domain")}
    found = {}
    for family in ("encoder", "decoder"):
        names = ("pretrain", "posttrain", "finetune_0")
        found[family], _ = rows_of(tmp_path / family, f"encoder.py:{family}", names, **data, **sizes)
    for name, figure in itertools.product(("pretrain", "posttrain", "finetune_0"), ("params", "trainable_params")):
        assert found["encoder"][name][figure] == found["decoder"][name][figure]
    for name in ("pretrain", "posttrain"):
        tokens = [found[family][name]["tokens"] for family in found]
        assert tokens[0] == tokens[1] == 2 * 32 * 128
    assert found["encoder"]["finetune_0"]["task_items"] == 815


def test_a_mixture_of_denoisers_is_pretrained(tmp_path):
    tiny_run.write_texts(tmp_path / "texts")
    extra = "with c.ignore_type():\n    c.stages.pretrain.objective = dict(name='prefix', denoisers='ul2')"
    config = tiny_run.write_config(tmp_path / "config.py", tmp_path, extra)
    tiny_run.process(tmp_path, ("run", f"--config={config}", f"--workdir={tmp_path / 'run'}", "--stages=pretrain"))
    losses = [line["loss"] for line in tiny_run.metrics(tmp_path / "run" / "pretrain")]
    assert losses[-1] < losses[0]
