"""Runs of stages with random parameters, and an API over them in this process."""

import functools
import json
import pathlib
import threading

import numpy as np
from starlette.testclient import TestClient

from llm3.serve import page
from llm3.serve.api import create_app
from llm3.serve.engine import Engine
from llm3.serve.server import address_of, bind, run
from llm3.serve.service import Service
from llm3.serve.stages import open_stages
from tests.helpers import reference
from tests.helpers.tiny import make_row
from tests.helpers.tiny_export import ADDED, model, tokenizer, write_run
from tests.helpers.tiny_predict import LABELS, MODELS, OBJECTIVES, SOURCES

HOST = "http://127.0.0.1"
CHANGES = {kind: {"layers": 2 if changes else 1, **changes} for kind, changes in MODELS.items()}
for each in ("scores", "answers"):  # tied, a model of random parameters repeats itself
    CHANGES[each]["tie_embeddings"] = False


def write(folder: pathlib.Path, kind: str) -> pathlib.Path:
    """The run RUN=`kind` of one stage. "answers" has a chat template, whose turns end with a token."""
    labels = LABELS if kind == "labels" else ("start", "end") if kind == "spans" else ()
    about = {"lm_head": False} if labels else {}
    template = ADDED if kind == "answers" else ""
    fields = {"sources": {"task": SOURCES[kind]}, "objective": OBJECTIVES[kind], "template": template} | about
    (folder / kind).mkdir(parents=True)
    write_run(folder / kind, *model(**CHANGES[kind]), labels, **fields)
    return folder / kind


def tokens_of(text: str) -> list[int]:
    """<bos> and the text."""
    return [tokenizer().bos_id, *tokenizer().encode(text)]


@functools.cache
def _logprobs(tokens: tuple[int, ...], **changes) -> np.ndarray:
    config, params = model(**changes)
    row = make_row(np.array(tokens), length=len(tokens))
    logits = reference.row_logits(config, params, reference.row_hidden(config, params, row))
    logits -= logits.max(axis=-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def logprobs(tokens, **changes) -> np.ndarray:
    """log p of each token of the vocabulary after each of these: float64 [T, V], by a model, default: of "scores"."""
    return _logprobs(tuple(int(each) for each in tokens), **(changes or CHANGES["scores"]))


def mean_hidden(text: str) -> np.ndarray:
    """The mean of the final hidden states of <bos>, the text and <eos>, by the model of "scores"."""
    config, params = model(**CHANGES["scores"])
    tokens = np.array([*tokens_of(text), tokenizer().eos_id])
    return reference.row_hidden(config, params, make_row(tokens, length=len(tokens))).mean(axis=0)


def likeliest(tokens, count: int) -> list[int]:
    """Greedy tokens after these, one after another."""
    made = list(tokens)
    while len(made) < len(tokens) + count:
        made.append(int(logprobs(made)[-1].argmax()))
    return made[len(tokens) :]


class Server:
    """An API whose engine runs in a thread; `with Server(...) as server: server.client.post(...)`."""

    def __init__(self, workdirs, *, rows: int = 4, queue: int = 64, max_length: int = 128, **options):
        self.engine = Engine(rows, queue)
        self.service = Service(open_stages(workdirs), self.engine, max_length)
        self.app = create_app(self.service, **options)
        self.client = TestClient(self.app, base_url=HOST)
        self._thread = threading.Thread(target=self.engine.run, daemon=True)

    def __enter__(self) -> "Server":
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self.engine.end()
        self._thread.join(60)
        assert not self._thread.is_alive()

    def post(self, path: str, **body):
        return self.client.post(path, content=json.dumps(body), headers={"content-type": "application/json"})


class Listening:
    """The server of an API and its page on a port of its own, `url`, in a thread."""

    def __init__(self, workdirs, *, rows: int = 4, queue: int = 256, max_length: int = 128, most_steps: int = 64):
        self.engine, self._socket, ready = Engine(rows, queue, most_steps), bind("127.0.0.1", 0), threading.Event()
        self.service = Service(open_stages(workdirs), self.engine, max_length)
        self.app, self.url, self.address = (
            create_app(self.service, routes=page.routes(self.service)),
            address_of(self._socket),
            self._socket.getsockname(),
        )
        arguments = (self.app, self.engine, self._socket, ready.set)
        self._thread = threading.Thread(target=run, args=arguments, daemon=True)
        self._thread.start()
        assert ready.wait(60)

    def __enter__(self) -> "Listening":
        return self

    def __exit__(self, *_) -> None:
        self.engine.end()
        self._thread.join(60)
        assert not self._thread.is_alive()
