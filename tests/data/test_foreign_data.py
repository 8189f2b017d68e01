"""Data encoded with tokenizers of others: row formats, windows, the cache and its round trip, metrics and the verbs."""

import json
import math
import shutil

import numpy as np
import pytest

from llm3.__main__ import main
from llm3.data import windows
from llm3.data.cache import cache as caches
from llm3.data.contamination import find_contamination
from llm3.data.formats import choice, span
from llm3.data.round_trip import RoundTrip, compare
from llm3.data.windows.examples import shortened
from llm3.data.words import word_numbers
from llm3.errors import UserError
from llm3.evals import choice as choice_eval
from llm3.evals import generation, perplexity, pseudo_perplexity
from llm3.evals import masked as masked_eval
from llm3.models.batching import sample
from llm3.objectives import Task, masked, prefix
from llm3.registry import load_plugin, read_options
from llm3.segments import segmented
from tests.helpers import tiny_foreign, tiny_run
from tests.helpers.tiny import make_params, model_config
from tests.helpers.tiny_answers import AnswerCache, questions
from tests.helpers.tiny_cache import make_context, without_predictions
from tests.helpers.tiny_foreign import CHATML, GEMMA, KINDS, foreign
from tests.helpers.tiny_records import ListRecords

each_kind = pytest.mark.parametrize("kind", KINDS)
TEXTS = [
    "The quick brown fox, isn't it?",
    "cafe\u0301 ﬁsh  Ünïcödé [MASK] <|im_end|>",
    "漢字 🙂 dog",
    "the fox and the dog and the cat " * 3,
]


def built(kind, directory, row_format="text", rows=None):
    rows = rows or tuple({"text": text} for text in TEXTS)
    return caches.build_cache(ListRecords((rows,)), row_format, foreign(kind), directory, progress=False)


@each_kind
def test_a_cache_counts_the_bytes_of_the_texts_and_what_does_not_come_back(kind, tmp_path):
    found, opened = foreign(kind), built(kind, tmp_path)
    by_row = dict(zip(opened.rows.tolist(), range(opened.documents), strict=True))
    for row, text in enumerate(TEXTS):
        document = opened.document(by_row[row]).tolist()
        assert document == [*found.starts, *found.encode(text), found.eos_id]
        first = 0 if found.starts else found.first_bytes(text, found.encode(text))
        assert opened.document_bytes[by_row[row]] == len(text.encode()) - first
    back = [found.decode(found.encode(text)) for text in TEXTS]
    if kind == "llama3":
        assert opened.round_trip is None and back == TEXTS
    else:
        exact = sum(one == other for one, other in zip(TEXTS, back, strict=True))
        assert opened.round_trip[:3] == (len(TEXTS), exact, sum(map(len, TEXTS)))
        assert (exact == len(TEXTS)) == (opened.round_trip.lost == 0) == (kind in ("gemma", "llama2"))
        assert f"{100 * exact / 4:.1f} % of 4 documents come back exactly" in opened.round_trip.phrase()
    assert built(kind, tmp_path).fingerprint == opened.fingerprint


def test_a_character_is_lost_if_the_decoded_text_has_it_less_often():
    assert compare(["aAb", "x"], ["aab", "x"]) == RoundTrip(1, 0, 4, 1)
    assert compare(["ab"], ["ab"]).plus([2, 1, 5, 3]) == RoundTrip(3, 2, 7, 3)


@each_kind
@pytest.mark.parametrize("kind_of_windows", ["stream", "pieces"])
def test_windows_predict_every_token_but_the_first_of_each_document_once(kind, kind_of_windows, tmp_path):
    opened = built(kind, tmp_path)
    table = load_plugin(windows, kind_of_windows).WindowTable(opened, 8)
    targets = np.concatenate([table[i].targets[table[i].weights > 0] for i in range(len(table))])
    expected = np.concatenate([opened.document(i)[1:] for i in range(opened.documents)])
    assert sorted(targets.tolist()) == sorted(expected.tolist())


@each_kind
def test_a_pair_of_texts_is_cut_between_its_own_special_tokens(kind, tmp_path):
    found = foreign(kind)
    row = {"text": "the fox and the dog and the cat and", "pair": "yes no", "labels": ["x"]}
    opened = built(kind, tmp_path, rows=(row, row | {"labels": ["y"]}))
    one, other = found.encode(row["text"]), found.encode(row["pair"])
    whole = opened.document(0)
    assert whole.tolist() == [*found.starts, *one, found.eos_id, *other, found.eos_id]
    cut = shortened(whole, len(found.starts) + 6, opened.starts, opened.eos_id).tolist()
    assert cut == [*found.starts, *one[:2], found.eos_id, *other[:2], found.eos_id]
    short = shortened(whole, len(whole) - 1, opened.starts, opened.eos_id).tolist()
    assert short == [*found.starts, *one[:-1], found.eos_id, *other, found.eos_id]


