"""The flags of `serve`: what is out of range, or would open the server to everyone, is refused in one line."""

import importlib.util

import pytest

from llm3.__main__ import main


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--port=70000", "--port=70000: expected 0 to 65535"),
        ("--batch_size=0", "--batch_size=0: expected 1 to 1024"),
        ("--queue=0", "--queue=0: expected 1 to"),
        ("--max_length=1", "--max_length=1: expected at least 2"),
        ("--host=0.0.0.0", "--host=0.0.0.0: others could use the server: expected --api_key=KEY as well"),
        ("--host=example.org", "--host=example.org: others could use the server"),
        ("--api_key=short", "--api_key: expected at least 8"),
        ("--host=::1", "no such directory"),
        ("--host=0.0.0.0 --api_key=long-enough", "no such directory"),
        ("--apikey=x", "--apikey: no such flag of serve; did you mean '--api_key'"),
    ],
)
def test_flags_are_checked_before_anything_is_read(capsys, monkeypatch, flags, message):
    monkeypatch.delenv("LLM3_API_KEY", raising=False)
    assert main(["serve", "--workdir=no/such", *flags.split()]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_key_may_come_from_the_environment(capsys, monkeypatch):
    monkeypatch.setenv("LLM3_API_KEY", "long-enough")
    assert main(["serve", "--workdir=no/such", "--host=0.0.0.0"]) == 2
    assert "no such directory" in capsys.readouterr().err


def test_a_library_that_is_missing_is_named_with_its_extra(capsys, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "uvicorn" else real(name))
    assert main(["serve", "--workdir=no/such"]) == 2
    assert "serve: needs uvicorn, which is not installed: pip install 'llm3[serve]'" in capsys.readouterr().err
