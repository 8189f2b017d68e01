"""Tasks of lm-eval on llm3's own scoring and generation, against hand computations."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from llm3.distributed import processes
from llm3.distributed.sharding import place_batch
from llm3.errors import UserError
from llm3.evals import harness
from llm3.segments import segmented
from tests.helpers.tiny_cache import COUNTED, make_context, without_predictions
from tests.helpers.tiny_export import ADDED
from tests.helpers.tiny_tasks import (
    CHOICES,
    CONFIG,
    MODEL,
    PARAMS,
    PROMPTS,
    TEXTS,
    TOKENIZER,
    likeliest,
    log_likelihood,
    with_bos,
    write_tasks,
)

pytest.importorskip("lm_eval", reason="needs pip install 'llm3[eval]'")

from llm3.evals.harness.language_model import LanguageModel
from llm3.evals.harness.requests import Answering, Continuation, answers, log_likelihoods

LENGTH = 64
EVERY = ("picks", "guesses", "reads", "writes")
COMPILED: dict = {}
CHANGED = {
    "samples": {"like": "writes", "generation_kwargs": {"do_sample": True, "temperature": 0.7}},
    "long": {"like": "writes", "generation_kwargs": {"until": ["x"]}},
    "shots": {"like": "picks", "num_fewshot": 2},
    "none": {"like": "picks", "num_fewshot": 0},
    "filtered": {
        "like": "writes",
        "filter_list": [{"name": "strict-match", "filter": [{"function": "take_first"}]}],
    },
    "lost": {"like": "reads", "dataset_kwargs": {"data_files": {"test": "no/such.jsonl"}}},
    "unsafe": {"like": "writes", "unsafe_code": True},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = write_tasks(tmp_path_factory.mktemp("tasks"), **CHANGED)
    (made / "group.yaml").write_text(
        "group: both\ntask: [picks, shots]\naggregate_metric_list: [{metric: acc}]\nmetadata: {version: 2.0}\n"
    )
    return made


def context_of(folder=None, *tasks, length=LENGTH, template="", place=None, **changes):
    """The tiny model with tasks of the folder loaded."""
    options = harness.Options(tasks=tasks, include_path=str(folder or ""), bootstrap_iters=100, **changes)
    fields = {"params": segmented(PARAMS, ((0, CONFIG.layers),)), "tokenizer": TOKENIZER, **MODEL}
    made = make_context(harness, None, options=options, length=length, place=place, batch_size=8, **fields)
    prepared = harness.prepare(made.config, options, template) if tasks else None
    made = dataclasses.replace(made, prepared=prepared, template=template)
    return made if place else dataclasses.replace(made, compiled=COMPILED)


def measured(*arguments, **changes) -> dict:
    return harness.evaluate(context_of(*arguments, **changes))


class Seen(LanguageModel):
    """A model that keeps the requests it gets, and answers with nothing."""

    def loglikelihood(self, requests, disable_tqdm=True):
        self.seen = [request.args for request in requests]
        return [(0.0, False)] * len(requests)


def prompts_of(monkeypatch, *arguments, **changes) -> list[str]:
    """The prompt of each document of a multiple choice task."""
    made: list[Seen] = []
    monkeypatch.setattr(
        "llm3.evals.harness.language_model.LanguageModel", lambda context: made.append(Seen(context)) or made[-1]
    )
    measured(*arguments, **changes)
    return list(dict.fromkeys(before for before, _ in made[-1].seen))


@functools.cache
def by_hand() -> tuple[np.ndarray, np.ndarray]:
    """Whether the likeliest choice of each document is right: by log p, and by log p per character."""
    right, right_normed = [], []
    for row in CHOICES:
        before = with_bos(f"{row['q']}\nAnswer:")
        whole = [with_bos(f"{row['q']}\nAnswer: {each}") for each in row["choices"]]
        scores = np.array([log_likelihood(before, tokens[len(before) :])[0] for tokens in whole])
        right.append(np.argmax(scores) == row["gold"])
        right_normed.append(np.argmax(scores / [len(each) for each in row["choices"]]) == row["gold"])
    return np.array(right, float), np.array(right_normed, float)


def test_accuracies_and_their_standard_errors_are_those_of_scores_computed_by_hand(folder):
    found, (right, normed) = measured(folder, "picks"), by_hand()
    assert 0 < right.mean() < 1  # so that the statements below say something
    assert found["picks_acc"] == pytest.approx(right.mean()) and found["picks_acc_norm"] == pytest.approx(normed.mean())
    assert found["picks_acc_stderr"] == pytest.approx(right.std(ddof=1) / np.sqrt(len(CHOICES)))
    assert found["picks_items"] == len(CHOICES) and found["truncated"] == 0
    columns = found["predictions"]["picks"]
    assert columns["score"].tolist() == right.tolist() and columns["acc_norm"].tolist() == normed.tolist()
    assert columns["truth"] == [row["choices"][row["gold"]] for row in CHOICES]
    assert [a == b for a, b in zip(columns["truth"], columns["prediction"], strict=True)] == right.astype(bool).tolist()
    before = with_bos(f"{CHOICES[0]['q']}\nAnswer:")
    whole = with_bos(f"{CHOICES[0]['q']}\nAnswer: {columns['truth'][0]}")
    assert columns["nats"][0] == pytest.approx(-log_likelihood(before, whole[len(before) :])[0], rel=1e-5)


def test_a_metric_that_is_no_mean_has_a_standard_error_by_resampling(folder):
    scores = []
    for row in CHOICES:
        before = with_bos(f"{row['q']}\nAnswer:")
        whole = with_bos(f"{row['q']}\nAnswer: {row['choices'][row['gold']]}")
        scores.append(log_likelihood(before, whole[len(before) :])[0])
    found = measured(folder, "guesses")
    assert found["guesses_perplexity"] == pytest.approx(np.exp(-np.mean(scores)), rel=1e-4)
    assert measured(folder, "guesses")["guesses_perplexity_stderr"] == found["guesses_perplexity_stderr"] > 0
    context = context_of(folder, "guesses")
    none = dataclasses.replace(context, options=dataclasses.replace(context.options, bootstrap_iters=0))
    assert harness.evaluate(none)["guesses_perplexity_stderr"] is None


def rolling_by_hand(text: str, length: int) -> float:
    """log p of <bos> and each token after <bos>, in windows whose contexts do not overlap their targets."""
    tokens, total = with_bos(text), 0.0
    for first in range(0, len(tokens), length):
        part = tokens[first : first + length]
        start = TOKENIZER.bos_id if not first else tokens[first - 1]
        if len(part) < length and first:  # the last window is filled with what is before it
            inputs = tokens[len(tokens) - length - 1 : first]
            total += log_likelihood(inputs, part)[0]
        else:
            total += log_likelihood([start], part)[0]
    return total


@pytest.mark.parametrize("length", [LENGTH, 8])
def test_a_text_is_scored_in_windows_in_which_each_token_is_predicted_once(folder, length):
    total = sum(rolling_by_hand(row["text"], length) for row in TEXTS)
    found = measured(folder, "reads", length=length)
    bytes_ = sum(len(row["text"].encode()) for row in TEXTS)
    assert found["reads_bits_per_byte"] == pytest.approx(-total / bytes_ / np.log(2), rel=1e-5)
    assert found["reads_bits_per_byte_stderr"] is None  # lm-eval has none for it


def test_a_continuation_is_scored_after_as_much_of_its_context_as_fits():
    context, tokens = TOKENIZER.encode("Is it so? no " * 9), TOKENIZER.encode("yes Answer")
    items = [Continuation([TOKENIZER.bos_id, *context], tokens), Continuation([TOKENIZER.bos_id], tokens)]
    (cut, _), (short, _) = log_likelihoods(context_of(length=16), items)
    assert cut == pytest.approx(log_likelihood([*context, *tokens][-17 : -len(tokens)], tokens)[0], rel=1e-5)
    assert short == pytest.approx(log_likelihood([TOKENIZER.bos_id], tokens)[0], rel=1e-5)
    greedy = likeliest(with_bos("so"), 5)
    found = log_likelihoods(context_of(), [Continuation(with_bos("so"), each) for each in (greedy, [*greedy[:-1], 0])])
    assert [each for _, each in found] == [True, False]


def test_cut_requests_are_counted(folder):
    assert measured(folder, "picks", length=10)["truncated"] > 0
    with pytest.raises(
        UserError, match=r"a continuation has 5 tokens: expected sequence_length .* at least that, not 4"
    ):
        log = LanguageModel(context_of(length=4))
        log._loglikelihood_tokens([(None, [1], [5, 6, 7, 8, 9])])


def answered(prompts, limits, end=(TOKENIZER.eos_id,), **changes) -> list[str]:
    return answers(dataclasses.replace(context_of(), **changes), prompts, limits, end)


def test_an_answer_is_greedy_up_to_the_first_stop_string_or_its_limit():
    prompts = [with_bos(row["q"]) for row in PROMPTS]
    made = [[*likeliest(prompt, 40), TOKENIZER.eos_id] for prompt in prompts]
    whole = [TOKENIZER.decode(each[: each.index(TOKENIZER.eos_id)]) for each in made]
    assert max(each.index(TOKENIZER.eos_id) for each in made) == 40
    stops = [text[3:5] for text in whole]  # within tokens
    made = answered(prompts, [Answering(40, ["never", stop]) for stop in stops])
    assert made == [text[: text.index(stop)] for text, stop in zip(whole, stops, strict=True)]
    assert answered(prompts, [Answering(40, [])] * 3) == whole  # in two turns of 32 tokens
    COUNTED.clear()
    assert answered(prompts[:1], [Answering(5, [])]) == [TOKENIZER.decode(likeliest(prompts[0], 5))]
    assert COUNTED == {"requests": 1}


def test_an_answer_ends_at_an_end_token_and_at_the_end_of_its_turn():
    prompt = with_bos(PROMPTS[0]["q"])
    made = likeliest(prompt, 40)
    first = next(n for n in range(40) if made[n : n + 2] == made[4:6])
    assert answered([prompt], [Answering(40, [])], made[4:6]) == [TOKENIZER.decode(made[:first])]
    last = next(n for n in range(3, 39) if made[n] not in made[:n] and made[n + 1] != made[n])
    kernel, pair = np.array(PARAMS["lm_head"]["kernel"]), [TOKENIZER.eos_id, made[last]]
    kernel[:, pair] = kernel[:, pair[::-1]]  # <eos> instead of this token
    params = context_of().params | {"lm_head": {"kernel": kernel}}
    found = answered([prompt], [Answering(40, [])], (TOKENIZER.pad_id,), params=params)
    assert found == [TOKENIZER.decode(made[:last])]


def test_a_generated_answer_is_what_the_task_is_scored_on(tmp_path):
    right = TOKENIZER.decode(likeliest(with_bos(PROMPTS[0]["q"]), 12))
    write_tasks(tmp_path, writes={"doc_to_target": f"{{{{ {right!r} if q == {PROMPTS[0]['q']!r} else a }}}}"})
    assert measured(tmp_path, "writes")["writes_exact_match"] == pytest.approx(1 / 3)


def test_few_shot_examples_come_before_the_question_and_are_the_same_each_time(folder, monkeypatch):
    shown = prompts_of(monkeypatch, folder, "shots")
    examples = [f"{row['q']}\nAnswer: {row['choices'][row['gold']]}" for row in CHOICES]
    for prompt, row in zip(shown, CHOICES, strict=True):
        first, second, question = prompt.split("\n\n")
        assert {first, second} <= set(examples) and question == f"{row['q']}\nAnswer:"
    assert prompts_of(monkeypatch, folder, "shots") == shown
    assert [each.count("\n\n") for each in prompts_of(monkeypatch, folder, "picks", num_fewshot=1)] == [1] * 5
    assert [each.count("\n\n") for each in prompts_of(monkeypatch, folder, "none", num_fewshot=1)] == [0] * 5


def test_an_evaluation_of_the_same_tasks_again_gives_the_same_result(folder):
    context = context_of(folder, "shots", "reads")
    one, other = (without_predictions(harness.evaluate(context)) for _ in range(2))
    assert one == other


def test_a_limit_is_a_number_or_a_share_of_the_documents(folder, monkeypatch):
    assert len(prompts_of(monkeypatch, folder, "picks", limit=2)) == 2
    assert len(prompts_of(monkeypatch, folder, "picks", limit=0.5)) == 3


def test_a_chat_template_writes_the_prompt_and_its_special_tokens(folder, monkeypatch):
    template = "{{ bos_token }}" + ADDED
    (prompt,) = prompts_of(monkeypatch, folder, "picks", limit=1, apply_chat_template=True, template=template)
    model = LanguageModel(context_of(template=template, apply_chat_template=True))
    tokens = model.tok_encode(prompt)
    assert tokens[0] == TOKENIZER.bos_id and TOKENIZER.bos_id not in tokens[1:]
    spelled = model.apply_chat_template([{"role": "user", "content": "<|eos|>"}])
    assert TOKENIZER.eos_id not in model.tok_encode(spelled) and "<|eos|>" in TOKENIZER.decode(
        model.tok_encode(spelled)
    )
    assert TOKENIZER.decode(tokens) == f"<user>{CHOICES[0]['q']}\nAnswer:数学\n<assistant>"
    with pytest.raises(UserError, match="the model has no chat template"):
        context_of(folder, "picks", apply_chat_template=True)


def test_a_continuation_within_the_last_token_of_its_context_is_scored_as_that_token():
    model = LanguageModel(context_of())
    text = TOKENIZER.decode([max(range(4, TOKENIZER.vocab_size), key=lambda n: len(TOKENIZER.token_bytes[n]))])
    before, tokens = model._encode_pair(text[:-1], text[-1])
    assert [*before, *tokens] == with_bos(text) and tokens


def test_a_group_with_a_metric_stands_for_its_tasks(folder):
    found = measured(folder, "both")
    assert "both_acc" in found and "picks_acc" not in found
    assert [each["task"] for each in found["tasks"] if each["metric"] == "acc"] == ["picks", "shots", "both"]
    assert found["settings"]["sequence_length"] == LENGTH


def test_a_filter_is_a_part_of_the_name_of_its_metric(folder):
    context = context_of(folder, "filtered", "picks")
    found = harness.evaluate(context)
    assert found["filtered_strict_match_exact_match"] == 0 and found["filtered_strict_match_items"] == 3
    assert set(harness.better(context.prepared)) == {
        "filtered_strict_match_exact_match", "picks_acc", "picks_acc_norm",
    }  # fmt: skip
    assert set(harness.better(context.prepared)) <= set(found)


def test_results_are_plain_finite_numbers_or_none():
    values = [np.float64(0.5), 1, "N/A", None, float("nan"), np.float32("inf")]
    assert [harness.number(value) for value in values] == [0.5, 1.0, None, None, None, None]


def test_scores_do_not_depend_on_the_number_of_devices(folder, eight_devices):
    alone = measured(folder, *EVERY)
    with jax.set_mesh(eight_devices):
        spread = measured(folder, *EVERY, place=lambda tree: place_batch(eight_devices, tree))
    numbers = [{name: value for name, value in each.items() if isinstance(value, float)} for each in (alone, spread)]
    assert len(numbers[0]) > 6 and numbers[1] == pytest.approx(numbers[0], rel=1e-5)


def test_processes_with_other_requests_are_told_so(folder, monkeypatch):
    monkeypatch.setattr(processes, "broadcast_from_first", lambda make: make()[::-1])
    with pytest.raises(UserError, match="process 0 has other requests than process 0: expected the same files"):
        measured(folder, "picks")


def test_nothing_is_printed_and_no_process_is_started(folder, capfd, monkeypatch):
    monkeypatch.setattr("subprocess.Popen", lambda *_, **__: pytest.fail("a process"))
    monkeypatch.setattr("multiprocessing.Pool", lambda *_, **__: pytest.fail("a pool"))
    measured(folder, *EVERY)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("tasks", "changes", "message"),
    [
        ((), {}, r"^tasks: expected at least one name"),
        (("pick",), {}, r"^tasks: 'pick': no such task; did you mean 'picks'.*has .*, and .* has .*both"),
        (("samples",), {}, r"^tasks: 'samples' samples its answers"),
        (("long",), {}, r"^tasks: 'long' generates up to 256 tokens: expected sequence_length above that, not 64"),
        (("lost",), {}, r"^tasks: lost cannot be loaded: FileNotFoundError"),
        (("unsafe",), {}, r"^tasks: 'unsafe' runs code .* confirm_run_unsafe_code"),
        (("picks",), {"include_path": "no/folder"}, r"^include_path='no/folder': no such folder"),
        (("picks",), {"include_path": ""}, r"^tasks: 'picks': no such task; .*your own need include_path"),
    ],
)
def test_what_cannot_be_evaluated_is_refused_by_name(folder, monkeypatch, tasks, changes, message):
    # lm-eval's own names, of which there are thousands in files that take seconds to read
    monkeypatch.setattr("lm_eval.tasks.manager.__file__", str(folder / "manager.py"))
    if changes.get("include_path") == "":
        monkeypatch.setattr("lm_eval.tasks.manager.__file__", "/nowhere/manager.py")
    options = harness.Options(tasks=tasks, **{"include_path": str(folder)} | changes)
    with pytest.raises(UserError, match=message):
        harness.prepare(context_of().config, options, "")
    if "long" in tasks:
        harness.prepare(context_of().config, dataclasses.replace(options, max_gen_toks=60), "")


@pytest.mark.parametrize("field", [{"limit": -1}, {"num_fewshot": -1}, {"max_gen_toks": 0}, {"tasks": [1]}])
def test_an_option_out_of_range_is_refused(field):
    with pytest.raises(UserError, match=f"^{next(iter(field))}="):
        harness.Options(**field)
