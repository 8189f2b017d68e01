"""Rendering a chat template: what it writes may spell special tokens, what a message holds may not.

Before a conversation is rendered, each special token in a message is broken by a character that is removed afterwards.
A template gets the names that `transformers` defines: messages, add_generation_prompt, bos_token, eos_token and the
other special tokens, tools and documents (both None), raise_exception and tojson. `{% generation %}` marks are ignored.
The current time is not available, so that a row is the same text on any day; a template that insists gets a fixed date.
"""

import datetime
import functools
import json
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jinja2
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

from llm3.data.tokenizer import OWN, SPECIALS, Pieces, Tokenizer

DATE = datetime.date(2024, 7, 26)  # that of Llama 3's templates
Turns = Sequence[tuple[str, str]]  # (role, content)

# Characters of private use: one breaks special tokens in messages, one stands for an answer while a template renders.
GUARD, ANSWER = "\U0010ff01", "\U0010ff03"
RESERVED = re.compile("[\U0010ff01-\U0010ff03]")


class TemplateError(Exception):
    """A conversation that a template cannot render. Errors of one kind have the same text."""


class Names(NamedTuple):
    """The special tokens that a template can write.

    ids: {token: id}. variables: {variable of a template: token}. own: whether they are those of llm3's own tokenizers,
    with which each document begins with <bos>, whatever the template writes.
    """

    ids: dict[str, int]
    variables: tuple[tuple[str, str], ...]
    eos: int
    starts: tuple[int, ...]
    own: bool

    def guarded(self, text: str) -> str:
        """A message that spells no special token, neither itself nor together with the text around it."""
        spelled, ends, beginnings = _spelling(tuple(self.ids))
        text = spelled.sub(lambda found: found[0][0] + GUARD + found[0][1:], text)
        inner = text.strip()
        guarded = GUARD * inner.startswith(ends) + inner + GUARD * inner.endswith(beginnings)
        return text if guarded == inner else text.replace(inner, guarded, 1)

    def pieces(self, text: str) -> Pieces:
        """What a template wrote, with its special tokens by id."""
        return [self.ids[part] if part in self.ids else part.replace(GUARD, "") for part in self.parts(text)]

    def parts(self, text: str) -> list[str]:
        """A text, cut into special tokens and what is between them."""
        return [part for part in _spelling(tuple(self.ids))[0].split(text) if part]


@functools.lru_cache(maxsize=8)
def _spelling(tokens: tuple[str, ...]) -> tuple[re.Pattern, tuple[str, ...], tuple[str, ...]]:
    """A special token, of several the longest; the ends and the beginnings of special tokens."""
    spelled = re.compile("(" + "|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) + ")")
    ends = {token[cut:] for token in tokens for cut in range(1, len(token))}
    return spelled, tuple(ends), tuple({token[:cut] for token in tokens for cut in range(1, len(token))})


OWN_NAMES = Names(
    {text: number for number, text in enumerate(SPECIALS)},
    (("pad_token", SPECIALS[0]), ("bos_token", SPECIALS[1]), ("eos_token", SPECIALS[2]), ("mask_token", SPECIALS[3])),
    OWN.eos,
    (SPECIALS.index("<|bos|>"),),
    own=True,
)


def names_of(tokenizer: Tokenizer | None) -> Names:
    """The special tokens of a tokenizer; None: those of llm3's own."""
    if tokenizer is None or not tokenizer.foreign:
        return OWN_NAMES
    named = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id, "pad": tokenizer.pad_id, "mask": tokenizer.mask_id}
    variables = {f"{name}_token": tokenizer.tokens[number] for name, number in named.items() if number is not None}
    return Names(tokenizer.specials, tuple(variables.items()), tokenizer.eos_id, tuple(tokenizer.starts), own=False)


def render(template: str, turns: Turns, names: Names, *, add_generation_prompt: bool = False) -> str:
    messages = [{"role": role, "content": content} for role, content in turns]
    variables = dict(names.variables) | {"tools": None, "documents": None}
    try:
        return _compiled(template).render(messages=messages, add_generation_prompt=add_generation_prompt, **variables)
    except jinja2.TemplateSyntaxError:
        raise
    except Exception as error:  # a template is a program that may raise anything
        raise TemplateError(f"the chat template fails: {type(error).__name__}: {str(error)[:100]}") from None


@functools.lru_cache(maxsize=8)
def _compiled(template: str) -> jinja2.Template:
    """Compile a template. Raises jinja2.TemplateSyntaxError."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    if "strftime_now is defined" not in template:  # SmolLM3's; others have a date of their own where there is no time
        environment.globals["strftime_now"] = DATE.strftime
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
