"""From a request to what the engine is asked, and from its updates to the parts of each choice of the response."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from functools import partial
from typing import Any, NamedTuple

from llm3.data.prompts import Prompt, read_conversation, read_prompt
from llm3.data.tokenizer import Tokenizer
from llm3.errors import UserError
from llm3.models.decoding import Scores
from llm3.serve.answers import Answers, result
from llm3.serve.asking import ask_for
from llm3.serve.engine import Ask, Update
from llm3.serve.errors import ApiError
from llm3.serve.requests import Decoding
from llm3.serve.scoring import score
from llm3.serve.service import Service
from llm3.serve.stages import Served
from llm3.serve.text import TokenTexts

CHAT_TOKENS = 512  # max tokens of an answer in a chat that names none


class Given(NamedTuple):
    """A prompt, and its text for an echo."""

    prompt: Prompt
    text: str = ""


class Token(NamedTuple):
    """A token of a choice. offset: characters of the text before it. logprob: None for the first one of a prompt.

    likeliest, their_logprobs: the alternatives in its place, the likeliest first.
    """

    token: int
    offset: int
    logprob: float | None
    likeliest: list[int]
    their_logprobs: list[float]


class Part(NamedTuple):
    """What is new of a choice. tokens: with log probabilities, if they were asked for. finish: "" (it goes on), or why
    it ended. made: the tokens of the complete answer."""

    choice: int
    text: str
    tokens: list[Token]
    finish: str = ""
    made: int = 0


def completion_prompts(stage: Served, asked: Sequence[str] | Sequence[list[int]]) -> list[Given]:
    """Prompts that are continued as they are: texts after <bos>, tokens unchanged. Raises ApiError."""
    tokenizer, template = stage.trained.tokenizer, stage.trained.template
    known, found = min(stage.model.vocab_size, tokenizer.vocab_size), []
    for each in asked:
        if isinstance(each, str):
            prompt = read_prompt(each, template, tokenizer, raw=True)
            found.append(Given(prompt if prompt.tokens else prompt._replace(tokens=[tokenizer.prefix_id]), each))
            continue
        if not all(0 <= token < known for token in each):
            raise ApiError(f"prompt: expected tokens from 0 to {known - 1}", "prompt")
        empty = read_prompt("", template, tokenizer, raw=True)
        found.append(Given(empty._replace(tokens=list(each)), tokenizer.decode(each)))
    return found


def chat_prompt(stage: Served, messages: Any) -> Given:
    """A conversation up to where the model answers, as in training. Raises ApiError."""
    try:
        return Given(read_conversation(messages, stage.trained.template, stage.trained.tokenizer))
    except UserError as error:
        reason = str(error)
        raise ApiError(reason if "messages" in reason else f"messages: {reason}", "messages") from None


def most_tokens(service: Service, stage: Served, given: Sequence[Given], asked: int | None, field: str) -> int:
    """The max tokens of the answers. Raises ApiError, with the numbers, if a prompt leaves too little room."""
    longest, length = max(len(each.prompt.tokens) for each in given), service.length(stage)
    limit = max(1, min(CHAT_TOKENS, length - longest)) if asked is None else asked
    if longest + limit > length:
        raise ApiError(
            f"{field}: {longest} tokens, and up to {limit} of an answer, are more than the {length} of this model",
            "max_tokens" if longest < length else field,
            code="context_length_exceeded",
        )
    return limit


def asks(stage: Served, given: Sequence[Given], limit: int, decoding: Decoding) -> list[Ask]:
    """What the engine is asked: n answers to each prompt."""
    options = {"stop_texts": decoding.stops, "scored": decoding.logprobs is not None}
    return [
        ask_for(stage, each.prompt, limit, decoding.sampling, (decoding.seed + number) % 2**31, **options)
        for each in given
        for number in range(decoding.n)
    ]


class _Choice:
    """Turns the updates of one answer into its parts."""

    def __init__(self, number: int, tokenizer: Tokenizer, given: Given):
        self.number, self._tokenizer = number, tokenizer
        self._texts = TokenTexts(tokenizer, given.prompt.tokens)
        self._offset, self._characters = 0, 0  # of the echo, and of the text so far
        self._starts, self._given = [0], 0  # characters before each token, and the tokens that were given

    def echo(self, given: Given, scores: Scores | None) -> Part:
        """The prompt as the first part."""
        self._offset, offset, tokens, prompt = len(given.text), 0, [], given.prompt.tokens
        for number, text in enumerate(TokenTexts(self._tokenizer).add(prompt, True) if scores else ()):
            tokens.append(_token(prompt[number], offset, scores, number - 1))
            offset += len(text)
        return Part(self.number, given.text, tokens)

    def add(self, update: Update) -> Part:
        """The part for an update. Before the end, it has the tokens whose text has been given."""
        self._characters += len(update.text)
        tokens: list[Token] = []
        if update.scores is not None:
            whole, starts = [*update.tokens, *update.stop], self._starts
            for text in self._texts.add(whole[len(starts) - 1 :], bool(update.finish)):
                starts.append(starts[-1] + len(text))
            ready = len(whole)
            while not update.finish and ready and not starts[ready - 1] < starts[ready] <= self._characters:
                ready -= 1  # its text is not given yet, or a stop string may still cut it off
            for place in range(self._given, ready):
                tokens.append(_token(whole[place], self._offset + starts[place], update.scores, place))
            self._given = max(ready, self._given)
        return Part(self.number, update.text, tokens, update.finish, len(update.tokens))


def _token(token: int, offset: int, scores: Scores | None, place: int) -> Token:
    if scores is None or place < 0:
        return Token(token, offset, None, [], [])
    own, likeliest, theirs = scores
    return Token(token, offset, float(own[place]), likeliest[place].tolist(), theirs[place].tolist())


def begin(
    answers: Answers, stage: Served, given: Sequence[Given], limit: int, decoding: Decoding, echo: bool = False
) -> AsyncIterator[Part]:
    """Begin all answers, which the caller closes in the end; the result yields the parts of all choices.

    Both raise ApiError.
    """
    scored = echo and decoding.logprobs is not None
    calls = [answers.call(partial(score, stage, each.prompt.tokens)) for each in given] if scored else []
    if limit and len(given) * decoding.n > answers.queue:
        raise ApiError(f"{len(given)} prompts x n={decoding.n}: expected at most {answers.queue} answers", "n")
    if limit:
        answers.ask(asks(stage, given, limit, decoding))
    numbers = range(len(given) * decoding.n)
    choices = [_Choice(number, stage.trained.tokenizer, given[number // decoding.n]) for number in numbers]
    return _parts(answers, choices, given if echo else [], calls, ends=not limit)


async def _parts(
    answers: Answers, choices: Sequence[_Choice], echoed: Sequence[Given], calls: Sequence[asyncio.Future], ends: bool
) -> AsyncIterator[Part]:
    for number, given in enumerate(echoed):
        scores, n = await result(calls[number]) if calls else None, len(choices) // len(echoed)
        for choice in choices[number * n : (number + 1) * n]:
            yield choice.echo(given, scores)
    for choice in choices if ends else ():
        yield Part(choice.number, "", [], "length")
    async for index, update in answers.updates():
        yield choices[index].add(update)
