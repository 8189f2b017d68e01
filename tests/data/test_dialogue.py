"""In a tokenized conversation, the answer mask covers exactly the answers and their ends; windows keep it intact."""

import dataclasses
import functools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm3.config.data_schema import SourceConfig
from llm3.data import tokenizer
from llm3.data.chat_templates import EXAMPLE, load_template, read_template, with_bos
from llm3.data.formats import BadRow, Document, choice, dialogue
from llm3.data.template_rendering import GUARD, OWN_NAMES, render
from llm3.data.tokenizer import SPECIALS
from llm3.data.windows.dialogue import WindowTable
from llm3.errors import UserError, say
from tests.helpers.tiny_answers import DIALOGUE, TALK, AnswerCache, encoded, questions, runs
from tests.helpers.tiny_cache import BYTES

EOS = BYTES.eos_id
CHATML = """{% for message in messages %}
<|im_start|>{{ message['role'] }}
{% if message['role'] == 'assistant' %}
{% generation %}{{ message['content'] }}<|im_end|>{% endgeneration %}

{% else %}
{{ message['content'] }}<|im_end|>
{% endif %}
{% endfor %}
{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
ZEPHYR = """{% for m in messages %}{{ '<|' + m['role'] + '|>\\n' }}{% if m['role'] == 'assistant' %}\
{% generation %}{{ m['content'] + eos_token }}{% endgeneration %}{{ '\\n' }}{% else %}\
{{ m['content'] + eos_token + '\\n' }}{% endif %}{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\\n' }}\
{% endif %}{% endfor %}"""
LLAMA = """{{ bos_token }}{% for message in messages %}\
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}\
{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] | trim + ' [/INST]' }}{% else %}\
{% generation %}{{ ' ' + message['content'] | trim + ' ' + eos_token }}{% endgeneration %}{% endif %}{% endfor %}"""
PLAIN = "{% for m in messages %}{{ m.role + ': ' + m.content + '\\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
TEMPLATES = {"chatml": CHATML, "zephyr": ZEPHYR, "llama": LLAMA, "plain": PLAIN}
TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12).filter(str.strip)
SAFE = TEXT.filter(lambda text: not any("\U0010ff00" < each < "\U0010ff04" for each in text))


def talk(*contents: str, system: str = "") -> dict:
    turns = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]
    return {"messages": [{"role": "system", "content": system}] * bool(system) + turns}


@functools.cache
def trained():
    return tokenizer.train(["question answer: yes no <|eos|> ünïcödé 漢字 🙂 "] * 5, 330)


@settings(max_examples=150, deadline=None)
@given(st.lists(TEXT, min_size=2, max_size=6).filter(lambda x: len(x) % 2 == 0), st.one_of(st.just(""), TEXT))
def test_without_a_template_the_answer_mask_covers_each_answer_and_its_eos_and_no_byte_is_lost(contents, system):
    tok, found = trained(), encoded(talk(*contents, system=system), TALK, trained())
    assert [tok.decode(run) for run in runs(found)] == contents[1::2]
    assert all(run[-1] == EOS and run.count(EOS) == 1 for run in runs(found))
    head = f"{system}\n\n" if system else ""
    assert tok.decode(found.tokens) == head + "".join(contents)
    assert found.tokens[0] == tok.bos_id and found.tokens.tolist().count(tok.bos_id) == 1
    assert found.text_bytes == len("".join([system, *contents]).encode())


@settings(max_examples=40, deadline=None)
@given(st.lists(SAFE, min_size=2, max_size=6).filter(lambda x: len(x) % 2 == 0), st.sampled_from(sorted(TEMPLATES)))
def test_with_a_template_there_is_one_bos_and_the_answer_mask_covers_one_end_per_answer(contents, name):
    found = encoded(talk(*contents), TALK, trained(), TEMPLATES[name])
    assert found.tokens[0] == trained().bos_id and found.tokens.tolist().count(trained().bos_id) == 1
    end = "<|im_end|>" if name == "chatml" else ""
    answers = [trained().decode(run) for run in runs(found)]
    kept = [f" {each.strip()} " if name == "llama" else each for each in contents[1::2]]
    assert answers == [each + end for each in kept]
    if name != "chatml":
        assert [run[-1] for run in runs(found)] == [EOS] * len(answers)


