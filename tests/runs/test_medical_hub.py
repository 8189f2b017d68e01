"""configs/medical.py without `data_dir`: rows as the hub has them, one split, many of them without a text."""

import json

import pytest

from tests.helpers import tiny_run
from tests.runs.test_medical import MEDICAL

pytestmark = pytest.mark.slow


def write(path, rows) -> None:
    path.parent.mkdir(parents=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def test_the_hubs_layout_is_read_as_the_config_says(tmp_path):
    """A line a row with empty ones, and one split, of which the last tenth is validation and test."""
    files = [tiny_run.DATA / "medical" / "medquad" / f"{split}.jsonl" for split in ("train", "validation", "test")]
    answers = [json.loads(line) for file in files for line in file.open(encoding="utf-8")][:160]
    rows = [
        {"question_type": row["question_type"], "answer": None if i % 3 else row["answer"], "document_id": i}
        for i, row in enumerate(answers)
    ]
    texts = [json.loads(line)["text"] for line in (tiny_run.DATA / "general" / "train.jsonl").open(encoding="utf-8")]
    write(tmp_path / "medquad" / "train.jsonl", rows)
    for split in ("train", "validation", "test"):
        (tmp_path / "wiki").mkdir(exist_ok=True)
        lines = [{"text": line} for text in texts for line in text.split("\n")[:6]]
        (tmp_path / "wiki" / f"{split}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in lines))
    small = {
        "tokenizer.vocab_size": 300,
        "model.layers": 2,
        "model.scan_unroll": 1,
        "model.d_model": 16,
        "model.d_ff": 16,
        "sources.general.path": tmp_path / "wiki",
        "sources.general.name": "",
        **{f"sources.{name}.path": tmp_path / "medquad" for name in ("medquad", "task")},
        **{f"evaluations.{name}.max_documents": 4 for name in ("general", "domain")},
        **{f"stages.{name}.steps": 2 for name in ("pretrain", "top2_0")},
        **{f"stages.{name}.optimizer.warmup_steps": 1 for name in ("pretrain", "top2_0")},
        "stages.top2_0.start.stage": "pretrain",
    }
    overrides = [f"--config.{field}={value}" for field, value in small.items()]
    run = ["run", f"--config={MEDICAL}", f"--workdir={tmp_path / 'run'}", "--stages=pretrain,top2_0"]
    tiny_run.process([*run, *overrides])
    row = tiny_run.rows(tmp_path / "run")["top2_0"]
    assert row["task_items"] == 3, "of the last twentieth of 160 rows, those with an answer"
