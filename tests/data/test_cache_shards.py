"""A cache is built part by part, by any number of processes, killed and resumed, and always has the same bytes."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from llm3.config.data_schema import SourceConfig
from llm3.data.cache import build as cache_build
from llm3.data.cache import cache, holds, shards
from llm3.data.formats import BadRow
from llm3.data.sources import split as sources
from llm3.errors import UserError
from tests.helpers import tiny_records
from tests.helpers.tiny_records import TEXTS, ListRecords, contents, files, numbered, texts_in_parts, trained


def build(records, directory, **options):
    return cache.build_cache(records, "text", trained, directory, **options)


def mixed(parts=5):
    """Parts with labels, bad rows and copies; one of them is empty."""
    batches = [
        tuple(
            BadRow(f"reason {i % 2}", f"raw {i}")
            if i % 9 == 4
            else {"text": f"{part * i}", "labels": [f"class {i % 3}"]}
            for i in range(30)
        )
        for part in range(parts)
    ]
    return ListRecords((*batches, ()))


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The files of `mixed()`, built by one process."""
    directory = tmp_path_factory.mktemp("alone")
    build(mixed(), directory, max_bad_share=1, workers=1)
    return files(directory)


def test_several_processes_build_the_same_bytes_as_one(alone, tmp_path):
    build(mixed(), tmp_path, max_bad_share=1, workers=2)
    assert files(tmp_path) == alone


def test_slow_parts_are_built_by_other_processes(tmp_path, monkeypatch):
    monkeypatch.setattr(cache_build, "available_cores", lambda: 2)
    asked = []
    monkeypatch.setattr(cache_build, "_in_processes", lambda job, parts, n, done: asked.append((list(parts), n)))
    monkeypatch.setattr(cache_build, "INLINE_SECONDS", 0)
    with pytest.raises(TypeError):  # the stand-in built nothing
        build(mixed(), tmp_path / "a", max_bad_share=1)
    assert asked == [([0, 1, 2, 3, 4, 5], 2)]
    monkeypatch.setattr(cache_build, "INLINE_SECONDS", 100)
    build(mixed(), tmp_path / "b", max_bad_share=1)
    assert len(asked) == 1


@pytest.mark.parametrize("order", [(1, 2, 3), (3, 1, 2), (2, 3, 1)])
def test_the_shares_of_an_array_job_build_the_same_bytes_as_one_process_in_any_order(order, alone, tmp_path):
    found = [build(mixed(), tmp_path, max_bad_share=1, shard=(i, 3), workers=1) for i in order]
    assert found[:2] == [None, None]
    assert isinstance(found[2], cache.TokenCache)
    assert files(tmp_path) == alone


def test_a_share_builds_only_its_own_parts(tmp_path):
    build(mixed(), tmp_path, max_bad_share=1, shard=(2, 3), workers=1)
    assert sorted(path.name for path in tmp_path.glob("tokens-*/shard-*")) == ["shard-000001", "shard-000004"]


def test_there_may_be_more_shares_than_parts(alone, tmp_path):
    found = [build(mixed(), tmp_path, max_bad_share=1, shard=(i, 8), workers=1) for i in range(8, 0, -1)]
    assert [each is not None for each in found] == [False] * 7 + [True]
    assert files(tmp_path) == alone


def test_concurrent_shares_and_full_builds_make_the_same_bytes_as_one_process(alone, tmp_path):
    options = [{"shard": (1, 2)}, {"shard": (2, 2)}, {}, {}]
    errors = []

    def run(each):
        try:
            build(mixed(), tmp_path, max_bad_share=1, workers=1, **each)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(each,)) for each in options]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert files(tmp_path) == alone


def wait_for(what, seconds=600):
    until = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < until
        time.sleep(0.02)


def is_running(pid):
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="looks for processes in /proc")
@pytest.mark.parametrize("workers", [1, 2])
def test_a_killed_build_resumes_and_leaves_no_process(workers, tmp_path):
    build(numbered(4), tmp_path / "whole", workers=1)
    cache_dir, gate = tmp_path / "killed", str(tmp_path / "gate")
    command = [sys.executable, tiny_records.__file__, str(cache_dir), gate, "2", str(workers)]
    root = str(Path(cache.__file__).parents[3])
    process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": root}, stderr=subprocess.DEVNULL)
    finished = {0, 1} if workers == 1 else {0, 1, 3}
    wait_for(lambda: len(list(cache_dir.glob("tokens-????????????????/shard-*"))) == len(finished))
    wait_for(Path(gate + ".reached").exists)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert bool(children) == (workers == 2)
    process.send_signal(signal.SIGKILL)
    process.wait()
    wait_for(lambda: not any(map(is_running, children)))
    [directory] = cache_dir.glob("tokens-????????????????")
    assert not (directory / "manifest.json").exists()
    kept = {path: path.stat().st_mtime_ns for path in directory.glob("shard-*/*")}
    assert {int(path.parent.name.removeprefix("shard-")) for path in kept} == finished
    built = build(numbered(4), cache_dir, workers=1)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert built.documents == 80
    assert files(directory) == files(next((tmp_path / "whole").iterdir()))


