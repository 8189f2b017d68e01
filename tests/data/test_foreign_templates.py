"""Conversations in the templates of others: the tokens and answer masks are those of transformers."""

import tempfile
from pathlib import Path

import numpy as np
import pytest

from llm3.data.chat_templates import GUARD, end_of_turn, is_written, load_template, question, split_answers, written
from llm3.data.encoding import encode_runs
from llm3.data.formats import BadRow
from llm3.data.tokenizer import Tokenizer
from tests.helpers import tiny_foreign
from tests.helpers.tiny_answers import DIALOGUE, TALK, encoded, runs
from tests.helpers.tiny_foreign import CHATML, GEMMA, LLAMA2, LLAMA3, foreign

# a token has characters of the prompt and of the answer
SPACED = """{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}\
{% generation %}{{ m.content }}{% endgeneration %}{{ '.' + eos_token }}\
{% else %}{{ m.content + ' A: ' }}{% endif %}{% endfor %}"""
TEMPLATES = {"qwen": CHATML, "llama3": LLAMA3, "gemma": GEMMA, "llama2": LLAMA2}
# Qwen 3: only the last answer has a thought; the header of each turn is made of parts
QWEN3 = """{%- for m in messages %}{{- '<|im_' + 'start|>' + m.role + '\\n' }}
{%- if m.role == 'assistant' and loop.last %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{{- m.content + '<|im_end|>\\n' }}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""
TALKS = [
    ("Is it so?", "It is so."),
    (" the fox ", "yes", "漢字 naïve?", "no, the dog\nand the cat", "🙂 <b>'x'", "maybe"),
    ("the <think> x </think>", "the <tool_call>"),
]


def talk(*contents: str, system: str = "") -> dict:
    turns = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]
    return {"messages": [{"role": "system", "content": system}] * bool(system) + turns}


@pytest.mark.parametrize("contents", TALKS)
@pytest.mark.parametrize("system", ["", "Be brief."])
@pytest.mark.parametrize("kind", TEMPLATES)
def test_tokens_and_answer_masks_equal_those_of_transformers(kind, contents, system):
    theirs = transformers_tokenizer(kind)
    messages = talk(*contents, system=system)["messages"]
    made = theirs.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, chat_template=TEMPLATES[kind]
    )
    found = encoded({"messages": messages}, TALK, foreign(kind), TEMPLATES[kind])
    size = len(found.tokens)  # transformers keeps the white space after the last end
    assert found.tokens.tolist() == made["input_ids"][:size]
    assert not foreign(kind).decode(made["input_ids"][size:]).strip()
    assert found.answer_mask.tolist() == [bool(each) for each in made["assistant_masks"][:size]]
    asked = question(contents[0], TEMPLATES[kind], foreign(kind))
    prompt = theirs.apply_chat_template(messages[-len(contents) :][:1], add_generation_prompt=True, return_dict=False)
    assert foreign(kind).encode_spans(asked.before, joint=True).ids == prompt


def test_a_token_with_a_character_of_an_answer_belongs_to_it_as_in_transformers():
    found, messages = foreign("llama3"), talk("the fox?", "the dog")["messages"]
    made = transformers_tokenizer("llama3").apply_chat_template(
        messages, return_dict=True, return_assistant_tokens_mask=True, chat_template=SPACED
    )
    answers = split_answers([(m["role"], m["content"]) for m in messages], SPACED, found)
    [(before, lead, text, end)] = answers
    tokens, mask = encode_runs([(before, False), ([*lead, text], True), (end[:-1], False)], found, joint=True)
    assert tokens.tolist() == made["input_ids"][:-1]
    assert mask.tolist() == [bool(each) for each in made["assistant_masks"][:-1]]
    assert found.decode(tokens[mask]).startswith(" the dog"), "the space is the prompt's"


def transformers_tokenizer(kind):
    transformers = pytest.importorskip("transformers")
    found = foreign(kind)
    named = {"bos": found.bos_id, "eos": found.eos_id, "pad": found.pad_id}
    with tempfile.TemporaryDirectory() as folder:
        file = tiny_foreign.KINDS[kind](Path(folder)) / "tokenizer.json"
        made = transformers.PreTrainedTokenizerFast(
            tokenizer_file=str(file),
            **{f"{name}_token": found.tokens[number] for name, number in named.items() if number is not None},
        )
    made.chat_template = TEMPLATES[kind]
    return made


@pytest.mark.parametrize("kind", TEMPLATES)
def test_what_a_template_writes_are_special_tokens_and_what_a_message_spells_is_text(kind):
    found, end = foreign(kind), foreign(kind).end_ids
    plain = split_answers([("user", "the fox"), ("assistant", "yes")], TEMPLATES[kind], found)
    spelled = "".join(found.specials)
    row = encoded(talk(spelled, f"the {spelled} fox"), TALK, found, TEMPLATES[kind])
    special = [each for each in [*plain[0].before, *plain[0].end] if isinstance(each, int)]
    assert [each for each in row.tokens.tolist() if each in found.specials.values()] == special
    (answer,) = runs(row)
    assert found.decode(answer).strip() == f"the {spelled} fox" and answer[-1] in end
    if kind != "qwen":
        assert row.tokens[0] == found.bos_id and row.tokens.tolist().count(found.bos_id) == 1


@pytest.mark.parametrize(("before", "after"), [("<|im_", "end|>"), ("<|im_end|", ">x"), ("a<", "|im_end|>")])
def test_two_messages_together_spell_no_special_token(before, after):
    template = "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}<|im_end|>{% endif %}{% endfor %}"
    messages = [dict(role="system", content=before), *talk(after, "yes")["messages"]]
    found = encoded({"messages": messages}, TALK, foreign("qwen"), template)
    assert found.tokens.tolist().count(foreign("qwen").eos_id) == 1
    assert foreign("qwen").decode(found.tokens) == f"{before}{after}yes"


def test_a_template_that_treats_the_last_answer_apart_is_read_turn_by_turn():
    found = foreign("qwen")
    row = encoded(talk("the fox", "yes", "the dog", "no"), TALK, found, QWEN3)
    thought = found.encode("<think>\n\n</think>\n\n")
    assert runs(row) == [[*found.encode("yes"), found.eos_id], [*thought, *found.encode("no"), found.eos_id]]
    assert row.note == {"lead": "<think>\n\n</think>"}


def test_templates_of_others_name_all_special_tokens_and_have_no_bos_of_their_own():
    names = "{{ pad_token + eos_token + mask_token }}{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"
    found = foreign("gemma")
    (answer,) = split_answers([("user", "the"), ("assistant", "fox")], names, found)
    assert answer.before == [found.pad_id, found.eos_id, found.mask_id, found.bos_id, "the"]
    assert split_answers([("user", "the"), ("assistant", "fox")], "", foreign("qwen"))[0].before == ["the"]


@pytest.mark.parametrize("kind", TEMPLATES)
def test_a_prompt_that_is_written_with_the_template_is_continued_with_its_special_tokens(kind):
    found, template = foreign(kind), TEMPLATES[kind]
    asked = question("the fox", template, found)
    text = "".join(each if isinstance(each, str) else found.tokens[each] for each in asked.before)
    assert is_written(text, template, found) and written(text, found) == asked.before
    assert not is_written("I want an assistant", template, found) and not is_written("the model\n", template, found)
    assert end_of_turn(template, found)[-1] == (found.end_ids[1] if kind == "gemma" else found.eos_id)


@pytest.mark.parametrize("date", ["strftime_now('%d')", "strftime_now('%d') if strftime_now is defined else '26'"])
def test_a_date_is_the_same_on_any_day(date):
    template = "{{ " + date + " }}{% for m in messages %}{{ m.content }}{% endfor %}"
    (answer,) = split_answers([("user", "the"), ("assistant", "fox")], template, foreign("qwen"))
    assert answer.before == ["26the"]


def test_the_template_of_a_folder_comes_from_its_file_or_its_config(tmp_path):
    folder = tiny_foreign.qwen(tmp_path)
    assert Tokenizer.load(folder).chat_template == load_template(str(folder / "tokenizer_config.json")) == CHATML
    (folder / "chat_template.jinja").write_text(QWEN3)
    assert Tokenizer.load(folder).chat_template == QWEN3
    assert Tokenizer.load(folder).files()["chat_template.jinja"] == QWEN3


def test_a_text_with_a_reserved_character_is_a_bad_row():
    with pytest.raises(BadRow, match="stand for special tokens"):
        encoded(talk("a", f"b{GUARD}"), TALK, foreign("qwen"), CHATML)


def test_without_a_template_prompt_and_answer_are_encoded_apart():
    found = foreign("gemma")
    row = encoded({"question": "the fox ", "answer": "yes"}, DIALOGUE, found)
    np.testing.assert_array_equal(
        row.tokens, [found.bos_id, *found.encode("the fox "), *found.encode("yes"), found.eos_id]
    )
    assert runs(row) == [[*found.encode("yes"), found.eos_id]]
