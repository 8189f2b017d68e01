"""The API in this process: OpenAI's shapes, the model's own numbers, and what is refused."""

import asyncio
import itertools
import json
import re
import threading
import time

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.testclient import TestClient

from llm3.serve.api import create_app
from llm3.serve.engine import Engine
from llm3.serve.service import Service
from tests.helpers import tiny_serve as tiny
from tests.helpers.tiny_export import ADDED, model, tokenizer, write_run
from tests.helpers.tiny_serve import likeliest, logprobs, tokens_of

PLAIN, CHAT = "scores/adapt", "answers/adapt"
CLOSE = {"rel": 1e-4, "abs": 2e-4}
PROMPT = "The quick 数学 🙂"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    with tiny.Server([tiny.write(folder, "scores"), tiny.write(folder, "answers")]) as made:
        yield made


@pytest.fixture(scope="module")
def complete(server):
    """The choices of a completion. All have log probabilities, so that one batch is compiled for all."""

    def post(**fields) -> list[dict]:
        body = {"model": PLAIN, "prompt": PROMPT, "max_tokens": 8, "temperature": 0, "logprobs": 3} | fields
        response = server.post("/v1/completions", **body)
        assert response.status_code == 200, response.text
        return response.json()["choices"]

    return post


def events_of(response) -> list[dict]:
    lines = [line for line in response.text.split("\n\n") if line]
    assert lines[-1] == "data: [DONE]" and all(line.startswith("data: ") for line in lines)
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def test_a_completion_is_greedy_with_the_log_probabilities_of_the_model(complete):
    (choice,) = complete()
    prompt = tokens_of(PROMPT)
    made = likeliest(prompt, 8)
    expected = logprobs([*prompt, *made])[len(prompt) - 1 : -1]
    assert choice["text"] == tokenizer().decode(made) and choice["finish_reason"] == "length"
    found = choice["logprobs"]
    assert found["token_logprobs"] == pytest.approx(expected[range(8), made].tolist(), **CLOSE)
    for top, row in zip(found["top_logprobs"], expected, strict=True):
        assert sorted(top.values(), reverse=True) == pytest.approx(np.sort(row)[:-4:-1].tolist(), **CLOSE)
    assert complete(prompt=prompt) == [choice]  # the same prompt as tokens


def test_an_echo_scores_the_prompt_and_offsets_name_the_characters(complete):
    (choice,) = complete(echo=True, max_tokens=0)
    tokens, found = tokens_of(PROMPT), choice["logprobs"]
    expected = logprobs(tokens)[range(len(tokens) - 1), tokens[1:]]
    assert found["token_logprobs"][0] is None
    assert found["token_logprobs"][1:] == pytest.approx(expected.tolist(), **CLOSE)
    assert choice["text"] == PROMPT and choice["finish_reason"] == "length"
    bounds = [*found["text_offset"], len(PROMPT)]
    pieces = [PROMPT[a:b] for a, b in itertools.pairwise(bounds)]
    assert "".join(pieces) == PROMPT and "🙂" in pieces
    (both,) = complete(echo=True, max_tokens=2)
    (alone,) = complete(max_tokens=2)
    assert both["text"] == PROMPT + alone["text"]
    assert both["logprobs"]["tokens"] == found["tokens"] + alone["logprobs"]["tokens"]
    assert both["logprobs"]["text_offset"][-2:] == [len(PROMPT) + each for each in alone["logprobs"]["text_offset"]]


def test_the_token_that_ends_an_answer_is_scored_as_its_last_one(server, complete):
    made = likeliest(tokens_of(PROMPT), 8)
    last = next(place for place in range(1, 8) if made[place] not in made[:place])
    ask = server.service.stages[PLAIN].trained.tokenizer
    before, ask.end_ids = ask.end_ids, (made[last],)
    try:
        (choice,) = complete()
    finally:
        ask.end_ids = before
    assert choice["finish_reason"] == "stop" and choice["text"] == tokenizer().decode(made[:last])
    assert len(choice["logprobs"]["token_logprobs"]) == last + 1


