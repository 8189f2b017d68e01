"""lm-eval's own model `hf`, on the exported files, gives the scores and answers of llm3."""

import dataclasses

import pytest

pytest.importorskip("torch", reason="needs torch")
pytest.importorskip("transformers", reason="needs pip install 'llm3[hf]'")
pytest.importorskip("lm_eval", reason="needs pip install 'llm3[eval]'")

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from llm3.evals import harness
from llm3.evals.harness.language_model import LanguageModel
from llm3.segments import segmented
from tests.helpers.tiny_cache import make_context
from tests.helpers.tiny_export import ADDED, model, tokenizer, written

pytestmark = pytest.mark.slow

LENGTH = 32
PAIRS = [
    ("The quick", " brown fox."),
    ("The quick ", "brown"),  # the space moves to the continuation
    ("", "jumps over"),
    ("naïve 数学 🙂\n" * 9, "数"),  # longer than the window
    ("x" * 30, " <|eos|> is text, and more than fits"),
]
TEXTS = ["The quick brown fox.\n\tjumps  over", "x", "<|eos|> is text, and <|bos|> as well, naïve 数学 🙂 " * 3]
ASKED = [
    ("The quick", {"until": ["\n\n"], "max_gen_toks": 20, "do_sample": False}),
    ("naïve 数学 🙂\n" * 9, {"until": [], "max_gen_toks": 9}),
    ("jumps", {"until": "x", "max_gen_toks": 24, "temperature": 0.0}),
    ("over", {"until": ["e", "o"], "max_gen_toks": 20}),
]
TURNS = [{"role": "user", "content": "hi 7"}, {"role": "assistant", "content": "so"}, {"role": "user", "content": "x"}]


CHANGES = {"tie_embeddings": False, "rope_theta": 100.0, "norm_epsilon": 1e-5}


def models(directory, template: str = ""):
    """(llm3's model, lm-eval's model `hf`) with the same parameters."""
    torch.set_num_threads(1)
    config, params = model(**CHANGES)
    context = make_context(
        harness, None, options=harness.Options(apply_chat_template=bool(template)), tokenizer=tokenizer(),
        length=LENGTH, batch_size=4, params=segmented(params, ((0, config.layers),)), **CHANGES,
    )  # fmt: skip
    out = written(directory, run={"template": template}, **CHANGES)
    theirs = HFLM(pretrained=str(out), device="cpu", dtype="float32", max_length=LENGTH, batch_size=4)
    return LanguageModel(dataclasses.replace(context, template=template)), theirs


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    return models(tmp_path_factory.mktemp("export"))


def results(lm, kind: str, arguments: list[tuple]) -> list:
    found = [Instance(kind, {}, each, number) for number, each in enumerate(arguments)]
    return getattr(lm, kind)(found)


def test_continuations_have_equal_log_likelihoods_and_are_equally_greedy(both):
    (ours, theirs) = (results(each, "loglikelihood", PAIRS) for each in both)
    assert [score for score, _ in ours] == pytest.approx([score for score, _ in theirs], abs=1e-4)
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]


def test_texts_have_equal_log_likelihoods(both):
    ours, theirs = (results(each, "loglikelihood_rolling", [(text,) for text in TEXTS]) for each in both)
    assert ours == pytest.approx(theirs, abs=1e-4, rel=1e-5)


def test_answers_are_equal(both):
    ours, theirs = (results(each, "generate_until", ASKED) for each in both)
    assert ours == theirs and len(set(ours)) == len(ours)


def test_a_conversation_is_written_and_encoded_equally(tmp_path):
    both = models(tmp_path, "{{ bos_token }}" + ADDED)
    ours, theirs = ([each.tok_encode(each.apply_chat_template(TURNS, last)) for last in (True, False)] for each in both)
    assert ours == theirs
