"""Models by name come from the Hub's local cache, and are uploaded to a Hub: here, a stub on this machine."""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from huggingface_hub import constants

from llm3.errors import UserError
from llm3.interop.folder import open_folder
from llm3.interop.hub import check_push, push_folder
from tests.helpers.tiny_files import cut_in_two, write_model

COMMIT, OTHER = "a" * 40, "b" * 40


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache in the Hub's form with org/tiny at `main` and at the tag v1, without a network."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    repository = tmp_path / "models--org--tiny"
    for commit, name in ((COMMIT, "main"), (OTHER, "v1")):
        write_model("llama", repository / "snapshots" / commit, rms_norm_eps=1e-5 if name == "v1" else 1e-6)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / name).write_text(commit)
    cut_in_two(repository / "snapshots" / OTHER)
    return repository


def test_a_name_is_read_from_the_cache_while_offline(cache):
    folder = open_folder("org/tiny", None, "model")
    assert folder.path == cache / "snapshots" / COMMIT
    assert (folder.name, folder.revision, folder.config["norm_epsilon"]) == ("org/tiny", COMMIT, 1e-6)
    assert folder.digest != open_folder("org/tiny", "v1", "model").digest


def test_a_revision_is_a_branch_a_tag_or_a_commit(cache):
    for revision in ("v1", OTHER):
        folder = open_folder("org/tiny", revision, "model")
        assert (folder.revision, folder.config["norm_epsilon"]) == (OTHER, 1e-5)


@pytest.mark.parametrize(("name", "revision"), [("org/other", None), ("org/tiny", "v2"), ("org/tiny", "c" * 40)])
def test_what_is_not_in_the_cache_is_refused_while_offline(cache, name, revision):
    with pytest.raises(UserError) as caught:
        open_folder(name, revision, "--model")
    at = f" at revision {revision!r}" if revision else ""
    said = f"--model={name!r}: {name}{at} is neither a folder nor in the Hub's cache, and HF_HUB_OFFLINE is set"
    assert str(caught.value) == said


def test_a_cache_without_the_weights_is_refused_while_offline(cache):
    (cache / "snapshots" / COMMIT / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"model\.safetensors"):
        open_folder("org/tiny", None, "model")


class Stub(BaseHTTPRequestHandler):
    """As much of the Hub as an upload needs. It keeps what it is sent in `server.requests`."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.requests.append((self.path, body))
        if self.server.status != 200:
            return self.answer({"error": "you may not write here"}, self.server.status)
        address = f"http://127.0.0.1:{self.server.server_port}"
        if self.path.endswith("/repos/create"):
            return self.answer({"url": f"{address}/me/tiny", "id": "me/tiny", "name": "me/tiny"})
        if "/preupload/" in self.path:
            said = {"uploadMode": "regular", "shouldIgnore": False}
            return self.answer({"files": [{"path": each["path"], **said} for each in json.loads(body)["files"]]})
        assert "/commit/" in self.path, self.path
        return self.answer({"commitUrl": f"{address}/me/tiny/commit/{COMMIT}", "commitOid": COMMIT, "success": True})

    def do_GET(self):
        self.answer({"id": "me/tiny", "sha": COMMIT, "siblings": [], "name": "me"})

    def answer(self, content: dict, status: int = 200) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Stub)
    server.requests, server.status = [], 200
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("HF_TOKEN", "hf_stub")
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    yield server
    server.shutdown()
    server.server_close()


def sent(hub) -> dict[str, bytes]:
    """{path: content} of the files in the commit."""
    (body,) = [body for path, body in hub.requests if "/commit/" in path]
    lines = [json.loads(line) for line in body.splitlines()]
    return {
        each["value"]["path"]: base64.b64decode(each["value"]["content"]) for each in lines if each["key"] == "file"
    }


def test_an_upload_makes_a_private_repository_and_sends_every_file(hub, tmp_path):
    folder = write_model("llama", tmp_path)
    check_push("me/tiny")
    assert push_folder(folder, "me/tiny", "a message").endswith("/me/tiny")
    created = json.loads(hub.requests[0][1])
    assert created.get("private") or created["visibility"] == "private"
    found = {path: hashlib.sha256(data).hexdigest() for path, data in sent(hub).items()}
    assert found == {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir()}


def test_an_upload_that_the_hub_refuses_says_that_the_folder_is_there(hub, tmp_path):
    hub.status = 403
    write_model("llama", tmp_path)
    with pytest.raises(UserError, match=rf"--push=me/tiny: {tmp_path} was written, but not uploaded: .*403"):
        push_folder(tmp_path, "me/tiny", "a message")


def test_an_upload_that_cannot_work_is_refused_before_anything_is_written(monkeypatch, tmp_path):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="--push=me/tiny: HF_HUB_OFFLINE is set"):
        check_push("me/tiny")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    with pytest.raises(UserError, match="--push=me/tiny: no token for the Hub"):
        check_push("me/tiny")
    with pytest.raises(UserError, match="--push='a b'"):
        check_push("a b")
