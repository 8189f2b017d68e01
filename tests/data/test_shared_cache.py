"""One cache for all runs of a user: where it is, what two processes do at once, and what may be removed."""

import errno
import gc
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llm3.__main__ import main
from llm3.config.data_schema import SourceConfig
from llm3.data.cache import cache, holds, inventory, place
from llm3.data.cache.place import cache_directory
from llm3.data.library import Library
from llm3.data.tokenizer import Tokenizer
from llm3.errors import UserError, say
from tests.helpers import tiny_records
from tests.helpers.tiny_records import ListRecords, contents, files, numbered, texts_in_parts, trained
from tests.helpers.tiny_sources import as_json

DAY = 86400.0


def build(records, directory, **options):
    return cache.build_cache(records, "text", trained, directory, **options)


@pytest.fixture
def home(tmp_path, monkeypatch):
    for variable in (place.VARIABLE, "XDG_CACHE_HOME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    say.cache_clear()
    return tmp_path / "home"


def test_the_cache_is_that_of_the_config_the_variables_or_the_home_in_this_order(home, tmp_path, monkeypatch):
    found = [cache_directory("", tmp_path / "run")]
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # to be ignored, says its specification
    found.append(cache_directory("", tmp_path / "run"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    found.append(cache_directory("", tmp_path / "run"))
    monkeypatch.setenv(place.VARIABLE, "~/mine")
    found += [cache_directory("", tmp_path / "run"), cache_directory("given", tmp_path / "run")]
    own = home / ".cache" / "llm3"
    assert found == [own, own, tmp_path / "xdg" / "llm3", home / "mine", Path("given")]
    monkeypatch.setenv(place.VARIABLE, "s3://bucket/cache")
    with pytest.raises(UserError, match=r"\$LLM3_CACHE_DIR='s3://bucket/cache': s3:// is not supported"):
        cache_directory("", tmp_path / "run")


def test_a_mounted_bucket_is_refused_before_anything_is_tokenized_and_left_as_it_was(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))  # as gcsfuse

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(UserError, match="folders cannot be renamed there, as in a mounted bucket"):
        cache_directory(str(tmp_path / "new" / "cache"), tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_began_with_its_cache_inside_keeps_it(home, tmp_path):
    (tmp_path / "run" / "cache").mkdir(parents=True)
    assert cache_directory("", tmp_path / "run") == home / ".cache" / "llm3", "the run has not begun"
    (tmp_path / "run" / "tokenizer.json").touch()
    assert cache_directory("", tmp_path / "run") == tmp_path / "run" / "cache"


@pytest.mark.parametrize("why", ["there is no home directory", "cannot be written"])
def test_without_a_home_that_can_be_written_the_cache_is_in_the_workdir_which_is_said(
    home, tmp_path, monkeypatch, capsys, why
):
    if why == "cannot be written":
        home.write_text("a file")
    else:
        monkeypatch.setattr(place.Path, "expanduser", lambda path: (_ for _ in ()).throw(RuntimeError("no home")))
    assert cache_directory("", tmp_path / "run") == tmp_path / "run" / "cache"
    said = capsys.readouterr().err
    assert why in said and "set LLM3_CACHE_DIR or config.cache_dir" in said


@pytest.mark.parametrize("killed", [False, True])
def test_two_processes_that_build_the_same_entry_both_end_with_the_bytes_of_one(tmp_path, killed):
    """The other process is in its third of four parts while this one builds all of them."""
    build(numbered(4), tmp_path / "alone", workers=1)
    shared, gate = tmp_path / "shared", str(tmp_path / "gate")
    command = [sys.executable, tiny_records.__file__, str(shared), gate, "2", "1"]
    environment = {**os.environ, "PYTHONPATH": str(Path(cache.__file__).parents[3])}
    other = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    try:
        until = time.monotonic() + 600
        while not os.path.exists(gate + ".reached"):
            assert other.poll() is None and time.monotonic() < until
            time.sleep(0.02)
        entry = next(each for each in shared.glob("tokens-*") if not each.suffix)
        assert not holds.removed(entry, entry), "the other process builds it"
        built = build(numbered(4), shared, workers=1)
        if not killed:
            Path(gate).touch()
            assert other.wait(600) == 0
    finally:
        other.kill()
        other.wait()
    assert built.documents == 80 and contents(build(numbered(4), shared)) == contents(built)
    assert files(entry) == files(next((tmp_path / "alone").iterdir()))


ROWS = [{"text": f"text {i}", "pair": f"and {i % 3}", "kind": f"k{i % 2}", "topic": f"t{i % 5}"} for i in range(40)]


def labelled(label, **fields):
    return SourceConfig("json", data_files="rows.jsonl", text="text", pair="pair", label=label, **fields)


def test_a_second_set_of_labels_of_the_same_texts_encodes_nothing_again(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [json.dumps(row) for row in ROWS]
    rows[7:7] = ['{"text": "only", "pair": "here", "kind": null, "topic": "t1"}']  # a row for one set of labels only
    Path("rows.jsonl").write_text("\n".join(rows))
    fields = {"bad_rows": 0.1, "validation": "", "validation_share": 0.2}
    alone = Library({"t": labelled("topic", **fields)}, trained, Path("alone")).cache("t", "train")
    Library({"k": labelled("kind", **fields)}, trained, Path("cache")).cache("k", "train")
    plain, encoded = Tokenizer.encode_batch, []
    monkeypatch.setattr(Tokenizer, "encode_batch", lambda own, texts: encoded.extend(texts) or plain(own, texts))
    second = Library({"t": labelled("topic", **fields)}, trained, Path("cache")).cache("t", "train")
    assert second.fingerprint == alone.fingerprint and second.label_names == [f"t{i}" for i in range(5)]
    directory = second.reader._directory
    assert files(directory) == files(Path("alone") / directory.name)
    assert {"only", "here"} <= set(encoded) and len(encoded) < 20, "rows that the first could not use, or held out"


def test_damaged_tokens_of_other_labels_are_not_taken_over(tmp_path):
    records = [
        ListRecords((tuple({"text": text, "labels": [label]} for text in tiny_records.TEXTS),)) for label in "ab"
    ]
    first = build(records[0], tmp_path)
    stream = first.reader._directory / "shard-000000" / "stream.bin"
    stream.write_bytes(stream.read_bytes()[::-1])
    assert sorted(contents(build(records[1], tmp_path))) == sorted(tiny_records.TEXTS)


def used(path, days):
    os.utime(path, (time.time() - days * DAY,) * 2)


@pytest.fixture
def three(tmp_path):
    """A cache of three entries, last used 1, 10 and 100 days ago, and their directories."""
    directories = []
    for number, days in enumerate((1, 10, 100)):
        directories.append(build(texts_in_parts([f"{number} " * 99]), tmp_path / "cache").reader._directory)
        used(directories[-1], days)
    gc.collect()  # what has read them
    return tmp_path / "cache", directories


def names(entries):
    return [each.path for each in entries]


def test_entries_are_removed_by_age_and_the_least_recently_used_by_size(three):
    directory, (new, old, oldest) = three
    found = inventory.entries(directory)
    assert names(found) == [new, old, oldest] and {each.kind for each in found} == {"tokens"}
    assert found[0].size == sum(map(len, files(new).values())) and found[0].documents == 1
    assert names(inventory.prune(directory, unused_for=30 * DAY, most_bytes=None, dry_run=True).removed) == [oldest]
    assert oldest.is_dir()
    assert names(inventory.prune(directory, unused_for=30 * DAY, most_bytes=None).removed) == [oldest]
    assert names(inventory.prune(directory, unused_for=None, most_bytes=found[0].size).removed) == [old]
    assert names(inventory.entries(directory)) == [new] and not list(directory.glob(".*"))


def test_what_a_process_uses_stays_and_its_use_is_noted(three):
    directory, (new, old, oldest) = three
    read = build(texts_in_parts(["2 " * 99]), directory)
    assert names(inventory.entries(directory))[0] == oldest, "it was used just now"
    pruned = inventory.prune(directory, unused_for=0.0, most_bytes=None)
    assert set(names(pruned.removed)) == {new, old} and names(pruned.in_use) == [oldest]
    assert contents(read) == ["2 " * 99]
    del read
    gc.collect()
    assert names(inventory.prune(directory, unused_for=0.0, most_bytes=None).removed) == [oldest]


def test_on_a_disk_without_locks_what_was_used_in_the_last_week_stays(three, monkeypatch):
    def refuse(*_):
        raise OSError(95, "Operation not supported")

    directory, (new, old, oldest) = three
    monkeypatch.setattr(holds.fcntl, "flock", refuse)
    assert build(texts_in_parts(["1 " * 99]), directory).documents == 1  # notes its use
    pruned = inventory.prune(directory, unused_for=0.0, most_bytes=None)
    assert names(pruned.removed) == [oldest] and set(names(pruned.in_use)) == {new, old}


def test_an_entry_that_is_removed_while_it_is_opened_is_built_again(tmp_path, monkeypatch):
    build(numbered(1), tmp_path)
    gc.collect()
    plain, removals = holds.hold, []

    def hold(entry):
        if not removals:
            removals.append(holds.removed(entry, entry))
        return plain(entry)

    monkeypatch.setattr(holds, "hold", hold)
    assert build(numbered(1), tmp_path).documents == 20 and removals == [True]


def test_the_cache_is_listed_and_pruned_from_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_bytes(as_json(["one", "two"]))
    library = Library({"t": SourceConfig("json", data_files="rows.jsonl")}, trained, Path("cache"))
    records = library.cache("t", "train")
    assert main(["cache", "ls", "--cache_dir=cache"]) == 0
    out = capsys.readouterr().out
    assert all(part in out for part in ("json rows.jsonl", "train", "tokens", str(tmp_path), "1 entry, ")), out
    assert main(["cache", "prune", "--cache_dir=cache", "--all"]) == 0
    assert "1 in use" in capsys.readouterr().out.splitlines()[-1] and records.documents == 2
    del library, records
    gc.collect()
    assert main(["cache", "prune", "--cache_dir=cache", "--all", "--dry_run"]) == 0
    assert "would be removed" in capsys.readouterr().out and list(Path("cache").glob("tokens-*"))
    assert main(["cache", "prune", "--cache_dir=cache", "--max_gb=0"]) == 0
    assert "0 in use" in capsys.readouterr().out and not list(Path("cache").glob("tokens-*"))