def test_each_of_n_answers_has_a_seed_of_its_own_and_a_stream_has_the_same_text(server, complete):
    drawn = {"temperature": 1, "seed": 5}
    together = complete(n=2, prompt=["a", PROMPT], **drawn)
    assert [each["index"] for each in together] == [0, 1, 2, 3]
    scores = [each["logprobs"] for each in together]
    tops = [pair for each in scores for pair in zip(each["tokens"], each["top_logprobs"], strict=True)]
    assert all(token in top for token, top in tops) and {len(top) for _, top in tops} == {3, 4}
    for number, each in enumerate(together):
        (alone,) = complete(prompt=["a", PROMPT][number // 2], temperature=1, seed=5 + number % 2)
        assert {**alone, "index": number} == each
    body = {"model": PLAIN, "prompt": ["a", PROMPT], "max_tokens": 8, "n": 2, "logprobs": 3, "stream": True, **drawn}
    found = events_of(server.post("/v1/completions", stream_options={"include_usage": True}, **body))
    *chunks, last = found
    whole = server.post("/v1/completions", **{**body, "stream": False}).json()
    assert last["choices"] == [] and last["usage"] == whole["usage"]
    for each in together:
        own = [choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == each["index"]]
        assert "".join(choice["text"] for choice in own) == each["text"]
        assert [token for choice in own for token in choice["logprobs"]["tokens"]] == each["logprobs"]["tokens"]
        assert [choice["finish_reason"] for choice in own][-1] == each["finish_reason"]


def test_a_stop_string_ends_the_text_before_it(complete):
    text = tokenizer().decode(likeliest(tokens_of(PROMPT), 8))
    (choice,) = complete(stop=["never", text[3:5]])
    assert choice["text"] == text[:3] and choice["finish_reason"] == "stop"


def test_a_chat_is_written_with_the_template_of_the_stage(server, complete):
    contents = [("system", "Be!"), ("user", "Hi"), ("assistant", "a"), ("user", "b")]
    turns = [{"role": role, "content": content} for role, content in contents]
    body = {"model": CHAT, "messages": turns, "temperature": 0, "logprobs": True, "top_logprobs": 3}
    response = server.post("/v1/chat/completions", max_completion_tokens=8, **body).json()
    written = "<system>Be!数学\n<user>Hi数学\n<assistant>a数学\n<user>b数学\n<assistant>"
    (choice,) = complete(model=CHAT, prompt=tokens_of(written))
    found = response["choices"][0]
    assert found["message"]["content"] == choice["text"] and response["usage"]["prompt_tokens"] == len(
        tokens_of(written)
    )
    content = found["logprobs"]["content"]
    assert [each["logprob"] for each in content] == choice["logprobs"]["token_logprobs"]
    assert b"".join(bytes(each["bytes"]) for each in content).decode(errors="replace") == choice["text"]
    chunks = events_of(server.post("/v1/chat/completions", max_tokens=8, stream=True, **body))
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0] == {"role": "assistant", "content": ""} and deltas[-1] == {}
    assert "".join(each.get("content", "") for each in deltas) == choice["text"]


@pytest.mark.parametrize(
    "template",
    [
        ADDED.replace("in messages", "in messages if m.role != 'system'"),
        "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}" + ADDED,
    ],
)
def test_a_system_prompt_that_the_template_of_the_stage_skips_or_rejects_is_refused(server, monkeypatch, template):
    stage = server.service.stages[CHAT]
    changed = stage._replace(trained=stage.trained._replace(template=template))
    monkeypatch.setitem(server.service.stages, CHAT, changed)
    turns = [{"role": "system", "content": "Be!"}, {"role": "user", "content": "Hi"}]
    body = {"model": CHAT, "max_tokens": 8, "logprobs": True}
    refused = server.post("/v1/chat/completions", messages=turns, **body)
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "messages"
    assert "messages: the chat template has no system role" in refused.json()["error"]["message"]
    assert server.post("/v1/chat/completions", messages=turns[1:], **body).status_code == 200


def test_a_text_is_scored_in_windows_with_the_bits_of_each_token(server):
    text = PROMPT + " fox jumps over"
    found = server.post("/score", model=PLAIN, text=text).json()
    tokens, expected = tokens_of(text), []
    for first in range(0, len(tokens) - 1, 16):
        piece = tokens[first : first + 17]
        expected += logprobs(piece)[range(len(piece) - 1), piece[1:]].tolist()
    assert len(expected) > 16
    assert [each["logprob"] for each in found["tokens"]] == pytest.approx(expected, **CLOSE)
    assert found["bits_per_byte"] == pytest.approx(-sum(expected) / np.log(2) / len(text.encode()), **CLOSE)
    assert "".join(text[each["start"] : each["end"]] for each in found["tokens"]) == text
    assert all(len(each["top"]) == 5 and each["top"][0]["logprob"] >= each["logprob"] for each in found["tokens"])


def test_learned_positions_limit_a_request_but_not_its_padding(tmp_path):
    config = {"positions": "learned", "max_positions": 20, "tie_embeddings": False, "layers": 1}
    write_run(tmp_path, *model(**config))
    tokens = tokens_of("The quick brown fox")[:20]
    with tiny.Server([tmp_path]) as server:
        (listed,) = server.client.get("/v1/models").json()["data"]
        assert listed["llm3"]["max_length"] == 20
        asked = {"model": "adapt", "echo": True, "logprobs": 1}
        refused = server.post("/v1/completions", prompt=tokens, max_tokens=21 - len(tokens), **asked)
        assert refused.status_code == 400 and "more than the 20" in refused.text
        found = server.post("/v1/completions", prompt=tokens, max_tokens=0, **asked).json()["choices"][0]["logprobs"]
    expected = logprobs(tokens, **config)[range(len(tokens) - 1), tokens[1:]]
    assert found["token_logprobs"][1:] == pytest.approx(expected.tolist(), **CLOSE)


def test_every_stage_is_listed_with_what_it_can_be_asked(server):
    listed = {each["id"]: each for each in server.client.get("/v1/models").json()["data"]}
    assert listed[PLAIN]["llm3"]["tasks"] == ["completions", "score", "embeddings"]
    assert listed[CHAT]["llm3"]["tasks"] == ["completions", "chat", "score", "embeddings"]
    assert listed[PLAIN]["llm3"]["step"] == 7 and listed[PLAIN]["llm3"]["run"] == "scores"
    assert server.client.get(f"/v1/models/{PLAIN}").json() == listed[PLAIN]


def test_metrics_count_requests_answers_and_tokens(server, complete):
    def read() -> dict[str, float]:
        lines = server.client.get("/metrics").text.splitlines()
        return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if line[0] != "#")}

    before = read()
    complete(max_tokens=3, n=2)
    after = read()
    changed = {name: after[name] - before.get(name, 0) for name in after}
    assert changed["llm3_requests_total"] == changed['llm3_answers_total{finish="length"}'] == 2
    assert changed["llm3_tokens_total"] == 6
    assert changed["llm3_prompt_tokens_total"] == 2 * len(tokens_of(PROMPT))
    assert changed['llm3_responses_total{path="/v1/completions",status="200"}'] == 1
    assert changed['llm3_response_seconds_count{path="/v1/completions"}'] == 1
    assert changed['llm3_response_seconds_bucket{path="/v1/completions",le="300.0"}'] == 1
    assert after["llm3_waiting"] == after["llm3_active"] == 0


