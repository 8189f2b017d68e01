"""Tasks of lm-eval in YAML files, with their documents beside them, and what a model should get on them."""

import functools
import json
import pathlib

import numpy as np
import yaml

from llm3.data.tokenizer import Tokenizer, train
from tests.helpers import reference
from tests.helpers.tiny import make_params, make_row, model_config

TOKENIZER = train(["Is it so? Answer: yes Answer: no Answer: maybe not "] * 9, 330)
MODEL = {"layers": 2, "tie_embeddings": False}  # tied, a model of random parameters repeats itself
CONFIG = model_config(vocab_size=TOKENIZER.vocab_size, **MODEL)
PARAMS = make_params(CONFIG, seed=1)
CHOICES = [
    {"q": "Is it so?", "choices": ["yes", "no", "maybe not"], "gold": 1},
    {"q": "Is it no?", "choices": ["yes", "no", "so it is"], "gold": 0},
    {"q": "it", "choices": ["no", "yes"], "gold": 1},
    {"q": "Answer: no?", "choices": ["so", "maybe"], "gold": 0},
    {"q": "so", "choices": ["is it", "yes", "no", "?"], "gold": 0},
]
TEXTS = [{"text": text} for text in ("Is it so? no", "yes", "Answer: maybe not so " * 4)]
PROMPTS = [{"q": "Is it so?", "a": "x"}, {"q": "maybe " * 5, "a": "x"}, {"q": "no", "a": "x"}]
SPLITS = {"test_split": "test", "fewshot_split": "train"}
METRICS = {"aggregation": "mean", "higher_is_better": True}
TASKS = {
    "picks": (
        CHOICES,
        {
            "output_type": "multiple_choice",
            "doc_to_text": "{{q}}\nAnswer:",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "gold",
            "metric_list": [{"metric": "acc", **METRICS}, {"metric": "acc_norm", **METRICS}],
        },
    ),
    "guesses": (
        CHOICES,
        {
            "output_type": "loglikelihood",
            "doc_to_text": "{{q}}\nAnswer:",
            "doc_to_target": " {{choices[gold]}}",
            "metric_list": [{"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False}],
        },
    ),
    "reads": (
        TEXTS,
        {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{text}}",
            "metric_list": [{"metric": name} for name in ("word_perplexity", "byte_perplexity", "bits_per_byte")],
        },
    ),
    "writes": (
        PROMPTS,
        {
            "output_type": "generate_until",
            "doc_to_text": "{{q}}",
            "doc_to_target": "{{a}}",
            "generation_kwargs": {"until": ["\n\n"], "max_gen_toks": 12, "do_sample": False},
            "metric_list": [{"metric": "exact_match", **METRICS}],
        },
    ),
}


def write_tasks(folder: pathlib.Path, **changes: dict) -> pathlib.Path:
    """The YAML files of `TASKS`, and of others that `changes` name; {name: {field: value}}."""
    for name in {**TASKS, **changes}:
        rows, fields = TASKS[changes.get(name, {}).get("like", name)]
        fields = {**fields, **{key: value for key, value in changes.get(name, {}).items() if key != "like"}}
        file = folder / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        splits = {"test": str(file), "train": str(file)}
        fields = {"task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": splits}, **SPLITS, **fields}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"metadata": {"version": 1.0}} | fields), encoding="utf-8")
    return folder


@functools.cache
def logits_after(tokens: tuple[int, ...]) -> np.ndarray:
    """[T, V] in float64."""
    row = make_row(np.array(tokens), length=len(tokens))
    return reference.row_logits(CONFIG, PARAMS, reference.row_hidden(CONFIG, PARAMS, row))


def log_likelihood(before: list[int], tokens: list[int]) -> tuple[float, bool]:
    """(log p of the tokens after those before, whether each of them is the likeliest)."""
    logits = logits_after((*before, *tokens))[len(before) - 1 : -1]
    found = -reference.nats(logits, np.array(tokens))
    return float(found.sum()), bool((logits.argmax(axis=-1) == tokens).all())


def likeliest(before: list[int], count: int) -> list[int]:
    """Greedy tokens, one after another."""
    made: list[int] = []
    for _ in range(count):
        made.append(int(logits_after((*before, *made))[-1].argmax()))
    return made


def with_bos(text: str, tokenizer: Tokenizer = TOKENIZER) -> list[int]:
    return [tokenizer.bos_id, *tokenizer.encode(text)]
