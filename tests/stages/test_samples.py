"""Samples of a run: which prompts a model reads, what fills in mask tokens, and files in which no step occurs twice."""

import dataclasses

import numpy as np
import pytest
from scipy.special import softmax

from llm3.config import load as configfile
from llm3.data.prompts import check_prompts, mask_text, with_masks
from llm3.errors import UserError
from llm3.evals import masked
from llm3.stages import samples
from llm3.stages.workdir import stage_record
from tests.helpers import reference
from tests.helpers import tiny_run as tiny
from tests.helpers.tiny import make_params, make_row, model_config
from tests.helpers.tiny_cache import BYTES, MemoryCache, make_context

ENCODER = {"causal": False, "pool": "mean"}
MASK = "<|mask|>"


def texts(directory):
    return [(line["step"], line["prompt"], line["text"]) for line in samples.read_samples(directory)]


def test_no_step_occurs_twice_and_later_steps_are_dropped_on_resuming(tmp_path):
    assert texts(tmp_path) == []
    for step, text in ((4, "a"), (8, "b\n"), (12, "c"), (8, "é")):
        samples.keep_samples(tmp_path, step, [("p", text), ("q", text)])
    assert texts(tmp_path) == [(4, "p", "a"), (4, "q", "a"), (8, "p", "é"), (8, "q", "é")]
    samples.drop_samples(tmp_path, after=8)
    assert len(texts(tmp_path)) == 4
    samples.drop_samples(tmp_path, after=7)
    assert texts(tmp_path) == [(4, "p", "a"), (4, "q", "a")]


def test_mask_tokens_get_the_likeliest_tokens_with_their_probabilities():
    config = model_config(vocab_size=BYTES.vocab_size, **ENCODER)
    params = make_params(config)
    prompts = [f"the {MASK} sat", f"{MASK} a longer one {MASK}"]
    context = make_context(masked, MemoryCache([]), batch_size=2, **ENCODER)
    read = [with_masks(each, BYTES) for each in prompts]
    assert mask_text(BYTES) == MASK and [each.count(BYTES.mask_id) for each in read] == [1, 2]
    filled = samples.filled_in(context, read)
    for tokens, text in zip(read, filled, strict=True):
        row = make_row(np.array(tokens), length=len(tokens))
        shares = softmax(reference.row_logits(config, params, reference.row_hidden(config, params, row)), axis=-1)
        expected = []
        for place in np.flatnonzero(np.array(tokens) == BYTES.mask_id):
            best = np.argsort(-shares[place])[:3]
            expected.append(", ".join(f"{BYTES.decode([t]).strip()} {100 * shares[place, t]:.1f} %" for t in best))
        assert text == "; ".join(expected)


def test_a_prompt_that_no_model_of_the_run_can_read_is_refused():
    causal, encoder = model_config(), model_config(**ENCODER)
    with pytest.raises(UserError, match=r"^config.samples\[1\]='b': .* fills in mask tokens: expected '<\|mask\|>'$"):
        check_prompts([MASK, "b"], 9, encoder, BYTES, "", "config.samples")
    check_prompts(["any", ""], 10**6, causal, BYTES, "", "config.samples")
    learned = dataclasses.replace(causal, positions="learned", max_positions=20)
    check_prompts(["short"], 9, learned, BYTES, "", "config.samples")
    with pytest.raises(UserError, match=r"config.samples\[0\].*20"):
        check_prompts(["a longer prompt"], 9, learned, BYTES, "", "config.samples")


def test_samples_may_change_when_a_run_resumes(tmp_path):
    file = str(tiny.write_config(tmp_path / "config.py", tmp_path))
    changed = configfile.load(file, ["samples=['x']", "sample_tokens=3", "stages.pretrain.sample_every=2"])
    assert stage_record(changed, "pretrain") == stage_record(configfile.load(file), "pretrain")
    with pytest.raises(UserError, match=r"^config.samples\[0\] is empty"):
        configfile.load(file, ["samples=['']"])