ASKED = {
    "/v1/completions": {"model": PLAIN, "prompt": "a", "max_tokens": 1},
    "/v1/chat/completions": {"model": CHAT, "messages": [{"role": "user", "content": "a"}], "max_tokens": 1},
    "/v1/embeddings": {"model": PLAIN, "input": "a"},
    "/score": {"model": PLAIN, "text": "a"},
    "/classify": {"model": PLAIN, "text": "a"},
    "/fill": {"model": PLAIN, "text": "a"},
    "/spans": {"model": PLAIN, "question": "a", "context": "a"},
}


@pytest.mark.parametrize(
    ("path", "fields", "status", "param", "message"),
    [
        ("/v1/completions", {"model": "scores/adopt"}, 404, "model", "did you mean 'scores/adapt'"),
        ("/v1/completions", {"temprature": 1}, 400, "temprature", "did you mean 'temperature'"),
        ("/v1/completions", {"prompt": "x" * 200}, 400, "prompt", "201 tokens, and up to 1 of an answer, .* the 128"),
        ("/v1/completions", {"max_tokens": 500}, 400, "max_tokens", "2 tokens, and up to 500 of an answer"),
        ("/v1/completions", {"\ud83d": 1}, 400, "?", "'\\?': no such field"),
        ("/v1/completions", {"prompt": [9999]}, 400, "prompt", "expected tokens from 0 to"),
        ("/v1/completions", {"logprobs": 21}, 400, "logprobs", "an integer from 0 to 20"),
        ("/v1/completions", {"suffix": "x"}, 400, "suffix", "not supported"),
        ("/v1/completions", {"best_of": 3}, 400, "best_of", "not supported"),
        ("/v1/completions", {"n": 65, "prompt": ["a", "b"]}, 400, "n", "at most 128 answers"),
        ("/v1/completions", {"n": 65}, 400, "n", "at most 64 answers"),
        ("/v1/completions", {"stop": ["a"] * 9}, 400, "stop", "at most 8"),
        ("/v1/completions", {"prompt": "\ud83d"}, 400, "prompt", "half of a surrogate"),
        ("/v1/chat/completions", {"model": PLAIN}, 400, "model", "not for chat; models for it: answers/adapt"),
        ("/v1/chat/completions", {"top_logprobs": 3}, 400, "top_logprobs", "expected logprobs=true"),
        ("/v1/chat/completions", {"messages": [{"role": "robot", "content": "x"}]}, 400, "messages", "role"),
        ("/classify", {}, 400, "model", "not for classify; no model here is"),
        ("/score", {"text": ""}, 400, "text", "expected 1 to"),
    ],
)
def test_what_cannot_be_answered_is_refused_by_its_field(server, path, fields, status, param, message):
    response = server.post(path, **ASKED[path] | fields)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (status, param)
    assert re.search(message, error["message"])


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
NO_TEXT = st.integers() | st.booleans() | st.dictionaries(st.text(max_size=3), VALUES, min_size=1, max_size=2)
NO_NUMBER = st.text(max_size=3) | st.booleans() | st.lists(VALUES, max_size=2) | st.sampled_from([-1e9, 1e99, 2**80])
FIELDS = dict.fromkeys(("model", "prompt", "messages", "input", "text", "question", "stop"), NO_TEXT)
FIELDS |= dict.fromkeys(("max_tokens", "temperature", "top_p", "n", "seed", "top_k", "min_p"), NO_NUMBER)
FIELDS |= {"unknown_field": VALUES.filter(lambda value: value is not None), "stream": st.text() | st.integers()}


