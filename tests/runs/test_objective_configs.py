"""A few steps of the configs of encoders, answers, spans and denoisers: whole runs of every objective."""

import itertools
import json
import pathlib

import pytest

from tests.helpers import tiny_run

pytestmark = pytest.mark.slow

SMALL = {
    "tokenizer.vocab_size": 300,
    "model.layers": 2,
    "model.scan_unroll": 1,
    "model.d_model": 16,
    "model.d_ff": 16,
}


def rows_of(tmp_path, config, stages, steps=2, **changes):
    """{stage: its row} of a run of a few steps a stage, and the metrics of its last stage; said.txt is what it said."""
    steps = {f"stages.{name}.{field}": steps for name in stages for field in ("steps", "save_every", "log_every")}
    steps |= {f"stages.{name}.optimizer.warmup_steps": 1 for name in stages}
    overrides = [f"--config.{field}={value}" for field, value in (SMALL | steps | changes).items()]
    run = ["run", f"--config={tiny_run.ROOT / 'configs' / config}", f"--workdir={tmp_path / 'run'}"]
    said = tiny_run.process([*run, f"--stages={','.join(stages)}", *overrides]).stdout
    (tmp_path / "said.txt").write_text(said, encoding="utf-8")
    return tiny_run.rows(tmp_path / "run"), tiny_run.metrics(tmp_path / "run" / stages[-1])


def learnt_by_heart(directory: pathlib.Path, folder: str, rows: list[dict]) -> None:
    """Rows as training, validation and test split at once, so that what is learnt is what is asked.

    The training split repeats them: to shuffle a few rows takes grain's cipher thousands of rounds for each.
    """
    (directory / folder).mkdir(parents=True)
    for split, times in (("train", 64), ("validation", 1), ("test", 1)):
        (directory / folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) * times)


def read(file: pathlib.Path) -> str:
    return file.read_text(encoding="utf-8")


def fixture(file: str) -> list[dict]:
    return [json.loads(line) for line in (tiny_run.DATA / file).read_text(encoding="utf-8").splitlines()]


def test_an_encoder_that_learns_questions_about_chinese_by_heart_points_at_their_answers(tmp_path):
    shortest = sorted(fixture("reading/cmrc2018/train.jsonl"), key=lambda row: len(row["context"]))[:4]
    shortest = [row | {"context": row["context"][:60]} for row in shortest]  # their answers are before that
    learnt_by_heart(tmp_path / "data", "reading/cmrc2018", shortest)
    few = {f"stages.finetune.{field}": 60 for field in ("steps", "save_every", "log_every")}
    few |= {"stages.pretrain.batch_size": 4, "stages.finetune.batch_size": 4}
    few |= {"stages.finetune.optimizer.learning_rate": 1e-2, "sources.questions.validation_share": 0}
    few |= {"stages.pretrain.sequence_length": 64}
    few |= {f"{each}.sequence_length": 256 for each in ("stages.finetune", "evaluations.reading")}
    rows, _ = rows_of(tmp_path, "cmrc.py", ("pretrain", "finetune"), data_dir=tmp_path / "data", **few)
    assert rows["pretrain"]["contexts_items"] > 0 and rows["pretrain"].get("reading_f1") is None
    assert rows["finetune"]["parent"] == "pretrain" and rows["finetune"]["reading_items"] == 4
    assert 0.75 <= rows["finetune"]["reading_exact_match"] <= rows["finetune"]["reading_f1"] <= 1


