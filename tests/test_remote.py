"""The copy of a run in a bucket, and the lock of such a run. Folders take the place of a bucket."""

import json

import pytest
from fsspec.implementations.dirfs import DirFileSystem
from fsspec.implementations.local import LocalFileSystem

from llm3 import remote
from llm3.distributed import bucket_lock
from llm3.distributed import lock as locks
from llm3.distributed.bucket_lock import bucket_held
from llm3.errors import UserError
from llm3.files import shown
from llm3.handoff.start import read_start


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    """The folder of the run gs://bucket/run."""
    store = DirFileSystem(str(tmp_path), LocalFileSystem(auto_mkdir=True))
    monkeypatch.setattr(remote, "file_system", lambda url: store)
    monkeypatch.setattr(remote, "_copies", {})
    (tmp_path / "bucket" / "run").mkdir(parents=True)
    return tmp_path / "bucket" / "run"


def files(folder):
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_small_files_are_copied_both_ways_and_checkpoints_and_locks_are_not(bucket):
    for name in ("a.json", "pretrain/row.json", "pretrain/checkpoints/1/x", ".lock"):
        (bucket / name).parent.mkdir(parents=True, exist_ok=True)
        (bucket / name).write_text(name)
    copy = remote.workdir_path("gs://bucket/run/", "--workdir")
    assert files(copy) == {name: name for name in ("a.json", "pretrain/row.json")}
    assert (copy / "pretrain" / "checkpoints").is_dir(), "whether a stage has checkpoints is asked by its folder"
    (copy / "a.json").unlink()
    (copy / "pretrain" / "metrics.jsonl").write_text("1\n")
    (copy / "pretrain" / "checkpoints" / "y").write_text("")
    (copy / ".lock").write_text("")
    remote.push()
    assert files(bucket) == {name: name for name in ("pretrain/row.json", "pretrain/checkpoints/1/x", ".lock")} | {
        "pretrain/metrics.jsonl": "1\n"
    }


def test_another_process_sees_what_the_first_one_pushed(bucket):
    first, second = remote.Copy("gs://bucket/run"), remote.Copy("gs://bucket/run")
    (first.folder / "a.json").write_text("1")
    first.push()
    second.pull()
    assert files(second.folder) == {"a.json": "1"}
    (first.folder / "a.json").write_text("22")
    first.push()
    second.pull()
    assert files(second.folder) == {"a.json": "22"}
    (first.folder / "a.json").unlink()
    first.push()
    second.pull()
    assert files(second.folder) == files(bucket) == {}


def test_messages_name_the_bucket_and_not_the_copy(bucket, tmp_path):
    copy = remote.workdir_path("gs://bucket/run", "--workdir")
    assert remote.url_of(copy / "pretrain") == "gs://bucket/run/pretrain" and remote.url_of(tmp_path) is None
    assert shown(f"{copy}/report.html is written") == "gs://bucket/run/report.html is written"
    with pytest.raises(UserError, match="expected gs://BUCKET/RUN"):
        remote.workdir_path("gs://bucket/", "--workdir")


def test_the_run_to_start_from_may_be_in_a_bucket(bucket, tmp_path):
    start = read_start({"run": "gs://bucket/run", "stage": "pretrain"}, tmp_path, "start")
    assert start.run == remote.workdir_path("gs://bucket/run", "--workdir")
    assert remote.address(start.run) == "gs://bucket/run" and remote.address(tmp_path) == str(tmp_path.resolve())


def test_a_run_in_a_bucket_has_one_writer_until_it_is_dead(bucket, monkeypatch):
    monkeypatch.setattr(locks, "BEAT_SECONDS", 0.1)
    copy = remote.workdir_path("gs://bucket/run", "--workdir")
    with bucket_held(copy):
        with pytest.raises(UserError, match=r"gs://bucket/run is in use by process .* since"), bucket_held(copy):
            pass
        held = (bucket / ".lock").read_text()
    assert not (bucket / ".lock").exists()
    (bucket / ".lock").write_text(held)  # as of a process that was killed
    monkeypatch.setattr(bucket_lock.socket, "gethostname", lambda: "another")
    with bucket_held(copy):
        assert json.loads((bucket / ".lock").read_text())["holder"]["host"] == "another"
