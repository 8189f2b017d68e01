"""Classes, masked tokens, spans and embeddings: those of the model, whatever else is in the request."""

import numpy as np
import pytest

from tests.helpers import reference
from tests.helpers import tiny_serve as tiny
from tests.helpers.tiny import make_row
from tests.helpers.tiny_export import model, tokenizer
from tests.helpers.tiny_predict import LABELS, document, softmax

CLOSE = {"rel": 2e-4, "abs": 2e-5}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    with tiny.Server([tiny.write(folder, kind) for kind in ("labels", "proposals", "spans")]) as made:
        yield made


def hidden(kind: str, tokens) -> np.ndarray:
    config, params = model(**tiny.CHANGES[kind])
    return reference.row_hidden(config, params, make_row(np.array(tokens), length=len(tokens)))


def head(kind: str, states: np.ndarray) -> np.ndarray:
    _, params = model(**tiny.CHANGES[kind])
    return states @ params["head"]["kernel"].astype(np.float64) + params["head"]["bias"]


def post(server, path: str, **body) -> dict:
    response = server.post(path, **body)
    assert response.status_code == 200, response.text
    return response.json()


def test_a_text_has_all_labels_with_their_probabilities_the_likeliest_first(server):
    texts = ["The quick brown fox", "naïve 数学 🙂", "x" * 40]
    together = post(server, "/classify", model="labels/adapt", text=texts)["results"]
    for text, found in zip(texts, together, strict=True):
        shares = softmax(head("labels", hidden("labels", document(text)))[-1])
        order = np.argsort(-shares)
        assert [each["label"] for each in found["labels"]] == [LABELS[place] for place in order]
        assert [each["probability"] for each in found["labels"]] == pytest.approx(shares[order].tolist(), **CLOSE)
        assert found["predicted"] == [LABELS[order[0]]] and found["truncated"] == (text == "x" * 40)
    (alone,) = post(server, "/classify", model="labels/adapt", text=texts[0])["results"]
    assert alone["predicted"] == together[0]["predicted"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (" ", "text: text is empty"),
        (["a", " "], "text[1]: text is empty"),
        ([], "text: expected 1 to 256 strings, not 0"),
        (["a"] * 257, "text: expected 1 to 256 strings, not 257"),
        (["a", 3], "text: expected a string or a list of strings, not a list"),
        (None, "text is missing: expected a string or a list of strings"),
    ],
)
def test_texts_without_an_answer_are_refused(server, text, message):
    refused = server.post("/classify", model="labels/adapt", text=text)
    assert refused.status_code == 400
    assert refused.json()["error"] == {
        "message": message, "type": "invalid_request_error", "param": "text", "code": None,
    }  # fmt: skip


def test_each_mask_token_has_its_likeliest_tokens(server):
    text, mask = "The <|mask|> fox<|mask|>", tokenizer().mask_id
    found = post(server, "/fill", model="proposals/adapt", text=text, top_k=3)["results"]
    tokens = np.array([1, *tokenizer().encode("The"), mask, *tokenizer().encode(" fox"), mask, 2])
    config, params = model(**tiny.CHANGES["proposals"])
    shares = softmax(reference.row_logits(config, params, hidden("proposals", tokens)))[tokens == mask]
    for each, expected in zip(found, shares, strict=True):
        best = np.argsort(-expected)[:3]
        assert [one["probability"] for one in each] == pytest.approx(expected[best].tolist(), **CLOSE)
        assert [one["token"] for one in each] == [
            tokenizer().decode([token]) or tokenizer().tokens[token] for token in best
        ]
    refused = server.post("/fill", model="proposals/adapt", text="no mask")
    assert refused.status_code == 400 and "no mask token" in refused.json()["error"]["message"]


def test_an_answer_is_the_best_span_of_the_context_with_its_characters(server):
    question, context = "fox?", "quick fox"
    found = post(server, "/spans", model="spans/adapt", question=question, context=context)
    before = [1, *tokenizer().encode(question), 2]
    inside = tokenizer().encode_spans([context])
    logits = head("spans", hidden("spans", [*before, *inside.ids, 2]))
    starts, ends = logits[len(before) : -1].T
    pairs = [(starts[a] + ends[b], a, b) for a in range(len(starts)) for b in range(a, len(starts))]
    score, first, last = max(pairs)
    assert found["score"] == pytest.approx(score - logits[0].sum(), **CLOSE)
    if score > logits[0].sum():
        assert (found["start"], found["end"]) == (inside.starts[first], inside.ends[last])
        assert found["answer"] == context[found["start"] : found["end"]] != ""
    else:
        assert found["answer"] == "" and found["start"] is None


def test_a_text_that_no_window_holds_has_no_embedding(server):
    refused = server.post("/v1/embeddings", model="labels/adapt", input=["a", "x" * 40])
    message = "input[1]: it has more than the 16 tokens"
    assert refused.status_code == 400 and message in refused.json()["error"]["message"]
