"""What the engine is asked for a prompt."""

from functools import partial
from typing import Any

from llm3.config.model_schema import check_length
from llm3.config.sampling import Sampling
from llm3.data.prompts import Prompt
from llm3.predict.trained import Trained
from llm3.serve.engine import STOPS, Ask
from llm3.serve.stages import Served

LONGEST = 2048  # tokens; a model with rotary positions has no limit of its own


def ask_for(stage: Served, prompt: Prompt, limit: int, sampling: Sampling, seed: int, **options: Any) -> Ask:
    """The answer to a prompt, up to what ends an answer of the stage. limit: its most tokens.

    options: other fields of `Ask`. Raises UserError if the model has no positions for so many tokens.
    """
    tokenizer = stage.trained.tokenizer
    check_length(stage.model, len(prompt.tokens) + limit, "prompt and max_tokens")
    ends = dict.fromkeys([*((end,) for end in tokenizer.end_ids), tuple(prompt.end)])
    stops = tuple(each for each in ends if 0 < len(each) <= STOPS[1])[: STOPS[0]]
    return Ask(stage, prompt.tokens, limit, partial(prompt.text, tokenizer=tokenizer), sampling, seed, stops, **options)


def longest(trained: Trained) -> int:
    """The most tokens of a prompt with its answer, if nothing else is said."""
    model = trained.model
    return model.max_positions if model.positions == "learned" else max(LONGEST, trained.length)
