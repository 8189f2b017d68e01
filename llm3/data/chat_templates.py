"""Chat templates turn conversations into text. They are jinja sources, as in `chat_template` of a tokenizer's config.

A template gets the names that `transformers` defines: messages, add_generation_prompt, bos_token, eos_token, tools and
documents (both None), raise_exception and tojson. `{% generation %}` marks are ignored. The current time is not
available, so that a row is the same text on any day.
"""

import functools
import hashlib
import itertools
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

from llm3.data.tokenizer import SPECIALS, Tokenizer
from llm3.errors import UserError
from llm3.files import CHAT_TEMPLATE, local_path

Turns = Sequence[tuple[str, str]]  # (role, content)
Pieces = list[str | int]  # texts, and special tokens by id

# Characters of private use that stand for special tokens, and for an answer, while a template is rendered.
BOS, EOS, ANSWER = "\U0010ff01", "\U0010ff02", "\U0010ff03"
SENTINELS = re.compile(f"([{BOS}{EOS}{ANSWER}])")
EXAMPLE = (("user", "Question?"), ("assistant", "Answer."))


class TemplateError(Exception):
    """A conversation that a template cannot render. Errors of one kind have the same text."""


class Answer(NamedTuple):
    """One answer of a conversation.

    before: the prompt, from the end of the previous answer. lead: what the template itself puts at the start of the
    answer, usually nothing. text: the answer. end: the end of the turn.
    """

    before: Pieces
    lead: Pieces
    text: str
    end: Pieces


def load_template(text_or_path: str) -> str:
    """The source of a template, given as source (with a jinja block) or as the name of a file.

    A JSON file is read as a tokenizer's config. Raises UserError for a file that cannot be read, a syntax error (with
    its line), and a template that `split_answers` cannot use for a question and its answer.
    """
    where, source = "tokenizer.chat_template", text_or_path
    if text_or_path and not _is_source(text_or_path):
        where = f"{where}={text_or_path!r}"
        try:
            source = local_path(text_or_path, "tokenizer.chat_template").read_text(encoding="utf-8")
            source = json.loads(source)["chat_template"] if text_or_path.endswith(".json") else source
        except FileNotFoundError:
            raise UserError(f"{where}: neither a file nor a jinja template") from None
        except (OSError, ValueError, KeyError, TypeError) as error:  # bad UTF-8 and bad JSON are ValueErrors
            raise UserError(f"{where}: cannot be read: {type(error).__name__}: {error}") from None
        if not isinstance(source, str):
            raise UserError(f"{where}: chat_template is of type {type(source).__name__}, expected a text")
    try:
        split_answers(EXAMPLE, source)
    except jinja2.TemplateSyntaxError as error:
        raise UserError(f"{where}: line {error.lineno}: {error.message}") from None
    except TemplateError as error:
        raise UserError(f"{where}: with a question and its answer: {error}") from None
    return source


def _is_source(text_or_path: str) -> bool:
    return re.search(r"\{[{%]", text_or_path) is not None


def read_template(text_or_path: str, workdir: Path) -> str:
    """The template of a run: the one kept in its workdir, else that of the config; "": none.

    Raises UserError as `load_template`, and if the config names another template than the workdir keeps.
    """
    kept = kept_template(workdir)
    is_path = bool(text_or_path) and not _is_source(text_or_path)
    if kept and is_path and not local_path(text_or_path, "config.tokenizer.chat_template").exists():
        return kept
    configured = load_template(text_or_path) if text_or_path else ""
    if kept and configured != kept:
        raise UserError(
            f"tokenizer.chat_template={text_or_path[:80]!r} is not the chat template that this run began with: restore "
            f"it from {workdir / CHAT_TEMPLATE}, or use another --workdir"
        )
    return configured


def kept_template(workdir: Path) -> str:
    """The template that is kept in the directory of a run; "" if there is none. Raises UserError if it is damaged."""
    try:
        return (workdir / CHAT_TEMPLATE).read_bytes().decode()
    except FileNotFoundError:
        return ""
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{workdir / CHAT_TEMPLATE} cannot be read ({error}); restore it") from None


def trained_template(workdir: Path, stage: str, expected: str | None) -> str:
    """The template that a stage was trained with. expected: its `template_hash`; None or "": the stage had none.

    Raises UserError if the workdir does not hold it.
    """
    if not expected:
        return ""
    kept = kept_template(workdir)
    if template_hash(kept) != expected:
        wrong = "is not the chat template" if kept else "is missing: restore the chat template"
        raise UserError(f"{workdir / CHAT_TEMPLATE} {wrong} that {stage} was trained with (sha256 {expected[:12]})")
    return kept


def template_hash(template: str) -> str:
    """The sha256 of a template; "" for none."""
    return hashlib.sha256(template.encode()).hexdigest() if template else ""


def question(prompt: str, template: str) -> Answer:
    """The prompt of the first turn as training has it, with what leads and what ends its answer.

    Raises UserError if the template cannot render it.
    """
    try:
        return split_answers([("user", prompt), EXAMPLE[1]], template)[0]
    except TemplateError as error:
        raise UserError(f"the prompt cannot be written with the chat template: {error}") from None


def end_of_turn(template: str) -> Pieces:
    """What ends an answer: the template's end of turn, or <eos>."""
    return split_answers(EXAMPLE, template)[0].end if template else [Tokenizer.eos_id]


