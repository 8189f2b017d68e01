"""Sampling: the key-value cache changes no result."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from llm3.__main__ import main
from llm3.config.sampling import Sampling
from llm3.config.schema import ModelConfig
from llm3.models.batching import sample
from llm3.models.sampling import next_token
from llm3.models.transformer import abstract
from llm3.segments import segmented
from llm3.tree import map_with_path
from tests.helpers import tiny_export, tiny_predict
from tests.helpers.tiny_answers import TALK, encoded
from tests.helpers.tiny_export import tokenizer

MESSAGES = [{"role": "user", "content": "hi 7"}, {"role": "assistant", "content": "hello"}]
VOCAB = 23
PROMPT = [1, 5, 9, 5, 2]
TOKENS = 12
CONFIG = ModelConfig(
    layers=2,
    d_model=16,
    heads=2,
    kv_heads=1,
    d_ff=24,
    qk_norm="head",
    tie_embeddings=False,
    vocab_size=VOCAB,
    compute_dtype="float32",
)


@pytest.fixture(scope="module")
def model():
    """A config, and parameters large enough that the next token depends on all the tokens before."""
    config, random = CONFIG, np.random.default_rng(0)
    shapes = abstract(config).shapes
    shapes = {**shapes, "layers": shapes["layers"]["0:2"]}
    params = map_with_path(lambda _, leaf: jnp.asarray(random.normal(size=leaf.shape), jnp.float32), shapes)
    return config, params


@jax.jit
def logits_at(params: dict, text: jax.Array, last: int) -> jax.Array:
    module = nnx.merge(abstract(CONFIG).graph, segmented(params, ((0, CONFIG.layers),)))
    hidden = module(text, jnp.arange(text.shape[1])[None], jnp.ones_like(text))
    return module.logits(hidden)[:, last]


def recompute(params: dict, *, seed: int = 0, **options) -> list[int]:
    """Sampling without a cache: the whole text through the model for each token."""
    text = list(PROMPT)
    for i in range(TOKENS):
        padding = [0] * (len(PROMPT) + TOKENS - len(text))  # the model is causal: padding after the text has no effect
        logits = logits_at(params, jnp.array([text + padding], jnp.int32), len(text) - 1)
        key = jax.random.fold_in(jax.random.key(seed), i)
        text.append(int(next_token(logits[0], key, Sampling(**options))))
    return text[len(PROMPT) :]


@pytest.mark.parametrize(
    "options", [{"temperature": 0}, {"temperature": 1.3}, {"temperature": 0.8, "top_k": 5, "top_p": 0.9}]
)
def test_a_cached_sample_is_that_of_full_recomputation_token_for_token(model, options):
    config, params = model
    made = sample(params, config, PROMPT, max_tokens=TOKENS, seed=3, **options)
    assert made == recompute(params, seed=3, **options)
    assert len(set(made)) > 2


def test_a_seed_decides_the_sample(model):
    config, params = model
    one, same, other = (
        sample(params, config, PROMPT, max_tokens=TOKENS, seed=seed, temperature=1.3) for seed in (0, 0, 1)
    )
    assert one == same != other


def test_the_narrowest_filters_are_greedy(model):
    config, params = model
    greedy = sample(params, config, PROMPT, max_tokens=TOKENS, temperature=0)
    assert sample(params, config, PROMPT, max_tokens=TOKENS, temperature=1.3, top_k=1) == greedy
    assert sample(params, config, PROMPT, max_tokens=TOKENS, temperature=1.3, top_p=1e-6) == greedy


def test_a_sample_ends_before_the_first_stop(model):
    config, params = model
    greedy = sample(params, config, PROMPT, max_tokens=TOKENS, temperature=0)
    for stops in ([greedy[-1:]], [[VOCAB], greedy[4:7], []], [greedy[5:7], greedy[4:7]]):
        ends = (at for at in range(TOKENS) for stop in stops if stop and greedy[at : at + len(stop)] == list(stop))
        assert sample(params, config, PROMPT, max_tokens=TOKENS, temperature=0, stops=stops) == greedy[: next(ends)]


def test_a_prompt_goes_through_the_chat_template_that_the_stage_was_trained_with(tmp_path, monkeypatch, capsys):
    asked = []

    def answer(engine, ask, say):
        asked.append((ask.tokens, ask.stop_tokens))
        say(ask.decode(tokenizer().encode("hello")) + "\n")

    monkeypatch.setattr("llm3.cli.generate.answer", answer)
    tiny_export.write_run(tmp_path, *tiny_export.model(), template=tiny_export.SPELLED)
    command = ["generate", f"--workdir={tmp_path}", f"--stage={tiny_export.STAGE}", "--prompt=hi 7"]
    by_hand = "<user>hi 7<|im_end|>\n<assistant>"
    assert main(command) == 0 and main([*command, f"--prompt={by_hand}"]) == 0 and main([*command, "--raw"]) == 0
    assert capsys.readouterr().out == f"hello\n{by_hand}hello\nhi 7hello\n"
    document = encoded({"messages": MESSAGES}, TALK, tokenizer(), tiny_export.SPELLED)
    (prompt, stops), again, (raw, _) = asked
    start = int(document.answer_mask.argmax())
    assert prompt == document.tokens[:start].tolist() and raw == [1, *tokenizer().encode("hi 7")]
    end = tokenizer().encode("<|im_end|>")
    assert again == (prompt, stops) and asked[2][1] == stops
    assert stops == ((2,), tuple(end))
    assert document.tokens[document.answer_mask].tolist() == tokenizer().encode("hello") + end
    same_size = tiny_export.train(tiny_export.TEXTS, 270).extended(["fax", "数学"])
    same_size.save(tmp_path / "tokenizer.json")
    assert main(command) == 2 and "tokenizer.json is not the tokenizer of" in capsys.readouterr().err


def test_stages_that_were_not_trained_to_continue_texts_are_asked_by_name_only(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("llm3.cli.generate.answer", lambda engine, ask, say: say(" and on\n"))
    for kind in ("labels", "proposals", "scores"):
        tiny_predict.write(tmp_path, kind, stage=kind)
        (tmp_path / tiny_export.STAGE).rename(tmp_path / kind)
    ask = lambda *flags: main(["generate", f"--workdir={tmp_path}", "--prompt=hi", *flags])  # noqa: E731
    assert ask() == 0
    shown = capsys.readouterr()
    assert [line.split()[0] for line in shown.out.splitlines()] == ["scores", "hi"]
    assert "Left out, not trained to continue texts: labels (labels), proposals (proposals)" in shown.err
    assert ask("--stage=labels") == 0 and capsys.readouterr() == ("hi and on\n", "")
    assert ask("--stage=proposals") == 2 and "cannot continue a text: it is a bidirectional" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "scores")
    assert ask() == 2 and "no stage was trained to continue texts: labels (labels)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "nothing to answer: expected one of --prompt=TEXT, --chat and --prompts=FILE"),
        (["--prompt=a", "--chat"], "--prompt and --chat: expected one of"),
        (["--prompts=a.jsonl"], "expected --prompts=FILE and --out=FILE together"),
        (["--chat"], "--chat: expected --stage=NAME"),
        (["--prompt=a", "--top_p=0"], "--top_p=0.0: expected a probability above 0"),
        (["--prompt=a", "--min_p=-1"], "--min_p=-1.0: expected a probability"),
        (["--prompt=a", "--temperature=nan"], "--temperature=nan: expected at least 0"),
        (["--prompt=a", "--repetition_penalty=0"], "--repetition_penalty=0.0: expected at least"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(tmp_path, capsys, flags, message):
    assert main(["generate", f"--workdir={tmp_path}", *flags]) == 2
    assert message in capsys.readouterr().err


def test_a_conversation_remembers_its_turns_and_a_file_of_them_gets_the_same_answer(tmp_path, monkeypatch, capsys):
    tiny_export.write_run(tmp_path, *tiny_export.model(), template=tiny_export.SPELLED)
    common = ["generate", f"--workdir={tmp_path}", f"--stage={tiny_export.STAGE}", "--max_tokens=5", "--temperature=0"]
    lines = iter(["hi 7", "and 8", "", "hi 7"])

    def read(_: str) -> str:
        for line in lines:
            return line
        raise EOFError

    monkeypatch.setattr("builtins.input", read)
    assert main([*common, "--chat"]) == 0
    first, second, again = capsys.readouterr().out.splitlines()
    assert first == again
    messages = [{"role": "user", "content": "hi 7"}, {"role": "assistant", "content": first}]
    rows = [messages[:1], [*messages, {"role": "user", "content": "and 8"}]]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"messages": each}) + "\n" for each in rows))
    assert main([*common, f"--prompts={tmp_path}/in.jsonl", f"--out={tmp_path}/out.jsonl"]) == 0
    found = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [each["answer"] for each in found] == [first, second] and all(each["tokens"] for each in found)
    assert "tokens/s" in capsys.readouterr().err