@pytest.mark.parametrize("name", ["chatml", "zephyr", "llama"])
@pytest.mark.parametrize("contents", [("Why?", "So."), (" a b ", "c\nd", "漢字?", "🙂 \"x\" <&> 'y'", "e", "f ")])
def test_tokens_and_answer_mask_of_a_template_equal_those_of_transformers(name, contents):
    transformers = pytest.importorskip("transformers")
    named = dict(zip(("pad_token", "bos_token", "eos_token"), SPECIALS, strict=False))
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=_backend(), **named)
    theirs.chat_template = TEMPLATES[name]
    messages = talk(*contents)["messages"]
    found = encoded({"messages": messages}, TALK, BYTES, TEMPLATES[name])
    made = theirs.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, add_special_tokens=False
    )
    ids, mask = np.array(made["input_ids"]), np.array(made["assistant_masks"], bool)
    if ids[0] != BYTES.bos_id:
        ids, mask = np.insert(ids, 0, BYTES.bos_id), np.insert(mask, 0, False)
    size = len(found.tokens)  # transformers keeps the white space after the last end
    assert found.tokens.tolist() == ids[:size].tolist() and not BYTES.decode(ids[size:]).strip()
    assert found.answer_mask.tolist() == mask[:size].tolist()


def _backend():
    import tokenizers

    return tokenizers.Tokenizer.from_str(BYTES._json)


def test_white_space_after_an_end_is_no_target_and_begins_the_next_prompt():
    found = encoded(talk("a", "b", "c", "d"), TALK, BYTES, ZEPHYR)
    assert runs(found) == [[*BYTES.encode("b"), EOS], [*BYTES.encode("d"), EOS]]
    assert BYTES.decode(found.tokens) == "<|user|>\na\n<|assistant|>\nb\n<|user|>\nc\n<|assistant|>\nd"


def test_a_template_without_an_end_of_turn_gets_eos_after_each_answer():
    found = encoded(talk("a", "b", "c", "d "), TALK, BYTES, PLAIN)
    assert runs(found) == [[*BYTES.encode("b"), EOS], [*BYTES.encode("d "), EOS]]
    assert found.note is None


def test_text_that_a_template_puts_before_an_answer_is_a_target_and_noted():
    template = PLAIN.replace(
        "m.role + ': ' + m.content", "m.role + ': ' + ('<think></think> ' if m.role == 'assistant' else '') + m.content"
    )
    found = encoded(talk("a", "b"), TALK, BYTES, template)
    assert runs(found) == [[*BYTES.encode("<think></think> b"), EOS]] and found.note == {"lead": "<think></think>"}


def test_an_end_other_than_eos_is_noted():
    found = encoded(talk("a", "b"), TALK, BYTES, CHATML)
    assert found.note == {"end": BYTES.encode("<|im_end|>")}


def test_a_template_may_spell_the_special_tokens_and_a_content_may_not():
    template = (
        "<|bos|>{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}<|eos|>{% endif %}{% endfor %}"
    )
    found = encoded(talk("<|bos|>", "x<|eos|>y"), TALK, BYTES, template)
    prompt, answer = BYTES.encode("<|bos|>"), BYTES.encode("x<|eos|>y")
    assert found.tokens.tolist() == [BYTES.bos_id, *prompt, *answer, EOS]
    with pytest.raises(BadRow, match=r"stand for special tokens"):
        encoded(talk("a", f"b{GUARD}"), TALK, BYTES, template)


@pytest.mark.parametrize(
    ("template", "turns", "reason"),
    [
        (LLAMA, talk("a", "b", system="s"), "fails: TemplateError: roles must alternate"),
        (
            "{% for m in messages %}{{ m.content }}{% if loop.last %}!{% else %}?{% endif %}{% endfor %}",
            talk("a", "b"),
            "renders the turns before an answer differently",
        ),
        ("{% for m in messages %}{{ m.content | upper }}{% endfor %}", talk("a", "b"), "changes an answer"),
        ("{% for m in messages %}{{ m.content.nothing.at_all }}{% endfor %}", talk("a", "b"), "fails: UndefinedError"),
        ("{% for m in messages %}{{ m.content.__class__.mro() }}{% endfor %}", talk("a", "b"), "fails: SecurityError"),
    ],
)
def test_a_row_that_a_template_cannot_render_is_bad(template, turns, reason):
    with pytest.raises(BadRow, match=reason):
        encoded(turns, TALK, BYTES, template)