@st.composite
def malformed(draw) -> tuple[str, bytes]:
    path = draw(st.sampled_from(sorted(ASKED)))
    kind = draw(st.sampled_from(["bytes", "value", "field", "field", "field", "deep", "cut"]))
    if kind == "bytes":
        return path, draw(st.binary(max_size=40))
    if kind == "value":
        return path, json.dumps(draw(VALUES.filter(lambda value: not isinstance(value, dict)))).encode()
    if kind == "deep":
        return path, b'{"model":' + draw(st.sampled_from([b"[", b'{"a":'])) * draw(st.integers(5, 200_000))
    if kind == "cut":
        return path, json.dumps(ASKED[path]).encode()[: draw(st.integers(0, 20))]
    name = draw(st.sampled_from(sorted(FIELDS)))
    return path, json.dumps(ASKED[path] | {name: draw(FIELDS[name])}).encode()


@given(malformed())
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_malformed_requests_are_refused(server, request_):
    path, body = request_
    response = server.client.post(path, content=body, headers={"content-type": "application/json"})
    assert 400 <= response.status_code < 500, (path, body[:200], response.text)
    assert response.json()["error"]["message"] and "Traceback" not in response.text


@pytest.mark.parametrize(
    ("body", "headers", "status"),
    [
        (b" " * (2**20 + 1), {"content-type": "application/json"}, 413),
        (json.dumps(ASKED["/score"]).encode(), {"content-type": "text/plain"}, 415),
        (json.dumps(ASKED["/score"]).encode(), {"content-type": "application/json", "host": "evil.example"}, 403),
        (json.dumps(ASKED["/score"]).encode(), {"content-type": "application/json", "host": "127.0.0.1.evil"}, 403),
    ],
)
def test_large_bodies_other_kinds_and_foreign_hosts_are_refused(server, body, headers, status):
    assert server.client.post("/score", content=body, headers=headers).status_code == status


