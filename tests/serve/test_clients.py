"""Clients of others, unchanged, against a server on this machine."""

import concurrent.futures

import numpy as np
import pytest

from tests.helpers import tiny_serve as tiny
from tests.helpers.tiny_export import tokenizer
from tests.helpers.tiny_serve import likeliest, logprobs, tokens_of

openai = pytest.importorskip("openai", reason="needs pip install 'llm3[clients]'")

PLAIN, CHAT, PROMPT = "scores/adapt", "answers/adapt", "The quick 数学 🙂"
ASKED = {"model": PLAIN, "prompt": PROMPT, "max_tokens": 8, "temperature": 0, "logprobs": 3}
TURNS = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    with tiny.Listening([tiny.write(folder, "scores"), tiny.write(folder, "answers")]) as made:
        yield made


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def test_completions_have_the_tokens_and_log_probabilities_of_the_model(client):
    assert [each.id for each in client.models.list()] == [PLAIN, CHAT]
    found = client.completions.create(**ASKED)
    prompt = tokens_of(PROMPT)
    made = likeliest(prompt, 8)
    expected = logprobs([*prompt, *made])[len(prompt) - 1 : -1]
    (choice,) = found.choices
    assert choice.text == tokenizer().decode(made) and choice.finish_reason == "length"
    assert choice.logprobs.token_logprobs == pytest.approx(expected[range(8), made].tolist(), rel=1e-4, abs=2e-4)
    highest = [sorted(each.values(), reverse=True) for each in choice.logprobs.top_logprobs]
    np.testing.assert_allclose(highest, np.sort(expected)[:, :-4:-1], rtol=1e-4, atol=2e-4)
    assert (found.usage.prompt_tokens, found.usage.completion_tokens) == (len(prompt), 8)


def test_streams_n_stops_and_echo(client):
    drawn = ASKED | {"temperature": 1, "seed": 3, "n": 2, "stop": ["q"]}
    whole = client.completions.create(**drawn)
    parts = list(client.completions.create(stream=True, stream_options={"include_usage": True}, **drawn))
    for choice in whole.choices:
        own = [each for part in parts for each in part.choices if each.index == choice.index]
        assert "".join(each.text for each in own) == choice.text and "q" not in choice.text
        assert own[-1].finish_reason == choice.finish_reason
    assert parts[-1].usage == whole.usage
    (echo,) = client.completions.create(**ASKED | {"echo": True, "max_tokens": 1}).choices
    assert echo.text.startswith(PROMPT) and len(echo.logprobs.tokens) == len(tokens_of(PROMPT)) + 1


def test_chats_whole_and_as_streams(client):
    asked = {"model": CHAT, "messages": TURNS, "max_tokens": 8, "temperature": 0, "logprobs": True, "top_logprobs": 2}
    (choice,) = client.chat.completions.create(**asked).choices
    parts = [part.choices[0] for part in client.chat.completions.create(stream=True, **asked)]
    assert "".join(part.delta.content or "" for part in parts) == choice.message.content
    assert choice.message.role == parts[0].delta.role == "assistant"
    content = [each for part in parts if part.logprobs for each in part.logprobs.content]
    assert content == choice.logprobs.content and len(content) == 8 and len(content[0].top_logprobs) == 2


def test_errors_are_those_of_the_client(client):
    with pytest.raises(openai.NotFoundError, match="did you mean 'scores/adapt'"):
        client.completions.create(**ASKED | {"model": "score/adapt"})
    with pytest.raises(openai.BadRequestError, match="up to 1000 of an answer") as caught:
        client.completions.create(**ASKED | {"max_tokens": 1000})
    assert caught.value.code == "context_length_exceeded" and caught.value.param == "max_tokens"
    with pytest.raises(openai.BadRequestError, match="not for chat"):
        client.chat.completions.create(model=PLAIN, messages=TURNS)


@pytest.mark.slow
def test_embeddings_are_the_mean_of_the_hidden_states(client):
    found = client.embeddings.create(model=PLAIN, input=["fox", "quick"])  # in base64
    plain = client.embeddings.create(model=PLAIN, input="fox", encoding_format="float")
    np.testing.assert_allclose(found.data[0].embedding, plain.data[0].embedding, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found.data[0].embedding, tiny.mean_hidden("fox"), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_two_hundred_at_two_stages_are_answered_as_each_alone_though_a_third_leaves_midway(client):
    def ask(seed: int, leaves: bool = False) -> str | None:
        body = {"model": (PLAIN, CHAT)[seed // 3 % 2], "prompt": "a" * (1 + seed % 30), "max_tokens": 1 + seed % 40}
        body |= {"temperature": 1, "seed": seed}
        if leaves:
            with client.completions.create(**body, stream=True) as answer:
                next(iter(answer))
            return None
        return client.completions.create(**body).choices[0].text

    with concurrent.futures.ThreadPoolExecutor(200) as pool:
        together = list(pool.map(lambda seed: ask(seed, leaves=seed % 3 == 0), range(200)))
    assert [text for text in together if text is not None] == [ask(seed) for seed in range(200) if seed % 3]
