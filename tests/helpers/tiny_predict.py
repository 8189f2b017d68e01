"""Runs of one stage with random parameters, and what `predict` should say of a text: by the reference, in float64."""

import functools
import json
import pathlib

import numpy as np

from llm3.__main__ import main
from llm3.config.data_schema import SourceConfig
from tests.helpers import reference
from tests.helpers.tiny import LENGTH, make_row
from tests.helpers.tiny_export import STAGE, model, tokenizer, write_run

LABELS = ("one", "three", "two")
SOURCES = {
    "labels": SourceConfig("json", data_files="x", text="body", label="kind"),
    "spans": SourceConfig("json", data_files="x", text="context", prompt="question", answers="answers"),
    "answers": SourceConfig("json", data_files="x", messages="turns"),
    "scores": SourceConfig("json", data_files="x"),
    "proposals": SourceConfig("json", data_files="x"),
}
MODELS: dict[str, dict] = {
    "labels": {"classes": 3},
    "spans": {"classes": 2, "causal": False, "pool": "mean"},
    "answers": {},
    "scores": {},
    "proposals": {"causal": False, "pool": "mean"},
}
OBJECTIVES = {"labels": "classify", "spans": "span", "answers": "instruct", "scores": "causal", "proposals": "masked"}


def write(directory: pathlib.Path, kind: str, template: str = "", **meta) -> pathlib.Path:
    """The run directory of a stage whose default kind of predictions is `kind`."""
    labels = LABELS if kind == "labels" else ("start", "end") if kind == "spans" else ()
    meta = {"sources": {"task": SOURCES[kind]}, "objective": OBJECTIVES[kind], "template": template} | meta
    write_run(directory, *model(**MODELS[kind]), labels, **meta)
    return directory


def lines(rows) -> bytes:
    return b"".join(row if isinstance(row, bytes) else json.dumps(row).encode() + b"\n" for row in rows)


def predict(run: pathlib.Path, file: pathlib.Path, out, *flags: str) -> int:
    return main(["predict", f"--workdir={run}", f"--stage={STAGE}", f"--in={file}", f"--out={out}", *flags])


def read(file: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def predicted(run: pathlib.Path, rows, *flags: str, name: str = "out.jsonl") -> list[dict]:
    """The rows that `predict` writes for these rows, in a new file beside the run."""
    file, out = run.parent / f"in-{name}", run.parent / name
    file.write_bytes(lines(rows))
    assert predict(run, file, out, *flags) == 0
    return read(out)


def document(text: str, *more: str, length: int = LENGTH) -> np.ndarray:
    """[bos] text [eos], and [eos] after each of `more`; a single text is cut as in training."""
    encode, (bos, eos) = tokenizer().encode, (1, 2)
    tokens = [bos, *(token for each in (text, *more) for token in (*encode(each), eos))]
    return np.array(tokens if len(tokens) <= length else [*tokens[: length - 1], eos], np.int32)


@functools.cache
def _hidden(kind: str, tokens: tuple[int, ...]) -> np.ndarray:
    config, params = model(**MODELS[kind])
    return reference.row_hidden(config, params, make_row(np.array(tokens), length=len(tokens)))


def hidden(kind: str, tokens) -> np.ndarray:
    """The final hidden states of a document, float64 [T, D]."""
    return _hidden(kind, tuple(int(each) for each in tokens))


def head(kind: str, states: np.ndarray) -> np.ndarray:
    """The logits of the task head, float64 [..., C]."""
    _, params = model(**MODELS[kind])
    return states @ params["head"]["kernel"].astype(np.float64) + params["head"]["bias"]


def logits(kind: str, tokens) -> np.ndarray:
    """The logits of the next token, or of the token at each position: float64 [T, V]."""
    config, params = model(**MODELS[kind])
    return reference.row_logits(config, params, hidden(kind, tokens))


def softmax(values: np.ndarray) -> np.ndarray:
    powers = np.exp(values - values.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)
