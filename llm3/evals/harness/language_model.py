"""The model of an evaluation as lm-eval sees it.

Prompts are encoded, cut and ended as by lm-eval's model `hf`, so that both give the same scores: a text begins with
<bos> if the tokenizer's own files say so, also where it is scored from its first token on; what does not fit the window
is cut on the left.
"""

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from llm3.data.chat_templates import end_of_turn, prompt_pieces, prompt_text
from llm3.data.encoding import encode_pieces
from llm3.data.template_rendering import TemplateError
from llm3.distributed import processes
from llm3.errors import UserError, counted
from llm3.evals import EvalContext
from llm3.evals.harness.requests import Continuation, answering, answers, log_likelihoods


class LanguageModel(TemplateLM):
    """An `lm_eval.api.model.LM` over the scoring and generation of llm3.

    Every process has one and gets the same requests, which is checked. truncated: the number of requests whose
    beginning was cut.
    """

    tokenizer_name = "llm3"
    rank, world_size = 0, 1  # each process sees all requests; the mesh divides a batch

    def __init__(self, context: EvalContext):
        super().__init__()
        self._context, self.truncated = context, 0
        self.max_length, self.max_gen_toks = context.config.sequence_length, context.options.max_gen_toks

    @property
    def eot_token_id(self) -> int:
        return self._context.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """What the first token of a text follows."""
        return self._context.tokenizer.prefix_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """The tokens of a text, by default after <bos> if texts begin with it and this one does not yet."""
        tokenizer = self._context.tokenizer
        if self._context.options.apply_chat_template:
            tokens = encode_pieces(prompt_pieces(string, tokenizer), tokenizer, joint=True)
        else:
            tokens = tokenizer.encode(string)
        new = add_special_tokens or (add_special_tokens is None and tokens[:1] != tokenizer.starts)
        return [*tokenizer.starts, *tokens] if new and tokenizer.adds_bos else tokens

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """As lm-eval does; a continuation that is only a part of the context's last token is that token."""
        before, tokens = super()._encode_pair(context, continuation)
        if not tokens:
            whole = self.tok_encode(context + continuation)
            before, tokens = whole[:-1], whole[-1:]
        return before, tokens

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        return super().loglikelihood(requests, disable_tqdm=True)

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], disable_tqdm: bool = True, **_: Any
    ) -> list[tuple[float, bool]]:
        items = [Continuation(before, tokens) for _, before, tokens in requests]
        longest = max((len(each.tokens) for each in items), default=0)
        if longest > self.max_length:
            raise UserError(
                f"evaluation 'harness': a continuation has {counted(longest, 'token')}: expected sequence_length to be "
                f"at least that, not {self.max_length}"
            )
        self._check_same(items)
        self.truncated += sum(len(each.context) + len(each.tokens) > self.max_length + 1 for each in items)
        return log_likelihoods(self._context, items)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[float]:
        """The log-likelihood of each text, in windows in which every token is predicted once."""
        windows = [
            (number, make_disjoint_window(pair))
            for number, request in enumerate(requests)
            for pair in get_rolling_token_windows(
                self.tok_encode(request.args[0]), self.prefix_token_id, max_seq_len=self.max_length, context_len=1
            )
        ]
        totals = [0.0] * len(requests)
        scores = self._loglikelihood_tokens([(None, *pair) for _, pair in windows])
        for (number, _), (score, _) in zip(windows, scores, strict=True):
            totals[number] += score
        return totals

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        """The greedy answer to each request."""
        limits = [answering(request.args[1], self.max_gen_toks) for request in requests]
        whole = [self.tok_encode(request.args[0]) for request in requests]
        room = [self.max_length - limit.tokens for limit in limits]
        prompts = [tokens[-most:] for tokens, most in zip(whole, room, strict=True)]
        self._check_same([prompts, limits])
        self.truncated += sum(len(tokens) > most for tokens, most in zip(whole, room, strict=True))
        tokenizer, template = self._context.tokenizer, self._context.template
        end = encode_pieces(end_of_turn(template, tokenizer), tokenizer)
        return answers(self._context, [each or [self.prefix_token_id] for each in prompts], limits, end)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The conversation as the chat template of the run writes it."""
        turns = [(turn["role"], turn["content"]) for turn in chat_history]
        try:
            template, tokenizer = self._context.template, self._context.tokenizer
            return prompt_text(turns, template, tokenizer, continues=not add_generation_prompt)
        except TemplateError as error:
            raise UserError(f"evaluation 'harness': a prompt cannot be written: {error}") from None

    def chat_template(self, chat_template: bool | str = False) -> str:
        return self._context.template

    def _check_same(self, requests: Sequence[Any]) -> None:
        """Raise UserError unless the first process has the same requests: all processes compute each batch together."""
        own = hashlib.sha256(json.dumps(requests).encode()).hexdigest()
        if processes.broadcast_from_first(lambda: own) != own:
            raise UserError(
                f"evaluation 'harness': process {processes.index()} has other requests than process 0: expected the "
                "same files of the tasks, and the same version of lm-eval, on every machine"
            )