@pytest.mark.parametrize("path", ["/static/../../etc/passwd", "/v1/models/..%2f..%2fetc", "/%2e%2e/pyproject.toml"])
def test_nothing_else_can_be_read(server, path):
    assert server.client.get(path).status_code == 404


@pytest.fixture
def idle(server):
    """The same stages behind an engine that never answers, whose queue takes one request."""
    return Service(server.service.stages, Engine(queue=1))


def test_a_full_queue_says_when_to_come_again(idle):
    client = TestClient(create_app(idle), base_url=tiny.HOST)
    idle.engine.call(lambda: None)
    response = client.post("/score", json=ASKED["/score"])
    assert response.status_code == 503 and int(response.headers["retry-after"]) > 0
    assert client.get("/health").status_code == 200
    idle.engine.end()
    assert client.get("/health").status_code == client.post("/score", json=ASKED["/score"]).status_code == 503


def test_a_key_is_needed_where_there_is_one(idle):
    client = TestClient(create_app(idle, hosts=(), key="a secret"), base_url="http://anything")
    assert client.get("/health").status_code == 200
    assert client.get("/v1/models").status_code == 401
    assert client.get("/v1/models", headers={"authorization": "Bearer a secre"}).status_code == 401
    assert client.get("/v1/models", headers={"authorization": "Bearer a secret"}).status_code == 200
    assert client.get("/v1/models", auth=("anyone", "a secret")).status_code == 200


def test_an_answer_that_is_not_made_in_time_is_given_up(idle):
    def ends() -> None:
        while not idle.engine.waiting:
            time.sleep(0.001)
        for each in idle.engine._waiting.values():
            each.deadline = 0.0
        idle.engine.look()

    thread = threading.Thread(target=ends)
    thread.start()
    response = TestClient(create_app(idle), base_url=tiny.HOST).post("/v1/completions", json=ASKED["/v1/completions"])
    thread.join()
    assert response.status_code == 504 and response.json()["error"]["code"] == "late"


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_cancels_its_requests(idle, stream):
    body = json.dumps(ASKED["/v1/completions"] | {"stream": stream}).encode()
    idle.engine.queue = 2
    scope = {
        "type": "http", "method": "POST", "path": "/v1/completions", "query_string": b"", "root_path": "",
        "headers": [(b"host", b"localhost:1"), (b"content-type", b"application/json")],
    }  # fmt: skip

    async def leave_when_asked() -> None:
        left = asyncio.Event()
        messages = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> dict:
            if messages:
                return messages.pop()
            await left.wait()
            return {"type": "http.disconnect"}

        async def send(message: dict) -> None:
            pass

        task = asyncio.ensure_future(create_app(idle)(scope, receive, send))
        while not idle.engine.waiting:
            await asyncio.sleep(0.001)
        left.set()
        await task

    asyncio.run(leave_when_asked())
    idle.engine.look()
    assert idle.engine.waiting == idle.engine.active == 0 and idle.engine.counts["cancelled"] == 1
