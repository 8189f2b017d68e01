"""Compiled programs that a workdir keeps: who finds them, who writes them, and what a killed process leaves."""

import contextlib
import os

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.compilation_cache import compilation_cache

from llm3.distributed import compiled
from llm3.files import PLAN


@pytest.fixture(autouse=True)
def enabled():
    """The tests run without it."""
    jax.config.update("jax_enable_compilation_cache", True)
    compilation_cache.reset_cache()
    yield
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()


def a_command(workdir, scale=2.0) -> compiled.Programs:
    """What a command compiles, and what it finds, that needs one program of its own."""
    x = jnp.zeros(7)  # outside: it is a program too
    before = compiled.programs()
    with compiled.kept_in(workdir):
        jax.jit(lambda x: x * scale + 1)(x)
    return compiled.Programs(*(now - then for now, then in zip(compiled.programs(), before, strict=True)))


def programs(workdir) -> list:
    return sorted(compiled.folder(workdir).glob("*-cache"))


def test_a_later_command_finds_what_an_earlier_one_compiled(tmp_path):
    assert a_command(tmp_path) == (1, 0)
    assert a_command(tmp_path) == (0, 1)
    assert a_command(tmp_path / "another") == (1, 0)


def test_nothing_is_written_before_there_is_a_program_and_what_is_written_is_marked_as_a_cache(tmp_path):
    with compiled.kept_in(tmp_path / "run"):
        assert not list(tmp_path.iterdir())
    a_command(tmp_path / "run")
    tag = compiled.folder(tmp_path / "run") / "CACHEDIR.TAG"
    assert tag.read_bytes().startswith(b"Signature: 8a477f597d28d172789f06886806bc55")
    assert [each.name for each in (tmp_path / "run").iterdir()] == ["compiled"]


def test_stage_runs_of_an_ablation_share_its_programs(tmp_path):
    (tmp_path / PLAN).write_text("{}")
    assert a_command(tmp_path / "runs" / "a-0") == (1, 0)
    assert a_command(tmp_path / "runs" / "b-0") == (0, 1)
    assert len(programs(tmp_path)) == 1 and not (tmp_path / "runs").exists()


def test_a_workdir_that_cannot_be_written_is_read(tmp_path, monkeypatch):
    a_command(tmp_path)
    monkeypatch.setattr(os, "access", lambda *_: False)
    names = programs(tmp_path)
    assert a_command(tmp_path) == (0, 1) and a_command(tmp_path, scale=3.0) == (1, 0)
    assert programs(tmp_path) == names
    assert a_command(tmp_path / "new") == (1, 0) and not (tmp_path / "new").exists()


def test_what_jax_was_told_is_left_alone(tmp_path):
    with told("jax_compilation_cache_dir", str(tmp_path / "own")):
        assert a_command(tmp_path / "run") == (1, 0)
        assert (tmp_path / "own").is_dir() and not (tmp_path / "run").exists()
    with told("jax_enable_compilation_cache", False):
        assert a_command(tmp_path / "run") == (0, 0) and not (tmp_path / "run").exists()


@contextlib.contextmanager
def told(name, value):
    before = getattr(jax.config, name)
    compilation_cache.reset_cache()
    jax.config.update(name, value)
    yield
    jax.config.update(name, before)
    compilation_cache.reset_cache()


def test_a_process_that_is_killed_while_it_writes_costs_that_program_alone(tmp_path):
    a_command(tmp_path)
    (half,) = programs(tmp_path)
    half.write_bytes(half.read_bytes()[:100])
    half.with_name(half.name.replace("-cache", "-atime")).unlink()  # which jax writes second
    assert a_command(tmp_path) == (1, 0)
    assert a_command(tmp_path) == (0, 1)


def test_the_folder_is_bounded_and_what_was_not_used_for_longest_goes_first(tmp_path, monkeypatch):
    a_command(tmp_path, scale=1.5)
    a_command(tmp_path, scale=2.5)
    size = sum(path.stat().st_size for path in programs(tmp_path))
    monkeypatch.setattr(compiled, "LIMIT", size + 50)
    assert a_command(tmp_path, scale=1.5) == (0, 1)
    assert a_command(tmp_path, scale=3.5) == (1, 0)
    assert len(programs(tmp_path)) == 2
    assert a_command(tmp_path, scale=1.5) == (0, 1) and a_command(tmp_path, scale=2.5) == (1, 0)


def test_machine_code_for_another_cpu_is_not_found(tmp_path, monkeypatch):
    one, other = tmp_path / "one", tmp_path / "other"
    one.write_text("processor : 0\nmodel name : A\nflags : sse avx\nprocessor : 1\nmodel name : A\nflags : sse avx\n")
    other.write_text("processor : 0\nmodel name : A\nflags : sse avx avx512f\ncpu MHz : 1\n")
    kinds = {compiled.cpu_kind(each) for each in (one, other, tmp_path / "missing")}
    assert len(kinds) == 3
    a_command(tmp_path)
    monkeypatch.setattr(compiled, "cpu_kind", lambda: "other")
    assert a_command(tmp_path) == (1, 0)