@pytest.mark.parametrize("name", ["stream.bin", "documents.npy", "shard.json"])
def test_a_finished_shard_that_is_damaged_before_the_others_are_built_is_rebuilt(name, tmp_path, capsys):
    build(numbered(4), tmp_path / "whole", workers=1)
    build(numbered(4), tmp_path / "parts", shard=(1, 2), workers=1)
    [path] = tmp_path.glob(f"parts/tokens-*/shard-000002/{name}")
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    kept = path.parents[1] / "shard-000000" / "stream.bin"
    modified = kept.stat().st_mtime_ns
    assert (
        build(numbered(4), tmp_path / "parts", shard=(2, 2), workers=1) is None
    )  # a damaged shard of the other share is removed
    assert "damaged" in capsys.readouterr().err
    build(numbered(4), tmp_path / "parts", shard=(1, 2), workers=1)
    assert kept.stat().st_mtime_ns == modified
    assert files(tmp_path / "parts") == files(tmp_path / "whole")


def test_only_the_damaged_shard_of_a_finished_cache_is_rebuilt(tmp_path):
    build(numbered(3), tmp_path)
    whole = files(tmp_path)
    [directory] = tmp_path.iterdir()
    times = {path: path.stat().st_mtime_ns for path in directory.glob("shard-*/*")}
    (directory / "shard-000001" / "stream.bin").write_bytes(b"")
    build(numbered(3), tmp_path)
    assert files(tmp_path) == whole
    changed = {path.parent.name for path in times if path.stat().st_mtime_ns != times[path]}
    assert changed == {"shard-000001"}


def test_a_shard_that_another_process_finished_first_is_kept(tmp_path, monkeypatch):
    plain, raced, written = shards.write_shard, [], []

    def write_while_another_process_builds(directory, *arguments, **options):
        plain(directory, *arguments, **options)
        written.append(directory.name)
        if not raced:
            raced.append(True)
            build(numbered(2), tmp_path)
            raced.extend(path.stat().st_ino for path in tmp_path.glob("tokens-????????????????/shard-000000"))

    monkeypatch.setattr(shards, "write_shard", write_while_another_process_builds)
    assert build(numbered(2), tmp_path).documents == 40
    [directory] = tmp_path.iterdir()
    assert written == ["shard-000000", "shard-000000", "shard-000001"]  # the second one existed already
    assert raced[1:] == [(directory / "shard-000000").stat().st_ino]


def test_the_manifest_is_written_after_all_other_files(tmp_path, monkeypatch):
    plain, placed = os.replace, []
    monkeypatch.setattr(cache_build.os, "replace", lambda a, b: (placed.append(Path(b).name), plain(a, b)))
    build(numbered(2), tmp_path)
    assert placed[-1] == "manifest.json"
    files = {path.name for path in tmp_path.glob("tokens-*/*") if path.is_file()}
    assert set(placed) == files - {holds.SOURCE} | {"tokenizer.json"}


def test_bad_rows_are_counted_by_reason_and_set_aside_with_their_rows(tmp_path, capsys):
    long = BadRow("text is empty", "é" * 300)
    records = ListRecords((({"text": "one"}, BadRow("no field 'text'", '{"x": 1}')), (long, {"text": "two"}, long)))
    built = build(records, tmp_path, max_bad_share=0.6)
    assert sorted(contents(built)) == ["one", "two"]
    assert sorted(built.rows) == [0, 3]
    assert built.bad == {"no field 'text'": 1, "text is empty": 2}
    assert built.rows_read == 5
    assert [json.loads(line) for line in built.bad_rows_file.read_text().splitlines()] == [
        {"source": "fake", "row": 1, "reason": "no field 'text'", "start": '{"x": 1}'},
        {"source": "fake", "row": 2, "reason": "text is empty", "start": "é" * 200},
        {"source": "fake", "row": 4, "reason": "text is empty", "start": "é" * 200},
    ]
    assert "3 of 5 rows (60.00%) cannot be used (no field 'text': 1, text is empty: 2)" in capsys.readouterr().err
    assert build(texts_in_parts(["x"]), tmp_path).bad_rows_file is None


def test_too_many_bad_rows_are_an_error_and_a_higher_limit_needs_no_new_build(tmp_path, monkeypatch):
    records = ListRecords((({"text": "one"}, BadRow("text is empty", "raw")), ({"text": "two"},)))
    for _ in range(2):
        with pytest.raises(UserError) as caught:
            build(records, tmp_path, max_bad_share=0.3)
    message = str(caught.value)
    for part in (
        "source fake",
        "1 of 3",
        "33.33%",
        "text is empty: 1",
        "bad_rows=0.3",
        "bad_rows.jsonl",
        "row 1",
        "raw",
    ):
        assert part in message
    monkeypatch.setattr(ListRecords, "read_part", lambda *_: pytest.fail("read again"))
    assert build(records, tmp_path, max_bad_share=0.34).documents == 2
    with pytest.raises(UserError, match="cannot be used"):
        build(records, tmp_path)