def test_answers_that_are_learnt_by_heart_are_written_and_chosen_after_every_stage(tmp_path):
    learnt_by_heart(tmp_path / "data", "general", fixture("general/validation.jsonl")[:2])
    answered = [row | {"answer": " ".join(row["answer"].split()[:2])} for row in fixture("medical/medquad/test.jsonl")]
    learnt_by_heart(tmp_path / "data", "medical/medquad", answered[:4])
    abstracts = {row["label"]: row for row in fixture("medical/pubmedqa/train.jsonl")}  # the last one of each label
    abstracts = [row | {"context": row["context"][:60]} for row in abstracts.values()]
    learnt_by_heart(tmp_path / "data", "medical/pubmedqa", abstracts)
    names = ("pretrain", "posttrain", "finetune")
    sizes = {f"evaluations.{name}.max_documents": 4 for name in ("general", "domain", "answers", "reading")}
    sizes |= {"evaluations.answers.options.max_tokens": 24, "evaluations.answers.batch_size": 4}
    sizes |= {"evaluations.reading.batch_size": 3, "evaluations.reading.sequence_length": 256}
    sizes |= {f"stages.{name}.batch_size": 4 for name in names}
    sizes |= {"stages.pretrain.sequence_length": 64, "stages.posttrain.sequence_length": 96}
    sizes |= {"stages.finetune.sequence_length": 256}
    few = {f"stages.{name}.{field}": 80 for name in names[1:] for field in ("steps", "save_every", "log_every")}
    few |= {"stages.posttrain.optimizer.learning_rate": 1e-2, "stages.finetune.optimizer.learning_rate": 5e-3}
    few |= {"stages.posttrain.optimizer.name": "adamw", "stages.posttrain.optimizer.options": {}}
    few |= {"model.d_model": 64, "model.d_ff": 64, "stages.posttrain.data.medquad": 0.05}
    rows, metrics = rows_of(tmp_path, "reading.py", names, data_dir=tmp_path / "data", **sizes, **few)
    for name in ("init", *names):
        assert rows[name]["reading_majority_accuracy"] == pytest.approx(1 / 3)
        assert rows[name]["answers_items"] == 4 and rows[name]["reading_items"] == 3
    for figure in ("answers_f1", "answers_rouge_l", "answers_exact_match"):
        assert rows["init"][figure] <= rows["pretrain"][figure] < 0.25, figure
        assert 0.7 < rows["posttrain"][figure] <= 1, figure
    assert rows["finetune"]["reading_accuracy"] == 1 > rows["init"]["reading_accuracy"]
    first, last = (tiny_run.metrics(tmp_path / "run" / name) for name in ("pretrain", "posttrain"))
    assert first[-1]["epochs_general"] > 0 and set(metrics[-1]) >= {"epochs_pubmedqa"}
    assert rows["posttrain"]["epochs"].keys() == {"general", "medquad", "questions"}  # general: replayed
    assert last[-1].keys() >= {"epochs_general", "epochs_medquad", "epochs_questions"}
    own = f"accuracy {last[-1]['accuracy']:.4g}"  # of the objective, beside its loss
    assert any(own in line and "80/80" in line for line in read(tmp_path / "said.txt").splitlines())
    report = read(tmp_path / "run" / "report.md")
    assert "## Epochs of each source" in report and "- overlap: " in report


def test_an_encoder_and_a_decoder_of_one_config_have_the_same_parameters_and_tokens(tmp_path):
    sizes = {f"sources.{name}.max_documents": 60 for name in ("general", "medquad")}
    sizes |= {f"evaluations.{name}.max_documents": 4 for name in ("general", "domain")}
    sizes |= {f"evaluations.{name}.batch_size": 4 for name in ("general", "domain")}
    sizes |= {f"stages.{name}.batch_size": 4 for name in ("pretrain", "posttrain", "finetune_0")}
    found = {}
    for family, more in {"encoder": sizes, "decoder": sizes | {"evaluations": {}}}.items():
        names = ("pretrain", "posttrain", "finetune_0")
        found[family], _ = rows_of(tmp_path / family, f"encoder.py:{family}", names, data_dir=tiny_run.DATA, **more)
    for name, figure in itertools.product(("pretrain", "posttrain", "finetune_0"), ("params", "trainable_params")):
        assert found["encoder"][name][figure] == found["decoder"][name][figure]
    for name in ("pretrain", "posttrain"):
        tokens = [found[family][name]["tokens"] for family in found]
        assert tokens[0] == tokens[1] == 2 * 4 * 128
    assert found["encoder"]["finetune_0"]["task_items"] == 34


def test_a_mixture_of_denoisers_is_pretrained(tmp_path):
    tiny_run.write_texts(tmp_path / "texts")
    extra = "with c.ignore_type():\n    c.stages.pretrain.objective = dict(name='prefix', denoisers='ul2')"
    config = tiny_run.write_config(tmp_path / "config.py", tmp_path, extra)
    tiny_run.process(("run", f"--config={config}", f"--workdir={tmp_path / 'run'}", "--stages=pretrain"))
    losses = [line["loss"] for line in tiny_run.metrics(tmp_path / "run" / "pretrain")]
    assert losses[-1] < losses[0]