@each_kind
def test_the_span_of_an_answer_covers_its_characters(kind, tmp_path):
    found, context = foreign(kind), "Ünïcödé: the quick brown fox jumps, 漢字 and naïve café."
    for answer in ("quick brown", "漢字", "naïve", "Ünïcödé"):
        record = {
            "question": "is it so, or not? maybe",
            "context": context,
            "answers": [[answer, context.index(answer)]],
        }
        row = span.encode(record, found, "")
        [(first, last)] = row.note["spans"]
        text = found.decode(row.tokens[first : last + 1])
        decoded = found.decode(found.encode(answer))
        assert decoded.strip() in text and len(text) <= len(decoded) + 3
    opened = built(kind, tmp_path, "span", (record,))
    question = len(found.encode(record["question"]))
    assert [
        load_plugin(windows, "spans").WindowTable(opened, 2 * each).documents for each in (question, question - 1)
    ] == [1, 0]
    window = load_plugin(windows, "spans").WindowTable(opened, 96)[0]
    at = np.flatnonzero(window.targets & 1)
    assert at.tolist() == [first] and window.tokens[0] == row.tokens[0] and window.weights[0] == 1


@each_kind
def test_a_choice_begins_with_the_first_token_of_one_of_its_characters(kind):
    found = foreign(kind)
    record = {"prompt": "is the fox quick? ", "choices": ["yes", "no"], "correct": 0}
    row = choice.encode(record, found, "")
    answer = row.tokens[row.answer_mask]
    assert answer[-1] == found.eos_id and found.decode(answer).strip() == "yes"
    assert row.tokens[0] == (found.starts or [row.tokens[0]])[0]
    templated = choice.encode(record, found, GEMMA if kind == "gemma" else CHATML)
    assert found.decode(templated.tokens[templated.answer_mask]).replace(" ", "").startswith("yes")
    assert templated.note["joint"] is True and "joint" not in row.note


@pytest.mark.parametrize("kind", ["qwen", "llama2", "bert"])
def test_bits_per_byte_are_nats_of_the_text_tokens_over_the_bytes_of_the_original_texts(kind, tmp_path):
    found, opened = foreign(kind), built(kind, tmp_path)
    config = model_config(vocab_size=found.vocab_size)
    params = make_params(config)
    uniform = params | {"embed": {"embedding": np.zeros_like(params["embed"]["embedding"])}}
    context = make_context(perplexity, opened, tokenizer=found, params=segmented(uniform, ((0, config.layers),)))
    targets = sum(len(found.encode(text)) for text in TEXTS) - (0 if found.starts else len(TEXTS))
    size = sum(len(text.encode()) for text in TEXTS)
    if not found.starts:
        size -= sum(found.first_bytes(text, found.encode(text)) for text in TEXTS)
    expected = math.log2(found.vocab_size) * targets / size
    assert without_predictions(perplexity.evaluate(context)) == {"bits_per_byte": pytest.approx(expected, rel=1e-5)}


def test_generation_stops_at_each_end_token():
    found = foreign("gemma")
    config = model_config(vocab_size=found.vocab_size, tie_embeddings=False)
    params, asked = make_params(config, seed=3), questions([("the fox", "yes")], found)
    made = sample(params, config, [found.bos_id, *found.encode("the fox")], max_tokens=8, temperature=0)
    kernel = np.array(params["lm_head"]["kernel"])
    for end in found.end_ids[1:]:  # of <eos>, other tests see it
        assert end not in made
        swapped, pair = kernel.copy(), [end, made[3]]
        swapped[:, pair] = swapped[:, pair[::-1]]  # the end instead of the fourth token
        changed = segmented(params | {"lm_head": {"kernel": swapped}}, ((0, config.layers),))
        options = generation.Options(max_tokens=8)
        context = make_context(
            generation, asked, tokenizer=found, params=changed, options=options, length=64, tie_embeddings=False
        )
        question = generation.read_question(context, 0, 32)
        (answer,) = generation.generate_answers(context, [question], 32)
        assert answer.text == found.decode(made[: made.index(made[3])])


def test_choices_are_scored_without_a_bos():
    found = foreign("qwen")
    rows = [
        choice.encode({"prompt": "the fox?", "choices": ["yes", "no"], "correct": 0}, found, t) for t in ("", CHATML)
    ]
    context = make_context(choice_eval, AnswerCache(rows), tokenizer=found, length=96)
    assert choice_eval.evaluate(context)["items"] == 2