def test_a_template_is_given_as_source_as_a_file_or_in_a_tokenizer_config(tmp_path):
    (tmp_path / "chat.jinja").write_text(ZEPHYR)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": ZEPHYR}))
    assert load_template("") == "" and load_template(ZEPHYR) == ZEPHYR
    for name in ("chat.jinja", "tokenizer_config.json"):
        assert load_template(str(tmp_path / name)) == ZEPHYR


def test_a_run_keeps_its_template_and_refuses_another(tmp_path, monkeypatch):
    workdir, file = tmp_path / "run", tmp_path / "chat.jinja"
    workdir.mkdir()
    file.write_text(ZEPHYR)
    assert read_template("", workdir) == "" and read_template(str(file), workdir) == ZEPHYR
    (workdir / "chat_template.jinja").write_text(ZEPHYR)
    assert read_template(str(file), workdir) == ZEPHYR
    file.write_text(CHATML)
    monkeypatch.setenv("HOME", str(tmp_path))
    for other in (str(file), "~/chat.jinja", PLAIN, ""):
        with pytest.raises(UserError, match="is not the chat template that this run began with: restore it from"):
            read_template(other, workdir)
    file.unlink()
    assert read_template(str(file), workdir) == ZEPHYR


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_an_exported_template_begins_with_bos_once(template):
    (rendered,) = {render(with_bos(each), EXAMPLE, OWN_NAMES) for each in (template, with_bos(template))}
    assert rendered.startswith("<|bos|>") and rendered.count("<|bos|>") == 1