def test_a_row_that_the_row_format_cannot_encode_is_bad_too(tmp_path, monkeypatch):
    def encode(record, tokenizer, template):
        if record["text"] == "no":
            raise BadRow("said no")
        return plain(record, tokenizer, template)

    row_format = text_format()
    plain = row_format.encode
    monkeypatch.setattr(row_format, "encode", encode)
    built = build(texts_in_parts(["yes", "no"]), tmp_path, max_bad_share=0.5)
    assert (contents(built), built.bad) == (["yes"], {"said no": 1})
    assert json.loads(built.bad_rows_file.read_text())["start"] == '{"text": "no"}'


def text_format():
    from llm3.data.formats import text

    return text


def test_a_source_of_bad_rows_only_has_no_documents(tmp_path):
    with pytest.raises(UserError, match="source fake: it has no documents: all its rows are bad"):
        build(ListRecords(((BadRow("empty", ""),),)), tmp_path, max_bad_share=1)


@pytest.mark.parametrize(("rows", "most"), [(7, 10**6), (1000, 100)])
def test_texts_are_encoded_in_batches_of_bounded_size(rows, most, tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "ROWS_AT_A_TIME", rows)
    monkeypatch.setattr(shards, "CHARACTERS_AT_A_TIME", most)
    sizes = []
    plain = type(trained).encode_batch
    monkeypatch.setattr(
        type(trained), "encode_batch", lambda s, t: sizes.append((len(t), sum(map(len, t)))) or plain(s, t)
    )
    build(texts_in_parts(TEXTS), tmp_path / "a")
    assert 1 < max(count for count, _ in sizes) <= rows
    assert max(characters for _, characters in sizes) < most + max(map(len, TEXTS))
    assert sum(count for count, _ in sizes) == len(TEXTS)
    monkeypatch.undo()
    assert files(tmp_path / "a") == files(build(texts_in_parts(TEXTS), tmp_path / "b").reader._directory.parent)


def test_a_changed_source_gets_a_new_cache(tmp_path):
    build(numbered(2), tmp_path)
    changed = dataclasses.replace(numbered(2), batches=(*numbered(2).batches, ({"text": "new"},)))
    assert build(changed, tmp_path).documents == 41
    assert len(list(tmp_path.iterdir())) == 2


def test_token_files_are_mapped_on_demand_and_few_stay_open(tmp_path, monkeypatch):
    monkeypatch.setattr("llm3.data.cache.reader.OPEN_FILES", 2)
    built = build(numbered(6), tmp_path)
    assert built.reader._mapped.cache_info().currsize == 0
    stream = built.read_tokens(0, built.tokens)
    assert built.reader._mapped.cache_info().currsize == 2
    assert (np.concatenate([built.document(i) for i in range(built.documents)]) == stream).all()


def test_worker_processes_import_no_jax():
    code = (
        "import sys, llm3.data.cache.build, llm3.data.formats.text as _; "
        "print(*({'jax', 'datasets'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(cache.__file__).parents[3]
    )
    assert (done.stdout, done.stderr) == ("\n", "")


def test_a_killed_worker_is_an_error_and_finished_shards_are_kept(tmp_path):
    with pytest.raises(UserError, match=r"source fake: a process .* was killed"):
        build(dataclasses.replace(numbered(3), slow=2, gate="die"), tmp_path, workers=2)
    assert build(numbered(3), tmp_path, workers=1).documents == 60


def test_a_file_of_several_parts_becomes_one_cache_of_all_rows(tmp_path, monkeypatch):
    monkeypatch.setattr("llm3.data.sources.lines.PART_BYTES", 1000)
    rows = [json.dumps({"text": text, "kind": f"k{i % 3}"}) for i, text in enumerate(TEXTS)]
    rows[40:40] = ["{broken", '{"text": null, "kind": "k0"}', '{"text": "lacks its kind"}']
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(rows))
    source = SourceConfig(path="json", data_files=str(file), validation="", label="kind", bad_rows=0.1)
    records = sources.open_split(source, "train", cache_dir=tmp_path)
    assert len(records.parts()) > 2
    built = build(records, tmp_path, max_bad_share=source.bad_rows, workers=2)
    assert sorted(contents(built)) == sorted(TEXTS)
    assert [json.loads(rows[row])["text"] for row in built.rows] == contents(built)
    assert [f"k{TEXTS.index(text) % 3}" for text in contents(built)] == [built.label_names[k] for k in built.labels]
    assert (sum(built.bad.values()), built.rows_read) == (3, len(rows))
    assert [json.loads(line)["row"] for line in built.bad_rows_file.read_text().splitlines()] == [40, 41, 42]
