"""The engine: an answer depends on its request only, whatever else is asked, cancelled or late."""

import random
import threading
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from llm3.config.model_schema import AdapterConfig
from llm3.config.sampling import Sampling
from llm3.segments import segmented
from llm3.serve.engine import Ask, Engine, Update
from llm3.serve.stages import Served, Shared
from tests.helpers.tiny import VOCAB, make_params, model_config

LETTERS = [chr(ord("a") + number % 26) for number in range(VOCAB)]


def decode(tokens: list[int]) -> str:
    return "".join(LETTERS[each] for each in tokens)


@pytest.fixture(scope="module")
def stages() -> list[Served]:
    """A base, a stage with an adapter on it, and another model."""
    adapters, variants = [("law", AdapterConfig(rank=2))], ((), ("law",))
    shared = [
        _shared(model_config(layers=2, adapters=tuple(adapters)), variants),
        _shared(model_config(layers=3), ((),)),
    ]
    stage: Any = lambda shared, variant: Served("", None, shared.config, shared.leaves, shared, variant)  # noqa: E731
    return [*(stage(shared[0], variant) for variant in range(2)), stage(shared[1], 0)]


def _shared(config, variants) -> Shared:
    cut = tuple((layer, layer + 1) for layer in range(config.layers))
    params = jax.tree.map(jnp.asarray, make_params(config))
    return Shared(config, segmented(params, cut), cut, variants)


class Answers:
    """Collects the updates of requests, and cancels some of them when they have begun."""

    def __init__(self, engine: Engine):
        self.engine, self.updates, self.done = engine, {}, threading.Semaphore(0)

    def ask(self, name: int, ask: Ask, cancel: bool = False) -> None:
        self.updates[name] = []
        number = self.engine.submit(ask, lambda update: self._listen(name, update, cancel and number))

    def _listen(self, name: int, update: Update, cancel: int | bool) -> None:
        self.updates[name].append(update)
        if cancel is not False and not update.finish:
            self.engine.cancel(cancel)
        if update.finish:
            self.done.release()

    def wait(self) -> dict[int, tuple[list[int], str, str]]:
        """{name: (tokens, text, why it ended)}"""
        for _ in self.updates:
            assert self.done.acquire(timeout=120)
        return {
            name: (found[-1].tokens, "".join(each.text for each in found), found[-1].finish)
            for name, found in self.updates.items()
        }


@pytest.fixture(scope="module")
def engine():
    engine = Engine(rows=4, most_steps=2)
    thread = threading.Thread(target=engine.run)
    thread.start()
    yield engine
    engine.end()
    thread.join(60)
    assert not thread.is_alive()


def make_asks(stages: list[Served], count: int) -> list[Ask]:
    draw, asks = random.Random(0), []
    settings = [Sampling(), Sampling(0.9, min_p=0.1), Sampling(0.8)]
    for seed in range(count):
        prompt = [draw.randrange(VOCAB) for _ in range(draw.randrange(1, 50))]
        stage, sampling = draw.choice(stages), draw.choice(settings)
        stops = draw.choice([(), ("ab", "q"), ("xyz",)])
        asks.append(Ask(stage, prompt, draw.randrange(1, 50), decode, sampling, seed, ((3, 4),), stops))
    return asks


def test_answers_are_those_of_each_request_alone_while_others_come_and_go(engine, stages):
    asks = make_asks(stages, 60)
    alone = []
    for ask in asks:
        one = Answers(engine)
        one.ask(0, ask)
        alone.append(one.wait()[0])
    together = Answers(engine)
    for number, ask in enumerate(asks):
        together.ask(number, ask, cancel=number % 3 == 0)
    found = together.wait()
    for number, expected in enumerate(alone):
        assert found[number] == expected or (number % 3 == 0 and found[number][2] == "cancelled")
        assert expected[1] == decode(expected[0]) and not any(each in expected[1] for each in asks[number].stop_texts)
    assert {each[2] for each in alone} == {"stop", "length"}
    assert any(each[2] == "cancelled" for each in found.values())
    assert engine.waiting == engine.active == 0