@pytest.mark.parametrize(
    ("given_template", "expected"),
    [
        ("nowhere.jinja", r"chat_template='nowhere.jinja': neither a file nor a jinja template"),
        ("{% for m in messages %}\n\n{{ m.content }", r"chat_template: line 3: "),
        ("{% for m in messages %}{{ m.content | upper }}{% endfor %}", r"with a question and its answer: .*changes an"),
        ("{{ raise_exception('no') }}", r"with a question and its answer: the chat template fails: TemplateError: no"),
    ],
)
def test_an_unusable_template_is_refused_when_it_is_loaded(given_template, expected):
    with pytest.raises(UserError, match=expected):
        load_template(given_template)


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ("hello", "messages is not a list of {role, content}"),
        (["hello"], "messages is not a list of {role, content}"),
        ([{"role": "user"}], "no field 'content'"),
        ([{"role": "user", "content": None}], "content is null"),
        ([{"role": "user", "content": 3}], "a content of messages is of type int, not a text"),
        ([{"role": "user", "content": " "}], "a content of messages is empty"),
        ([{"role": "user", "content": "\ud800"}], "a content of messages is not valid Unicode"),
        ([{"role": "tool", "content": "x"}], "messages: a role is not one of system, user, assistant"),
        ([{"from": "human", "value": 3}], "a content of messages is of type int, not a text"),
        ([{"from": "observation", "value": "x"}], "messages: a role is not one of system, user, assistant"),
        ([{"role": "user", "content": []}], "messages: a part of a content is not a text"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "messages: a part of a content is not a text"),
        ([{"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}], "messages: a turn calls a tool"),
        ([{"role": "assistant", "content": "x", "function_call": {"name": "f"}}], "messages: a turn calls a tool"),
        ([], "messages: no turn is the assistant's"),
        (talk("a")["messages"], "messages: no turn is the assistant's"),
        (talk("a", "b", "c")["messages"], "messages: the last turn is not the assistant's"),
        (talk("a", "b")["messages"][1:], "messages: user and assistant do not alternate"),
        (talk("a", "b")["messages"] * 2 + talk("", "c")["messages"][1:], "messages: user and assistant do not"),
        (talk("a", "b")["messages"] + talk("a", "b", system="s")["messages"], "messages: a system prompt is not at"),
    ],
)
def test_turns_of_the_wrong_shape_are_bad_rows_by_reason(messages, reason):
    with pytest.raises(BadRow) as raised:
        dialogue.read_row({"messages": messages}, TALK)
    assert str(raised.value).startswith(reason)


@pytest.mark.parametrize(
    "messages",
    [
        [{"from": "system", "value": "s"}, {"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}],
        [{"from": "developer", "value": "s"}, {"from": "Human", "value": "a"}, {"from": "GPT", "value": "b"}],
        [{"from": role, "value": text, "role": None} for role, text in (("system", "s"), ("user", "a"), ("bot", "b"))],
        [
            {"role": "system", "content": [{"type": "text", "text": "s"}]},
            {"role": "user", "content": ["a"], "tool_calls": None},
            {"role": "assistant", "content": [{"type": "text", "text": "b"}], "tool_calls": []},
        ],
        json.dumps(talk("a", "b", system="s")["messages"]),
    ],
)
def test_sharegpt_parts_of_contents_and_json_are_read_as_turns(messages):
    turns = [["system", "s"], ["user", "a"], ["assistant", "b"]]
    assert dialogue.read_row({"messages": messages}, TALK) == {"turns": turns, "references": ["b"]}


def test_an_empty_system_prompt_is_dropped():
    assert dialogue.read_row({"messages": [{"role": "system", "content": ""}, *talk("a", "b")["messages"]]}, TALK) == {
        "turns": [["user", "a"], ["assistant", "b"]],
        "references": ["b"],
    }


def test_the_first_of_several_answers_is_the_target_and_all_are_references():
    found = encoded({"question": "q", "answer": ["first", "second"]}, DIALOGUE, BYTES)
    assert runs(found) == [[*BYTES.encode("first"), EOS]] and found.note == {"references": ["first", "second"]}
    for answer, reason in (([], "answer is empty"), (["a", 3], "answer is of type int"), (None, "answer is null")):
        with pytest.raises(BadRow, match=reason):
            dialogue.read_row({"question": "q", "answer": answer}, DIALOGUE)


def test_prompt_and_answer_may_be_templates_over_columns():
    source = SourceConfig("x", prompt="{q}\n{context}\n", answer="It is {label}.")
    found = encoded({"q": "why", "context": "because", "label": "so"}, source, BYTES)
    assert BYTES.decode(found.tokens) == "why\nbecause\nIt is so." and runs(found) == [
        [*BYTES.encode("It is so."), EOS]
    ]


CHOICES = SourceConfig("x", prompt="q", choices="options", answer="answer")


@pytest.mark.parametrize(
    ("options", "answer", "correct"),
    [
        (["no", "yes"], "yes", 1),
        (["no", "yes"], True, 1),
        (["a", "b", "c"], 2, 2),
        (["a", "b", "c"], "2", 2),
        (["2", "1", "0"], "2", 0),
        (["w", "x", "yes", "no"], "B", None),
        (["up", "down", "left", "right"], "B", 1),
        (["up", "down", "left", "right"], "(d).", None),
        (["up", "down", "left", "right"], "(d)", 3),
        (["up", "down"], "C", None),
        (["A", "C", "B"], "B", 2),
        ({"text": ["3", "1"], "label": ["1", "3"]}, "3", 1),
        ({"text": ["up", "down"], "label": ["A", "B"]}, "B", 1),
        ({"text": ["up", "down"], "label": [1, 2]}, 2, 1),
        ([{"text": "up", "label": "A"}, {"text": "down", "label": "B"}], "B", 1),
        ({"text": ["up", "down"], "label": ["A", "B"]}, "down", 1),
        ({"text": ["up", "down"], "label": ["A", "B"]}, 1, None),
        ('["up", "down"]', "down", 1),
    ],
)
def test_the_correct_choice_is_named_by_its_text_or_else_by_its_index(options, answer, correct):
    row = {"q": "?", "options": options, "answer": answer}
    if correct is not None:
        assert choice.read_row(row, CHOICES)["correct"] == correct
    else:
        with pytest.raises(BadRow, match="answer is none of the choices"):
            choice.read_row(row, CHOICES)


@pytest.mark.parametrize(
    ("options", "answer", "reason"),
    [
        (["a", "b"], "c", "answer is none of the choices"),
        (["a", "b"], 2, "answer is not the index of a choice"),
        (["a", "b"], "-1", "answer is none of the choices"),
        (["a", "b"], 0.5, "answer is of type float"),
        (["a"], 0, "options has fewer than 2 choices"),
        (["a", "a"], 0, "options has the same choice twice"),
        (["a", None], 0, "one of options is null"),
        (["a", 1], 0, "one of options is of type int"),
        ("ab", 0, "options is of type str, not a list"),
        ({"text": ["a", "b"], "label": ["A"]}, "A", "options has not one label for each text"),
        ({"a": 1}, 0, "options is of type dict, not a list"),
    ],
)
def test_choices_that_cannot_be_asked_are_bad_rows_by_reason(options, answer, reason):
    with pytest.raises(BadRow, match=reason):
        choice.read_row({"q": "?", "options": options, "answer": answer}, CHOICES)


def test_choices_may_be_templates_over_columns():
    source = SourceConfig("x", prompt="q", choices=["{A}", "{B}", "none"], answer="answer")
    row = {"q": "?", "A": "up", "B": "down", "answer": "B"}
    assert choice.read_row(row, source) == {"prompt": "?", "choices": ["up", "down", "none"], "correct": 1}


def numbered(*answers, choices=4):
    return [{"q": "?", "options": [f"choice {i}" for i in range(choices)], "answer": each} for each in answers]


@pytest.mark.parametrize(
    ("rows", "base"),
    [
        (numbered(1, 3, 4, 2), 1),
        (numbered("1", "4"), 1),
        (numbered(3, 2, 0), 0),
        (numbered(1, 2) + numbered(2, choices=2), 1),
        (numbered("B", "choice 2", True, None), None),
        (numbered(1, 2, 3), UserError),
    ],
)
def test_numbers_of_choices_are_counted_from_0_or_1_as_their_rows_tell(rows, base, capsys):
    if base is UserError:
        with pytest.raises(UserError, match=r"source s: answer: numbers from 1 to 3, .*answer_base=0 or 1"):
            choice.resolve(rows, CHOICES, "source s")
        rows, base = rows[:1], 1
        source = choice.resolve(rows, dataclasses.replace(CHOICES, answer_base=1), "source s")
    else:
        say.cache_clear()
        source = choice.resolve(rows, CHOICES, "source s")
        said = "" if base is None else f"source s: answer: choices are counted from {base}\n"
        assert capsys.readouterr().err == said
    assert source.answer_base == base
    if base is not None:
        assert [choice.read_row(row, source)["correct"] for row in rows] == [int(row["answer"]) - base for row in rows]


YES_NO = SourceConfig("x", prompt="{q}\nAnswer: ", choices=["yes", "no"], answer="label")


SUMS = [["0", "1", "3", "2"], ["up", "down", "left", "right"], ["5", "6", "7", "8"]]


@pytest.mark.parametrize(
    ("answers", "correct"),
    [
        (["3", "0", "2"], [3, 0, 2]),  # "3" is the text of a choice too, but "0" is a number only
        ([3, 0, 2], [3, 0, 2]),
        (["3", "4", "2"], [2, 3, 1]),  # counted from 1
        (["3", "down", "8"], [2, 1, 3]),  # all are texts
        (["2", "0", "8"], UserError),  # "8" is a text only
        (["3", "left", 1], UserError),
    ],
)
def test_a_number_that_is_also_the_text_of_a_choice_is_read_as_the_other_answers_are(answers, correct):
    rows = [{"q": "?", "options": options, "answer": each} for options, each in zip(SUMS, answers, strict=True)]
    if correct is UserError:
        with pytest.raises(UserError, match=r"numbers from . to ., but other answers are texts of choices: expected"):
            choice.resolve(rows, CHOICES, "source s")
    else:
        source = choice.resolve(rows, CHOICES, "source s")
        assert [choice.read_row(row, source)["correct"] for row in rows] == correct


def test_numbers_that_begin_at_0_and_end_at_the_number_of_choices_are_refused():
    with pytest.raises(UserError, match=r"numbers from 0 to 4, both 0 and the number of choices among them: expected"):
        choice.resolve(numbered(4, 1, 2, 0), CHOICES, "source s")


def test_a_choice_is_encoded_jointly_with_its_prompt_and_masked_from_the_first_token_with_a_byte_of_it():
    tok = tokenizer.train(["Answer: yes Answer: no Is it so "] * 9, 330)
    found = encoded({"q": "Is it so", "label": "yes"}, YES_NO, tok)
    assert found.tokens.tolist() == [tok.bos_id, *tok.encode("Is it so\nAnswer: yes"), EOS]
    assert [tok.decode(run) for run in runs(found)] == [" yes"]
    assert found.note == {"prompt": [tok.bos_id, "Is it so\nAnswer: "], "choices": ["yes", "no"], "correct": 0}


@settings(max_examples=100, deadline=None)
@given(TEXT, TEXT)
def test_the_answer_mask_covers_exactly_the_tokens_with_a_byte_of_the_choice(prompt, right):
    row = {"q": prompt, "options": [right, right + "x"], "answer": 0}
    found, tok = encoded(row, CHOICES, trained()), trained()
    sizes = tok.byte_lengths[found.tokens]
    behind = np.cumsum(sizes)  # bytes up to and with each token
    assert found.answer_mask[:-1].tolist() == (behind > len(prompt.encode()))[:-1].tolist() and found.answer_mask[-1]
    assert tok.decode(found.tokens) == prompt + right


def test_a_choice_goes_through_the_template():
    found = encoded({"q": " q ", "options": [" a", "b"], "answer": 0}, CHOICES, BYTES, LLAMA)
    assert BYTES.decode(found.tokens) == "[INST] q [/INST] a "
    assert runs(found) == [[*BYTES.encode("a "), EOS]] and found.note["choices"] == ["a", "b"]


def test_a_tokenizer_is_trained_on_all_texts_of_a_row():
    assert dialogue.texts(dialogue.read_row(talk("a", "b", system="s"), TALK)) == ["s", "a", "b"]
    row = {"q": "q", "options": ["x", "y"], "answer": 0}
    assert choice.texts(choice.read_row(row, CHOICES)) == ["q", "x", "y"]


def test_windows_hold_whole_documents_with_targets_exactly_at_their_answer_masks():
    cache = questions([("what", "that"), ("who", "she"), ("a longer one?", "no"), ("x", "y")], BYTES)
    table = WindowTable(cache, 24)
    seen = []
    for number in range(len(table)):
        window, at = table[number], 0
        for segment, document, (first, stop) in table.documents_of(number):
            tokens, size = cache.document(document), stop - first - 1
            place = slice(at, at + size)
            assert window.tokens[place].tolist() == tokens[:-1].tolist()
            assert window.targets[place].tolist() == tokens[1:].tolist()
            assert window.weights[place].tolist() == cache.answer_mask(document)[1:].tolist()
            assert window.positions[place].tolist() == list(range(size))
            assert (window.segments[place] == segment).all()
            at += size
            seen.append(document)
        assert not window.weights[at:].any() and not window.segments[at:].any()
    assert sorted(seen) == [0, 1, 2, 3] and len(table) == 2
    assert (table.truncated, table.dropped) == (0, 0)
    assert table.waste == pytest.approx(1 - (sum(len(cache.document(i)) for i in range(4)) - 4) / 48)


def test_a_long_document_keeps_its_first_tokens_and_one_that_loses_all_targets_is_dropped_and_counted():
    cache = questions([("p" * 9, "a" * 9), ("p" * 12, "a"), ("p", "a"), ("p" * 11, "a")], BYTES)
    table = WindowTable(cache, 12)
    assert (table.truncated, table.dropped) == (3, 1)
    kept = sorted(each for number in range(len(table)) for each in table.documents_of(number))
    assert [document for _, document, _ in sorted(kept, key=lambda each: each[1])] == [0, 2, 3]
    windows = {document: table[number] for number in range(len(table)) for _, document, _ in table.documents_of(number)}
    assert windows[0].weights.tolist() == [0] * 9 + [1] * 3 and windows[0].tokens[0] == BYTES.bos_id
    assert windows[3].weights.tolist() == [0] * 11 + [1] and windows[3].targets[11] == BYTES.encode("a")[0]


def test_all_tokens_are_targets_in_documents_without_an_answer_mask():
    cache = AnswerCache([Document(np.arange(1, 9, dtype=np.int32), None, 8)])
    window = WindowTable(cache, 10)[0]
    assert window.weights.tolist() == [1] * 7 + [0] * 3