def is_written(prompt: str, template: str) -> bool:
    """Whether a prompt is written with the template already: it ends as the template ends a prompt."""
    end = _render(template, [("user", ANSWER)], add_generation_prompt=True)
    end = SENTINELS.split(end.partition(ANSWER)[2])[-1].strip()
    return bool(end) and prompt.rstrip().endswith(end)


def with_bos(template: str) -> str:
    """A template that writes the <bos> with which every document of llm3 begins."""
    return template if _render(template, EXAMPLE).startswith(BOS) else "{{ bos_token }}" + template


def text_of(pieces: Pieces) -> str:
    """The text of pieces, without special tokens and outer white space."""
    return "".join(piece for piece in pieces if isinstance(piece, str)).strip()


def without_lead(lead: str, answer: str) -> str:
    """An answer without the text that the template puts at its start."""
    return answer.lstrip().removeprefix(lead) if lead else answer


def split_answers(turns: Turns, template: str) -> list[Answer]:
    """The answers of a conversation, one for each turn of the assistant, who has the last turn.

    There is one <bos>, at the start. An answer ends with the template's end of turn, or with <eos> if it has none;
    white space after the end belongs to the next prompt. Without a template, contents follow each other unchanged, a
    system prompt in lines of its own. Raises TemplateError.
    """
    return _templated(turns, template) if template else _bare(turns)


def _bare(turns: Turns) -> list[Answer]:
    result, before = [], ""
    for role, content in turns:
        if role == "assistant":
            result.append(Answer([before], [], content, [Tokenizer.eos_id]))
            before = ""
        else:
            before += f"{content}\n\n" if role == "system" else content
    result[0].before.insert(0, Tokenizer.bos_id)
    return result


def _templated(turns: Turns, template: str) -> list[Answer]:
    if any(SENTINELS.search(content) for _, content in turns):
        raise TemplateError(
            "a text has a character from U+10FF01 to U+10FF03; they stand for special tokens in a chat template"
        )
    whole, read, result = _render(template, turns), 0, []
    for place, (role, content) in enumerate(turns):
        if role != "assistant":
            continue
        prompt = _render(template, turns[:place], add_generation_prompt=True)
        until = _render(template, turns[: place + 1])
        model = _render(template, [*turns[:place], ("assistant", ANSWER)])
        if not (whole.startswith(until) and until.startswith(prompt) and model.startswith(prompt)):
            raise TemplateError("the chat template renders the turns before an answer differently with and without it")
        head, _, tail = model[len(prompt) :].partition(ANSWER)
        written = until[len(prompt) :]
        kept = written[len(head) : len(written) - len(tail)]
        if written != head + kept + tail or kept.strip() != content.strip():
            raise TemplateError("the chat template changes an answer")
        end = tail.rstrip()
        before = whole[read : len(prompt)]
        result.append(Answer(_pieces(before), _pieces(head), kept, _pieces(end) or [Tokenizer.eos_id]))
        read = len(until) - len(tail) + len(end)
    result[0].before.insert(0, Tokenizer.bos_id)
    return result


def _pieces(text: str) -> Pieces:
    """The texts and special tokens of a rendered text, without <bos>: a document has only one, at its start."""
    parts = SENTINELS.split(text)
    return [Tokenizer.eos_id if part == EOS else part for part in parts if part and part != BOS]


def _render(template: str, turns: Turns, *, add_generation_prompt: bool = False) -> str:
    messages = [{"role": role, "content": content} for role, content in turns]
    names = {"bos_token": BOS, "eos_token": EOS, "tools": None, "documents": None}
    try:
        return _compiled(template).render(messages=messages, add_generation_prompt=add_generation_prompt, **names)
    except jinja2.TemplateSyntaxError:
        raise
    except Exception as error:  # a template is a program that may raise anything
        raise TemplateError(f"the chat template fails: {type(error).__name__}: {str(error)[:100]}") from None


@functools.lru_cache(maxsize=8)
def _compiled(template: str) -> jinja2.Template:
    """Compile a template. It may spell special tokens, unlike contents. Raises jinja2.TemplateSyntaxError."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    for token, sentinel in ((SPECIALS[Tokenizer.bos_id], BOS), (SPECIALS[Tokenizer.eos_id], EOS)):
        template = template.replace(token, sentinel)
    return environment.from_string(template)


class _Generation(Extension):
    """`{% generation %}` ... `{% endgeneration %}`: the content, unchanged; `split_answers` finds the answers."""

    tags = {"generation"}  # noqa: RUF012 - jinja declares a set

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def merge_texts(pieces: Pieces) -> Pieces:
    """The pieces with adjacent texts merged, so that they are encoded together."""
    groups = itertools.groupby(pieces, key=lambda piece: isinstance(piece, str))
    return [each for texts, group in groups for each in (["".join(map(str, group))] if texts else group)]


def encode_pieces(pieces: Pieces, tokenizer: Tokenizer) -> list[int]:
    """The tokens of pieces, end to end."""
    texts = iter(tokenizer.encode_batch([piece for piece in pieces if isinstance(piece, str)]))
    return list(itertools.chain.from_iterable([each] if isinstance(each, int) else next(texts) for each in pieces))
