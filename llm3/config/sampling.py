"""How the tokens of an answer are chosen."""

from typing import Any, NamedTuple

from llm3.errors import UserError


class Sampling(NamedTuple):
    """How the tokens of an answer are chosen: numbers, or arrays [B] of a batch of answers.

    temperature 0: the most likely token. top_k > 0 keeps the k most likely; top_p < 1 keeps the smallest set of most
    likely tokens whose probability reaches p, among those k. Of equally likely tokens, both prefer those with smaller
    numbers, as temperature 0 does. min_p > 0 keeps the tokens that are at least p times as likely as the most likely
    one. All three compare probabilities at this temperature. repetition_penalty > 1 divides the positive logits of
    tokens that the prompt or the answer has already, and multiplies their negative ones.
    """

    temperature: Any = 0.0
    top_k: Any = 0
    top_p: Any = 1.0
    min_p: Any = 0.0
    repetition_penalty: Any = 1.0

    def check(self, where: str = "{}") -> None:
        """Raise UserError for a number that is out of range. where: how messages write a name, with {} in its place."""
        for name, least in (("temperature", 0), ("top_k", 0), ("repetition_penalty", 0.01)):
            if not getattr(self, name) >= least:
                raise UserError(f"{where.format(name)}={getattr(self, name)}: expected at least {least}")
        if not 0 < self.top_p <= 1:
            raise UserError(f"{where.format('top_p')}={self.top_p}: expected a probability above 0, at most 1")
        if not 0 <= self.min_p <= 1:
            raise UserError(f"{where.format('min_p')}={self.min_p}: expected a probability")


GREEDY = Sampling()
