"""The server on a socket: what no client library sends, clients that leave, and how it ends."""

import json
import signal
import socket
import subprocess
import sys
import time
import urllib.request

import pytest

from llm3.errors import UserError
from llm3.serve.server import bind
from tests.helpers import forks
from tests.helpers import tiny_serve as tiny
from tests.helpers.tiny_run import ROOT

MODEL = "adapt"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return tiny.write(tmp_path_factory.mktemp("runs"), "scores")


@pytest.fixture(scope="module")
def server(run):
    with tiny.Listening([run]) as made:
        yield made


def answered(server, sent: bytes) -> bytes:
    """What the server says to these bytes, until it closes the connection."""
    with socket.create_connection(server.address, timeout=20) as connection:
        connection.sendall(sent)
        return b"".join(iter(lambda: connection.recv(65536), b""))


@pytest.mark.parametrize(
    "sent",
    [
        b"GET /health HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n"
        + b"".join(b"x%d: y\r\n" % n for n in range(9000))
        + b"\r\n",
        b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n",
        b"\x00\xff\xfe no request at all\r\n\r\n",
        b"POST /score HTTP/1.1\r\nhost: localhost\r\ncontent-length: -1\r\n\r\n",
        b"GET /health HTTP/1.1\r\nconnection: close\r\n\r\n",
        b"GET /../../../etc/passwd HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n",
        b"POST /score HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\nconnection: close\r\n"
        b"transfer-encoding: chunked\r\n\r\n" + b"10000\r\n" + b" " * 65536 + b"\r\n",
    ],
    ids=["headers", "long path", "no request", "negative length", "no host", "path", "unfinished body"],
)
def test_what_is_no_request_is_refused(server, sent):
    if b"chunked" in sent:
        sent += (b"10000\r\n" + b" " * 65536 + b"\r\n") * 16
    assert answered(server, sent).startswith(b"HTTP/1.1 4")
    assert json.load(urllib.request.urlopen(f"{server.url}/health")) == {"status": "ok"}


def test_a_port_that_is_taken_is_named(server):
    with pytest.raises(UserError, match=rf"^--host=127.0.0.1 --port={server.address[1]}: .*expected another --port"):
        bind("127.0.0.1", server.address[1])


def post(url: str, **body) -> urllib.request.Request:
    return urllib.request.Request(url, json.dumps(body).encode(), {"content-type": "application/json"})


@pytest.mark.slow
def test_sigterm_lets_the_requests_that_have_begun_be_answered(run):
    command = [sys.executable, "-m", "llm3", "serve", f"--workdir={run}", "--port=0"]
    with subprocess.Popen(command, cwd=ROOT, env=forks.environment(), stdout=subprocess.PIPE, text=True) as process:
        try:
            line = process.stdout.readline()
            assert line.startswith("1 model at http://127.0.0.1:")
            url = line.split()[-1]
            body = {"model": MODEL, "prompt": "a", "max_tokens": 100, "temperature": 1, "stream": True}
            with urllib.request.urlopen(post(f"{url}/v1/completions", seed=1, **body), timeout=120) as response:
                process.send_signal(signal.SIGTERM)
                events = response.read().decode().split("\n\n")
            assert events[-2] == "data: [DONE]" and '"finish_reason": "' in events[-3]
            assert process.wait(60) == 0
        finally:
            process.kill()


@pytest.mark.slow
def test_a_client_that_closes_its_connection_frees_its_row(server):
    body = json.dumps({"model": MODEL, "prompt": "a", "max_tokens": 120, "n": 60, "stream": True}).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    with socket.create_connection(server.address, timeout=60) as connection:
        connection.sendall(head + b"content-length: %d\r\n\r\n" % len(body) + body)
        assert connection.recv(100).startswith(b"HTTP/1.1 200")
    end = time.monotonic() + 60
    while server.engine.waiting or server.engine.active:
        assert time.monotonic() < end
        time.sleep(0.05)
    assert server.engine.counts["cancelled"] > 30