@pytest.mark.parametrize("kind", ["gemma", "unigram", "bert"])
def test_the_masked_objective_hides_text_with_the_mask_token_of_the_tokenizer(kind, tmp_path):
    found = foreign(kind)
    window = load_plugin(windows, "stream").WindowTable(built(kind, tmp_path), 32)[0]
    task = Task(read_options(masked, {"share": 0.5, "mask": 1.0, "replace": 0.0, "whole_words": True}, "x"), found, 32)
    hidden = masked.corrupt(window, np.random.default_rng(0), task)
    chosen = hidden.weights > 0
    assert chosen.any() and (hidden.tokens[chosen] == found.mask_id).all()
    assert not np.isin(window.tokens[chosen], [found.bos_id, found.eos_id]).any()
    random = masked.text_tokens(found)
    assert not {*found.specials.values()} & set(random.tolist()) and len(random) > 40


@pytest.mark.parametrize(
    ("plugin", "options"),
    [
        (masked, {}),
        (prefix, {"denoisers": "ul2"}),
        (masked_eval, {}),
        (pseudo_perplexity, {}),
    ],
)
def test_where_a_mask_token_is_needed_and_there_is_none_the_field_is_named(plugin, options):
    read = read_options(plugin, options, "x")
    with pytest.raises(UserError, match=r"tokenizer\.special\.mask: the tokenizer has no mask token"):
        plugin.check_tokenizer(foreign("qwen"), read)
    plugin.check_tokenizer(foreign("bert"), read)
    prefix.check_tokenizer(foreign("qwen"), prefix.Options())


def test_words_are_found_in_pieces_of_words():
    found = foreign("bert")
    tokens = np.array([found.bos_id, *found.encode("the quick, maybe"), found.eos_id])
    numbers = word_numbers(tokens, np.ones_like(tokens), found)
    names = [found.tokens[i] for i in tokens]
    for place in range(1, len(tokens)):
        assert (numbers[place] == numbers[place - 1]) == names[place].startswith("##")


def test_without_a_bos_every_token_counts_for_contamination(tmp_path):
    rows = tuple({"text": text} for text in TEXTS)
    training, evaluation = built("qwen", tmp_path / "a"), built("qwen", tmp_path / "b", rows=rows[:1])
    found = find_contamination(evaluation, [training], n=3)
    assert found.documents == found.exact == found.near == 1 and found.share == 1
    changed = built("qwen", tmp_path / "c", rows=({"text": "Is" + TEXTS[0][3:]},))
    before, after = (len(foreign("qwen").encode(text)) for text in (TEXTS[0][3:], "Is" + TEXTS[0][3:]))
    assert find_contamination(changed, [training], n=3).share == (before - 2) / (after - 2)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    base = tmp_path_factory.mktemp("texts")
    tiny_run.write_texts(base / "texts")
    return base


def config_file(base, folder, extra=""):
    lines = f'c.tokenizer = dict(path="{folder}")\n' + extra
    return tiny_run.write_config(base / "config.py", base, lines)


def test_the_verb_data_prints_the_round_trip_of_each_source(base, tmp_path, capsys):
    file = config_file(base, tiny_foreign.bert(tmp_path / "bert"))
    status = main(["data", f"--config={file}", f"--workdir={tmp_path / 'run'}", "--stages=pretrain"])
    captured = capsys.readouterr()
    assert status == 0, captured.err
    assert "general: 0.0 % of " in captured.out and " come back exactly from their tokens, " in captured.out
    assert "[SEP]»[CLS]«" in captured.out


def test_the_verb_data_names_a_missing_mask_before_training(base, tmp_path, capsys):
    extra = 'c.model.causal = False\nc.model.pool = "mean"\n'
    extra += 'with c.ignore_type():\n    c.stages.pretrain.objective = "masked"\n'
    extra += "c.evaluations = dict()\nc.stages = dict(pretrain=c.stages.pretrain)\n"
    file = config_file(base, tiny_foreign.qwen(tmp_path / "qwen"), extra)
    assert main(["data", f"--config={file}", f"--workdir={tmp_path / 'run'}"]) == 2
    assert "config.stages.pretrain.objective='masked': tokenizer.special.mask: " in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_resumes_and_generates_without_the_folder_of_its_tokenizer(base, tmp_path):
    folder, run = tiny_foreign.qwen(tmp_path / "qwen"), tmp_path / "run"
    extra = "c.stages = dict(pretrain=c.stages.pretrain)\nc.evaluations = dict(general=c.evaluations.general)\n"
    file = config_file(base, folder, extra)
    command = ["run", f"--config={file}", f"--workdir={run}"]
    begun = tiny_run.process(command, point="SIGTERM@log:pretrain:6", status=75)
    assert "round trip" in begun.stdout and (run / "chat_template.jinja").read_text() == CHATML
    kept = json.loads((run / "tokenizer.json").read_text())["llm3"]
    assert kept["special"]["bos"] is None and "tokenizer_config.json" in kept["files"]
    shutil.rmtree(folder)
    tiny_run.process(command)
    asked = ["generate", f"--workdir={run}", "--prompt=the fox", "--max_tokens=4", "--raw"]
    assert "the fox" in tiny_run.process(asked).stdout
