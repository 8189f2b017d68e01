"""A document of plain text is a line, a paragraph or a file, as `sample_by` says."""

import gzip
from pathlib import Path

import datasets
import pytest

from llm3.data.formats import BadRow
from llm3.data.sources import lines
from llm3.errors import UserError, say
from tests.helpers.tiny_sources import open_split, read, texts

STORIES = ["once\nthere was\n\na fox\n", "\n\n\nof snow\r\n\r\nand rain", "one line"]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("stories").mkdir()
    for number, story in enumerate(STORIES):
        Path(f"stories/{number}.txt").write_bytes(story.encode())
    return tmp_path


def test_paragraphs_are_runs_of_lines_between_blank_lines_under_the_numbers_of_their_first_lines():
    files = dict(path="text", data_files=[f"stories/{number}.txt" for number in range(3)])
    assert read(**files, sample_by="paragraph") == [
        (0, {"text": "once\nthere was"}),
        (3, {"text": "a fox"}),
        (7, {"text": "of snow"}),
        (9, {"text": "and rain"}),
        (10, {"text": "one line"}),
    ]


@pytest.mark.parametrize(
    "fields",
    [
        dict(path="stories"),
        dict(path="stories", train="train[:100%]"),
        dict(path="text", data_dir="stories"),
        dict(path="text", data_files="stories/*.txt"),
        dict(path="text", data_files={"train": "stories/*.txt"}),
        dict(path="text", data_files=[f"stories/{number}.txt" for number in range(3)], sample_by="document"),
    ],
)
def test_each_file_of_a_folder_is_a_document_with_its_line_breaks(fields, capsys):
    say.cache_clear()
    Path("stories/README.md").write_text("# Words")
    assert read(**fields) == [(n, {"text": story.replace("\r\n", "\n")}) for n, story in enumerate(STORIES)]
    assert ("each file is a document" in capsys.readouterr().err) == ("sample_by" not in fields)


def test_a_file_that_is_named_has_a_document_per_line_and_this_is_said(capsys):
    say.cache_clear()
    assert texts(path="text", data_files="stories/0.txt") == ["once", "there was", "a fox"]
    assert "source text stories/0.txt: each line is a document; sample_by" in capsys.readouterr().err
    assert texts(path="stories", sample_by="line")[:3] == ["once", "there was", "a fox"]


@pytest.mark.parametrize("sample_by", ["paragraph", "document"])
@pytest.mark.parametrize("size", [1, 1 << 20])
def test_parts_hold_every_document_once_under_its_own_number(sample_by, size, monkeypatch):
    monkeypatch.setattr(lines, "PART_BYTES", size)
    monkeypatch.setattr(lines, "SMALLEST_PART_BYTES", 1)
    for number in range(20):
        Path(f"stories/{number:02}.txt").write_text(f"{number}\n" * (number % 5 + 1) + "\n" * (number % 3) + "end\n")
    opened = open_split(path="stories", sample_by=sample_by)
    parts = opened.parts()
    assert len(parts) == {"paragraph": {1: 47, 1 << 20: 23}, "document": {1: 23, 1 << 20: 1}}[sample_by][size]
    by_part = [list(opened.read_part(part)) for part in reversed(parts)][::-1]
    found = [row for part in by_part for row in part]
    monkeypatch.setattr(lines, "PART_BYTES", 1 << 30)
    whole = open_split(path="stories", sample_by=sample_by)
    assert found == [row for part in whole.parts() for row in whole.read_part(part)]
    theirs = datasets.load_dataset("stories", split="train", sample_by=sample_by, cache_dir="cache")["text"]
    kept = [text.strip("\n") for text in theirs if text.strip()]
    assert [row["text"].strip("\n") for _, row in found] == kept


def test_a_document_that_cannot_be_used_costs_only_itself():
    Path("stories/1.txt").write_bytes(b"")
    Path("stories/2.txt").write_bytes(b"caf\xe9")
    Path("stories/3.txt").write_text("x" * 60)
    Path("stories/4.txt").write_bytes(gzip.compress(b"packed\n\n" + b"x" * 60))
    by_file = read(path="stories", max_row_bytes=50)
    assert [str(row) for _, row in by_file[1:]] == ["text is empty", "not UTF-8", *["longer than 50 bytes"] * 2]
    named = [f"stories/{number}.txt" for number in (0, 2, 3, 4)]
    found = read(path="text", data_files=named, sample_by="paragraph", max_row_bytes=50)
    assert [str(row) if isinstance(row, BadRow) else row["text"] for _, row in found] == [
        "once\nthere was",
        "a fox",
        "not UTF-8",
        "longer than 50 bytes",
        "packed",
        "longer than 50 bytes",
    ]


def test_sample_by_is_for_plain_text_only():
    Path("rows.jsonl").write_text('{"text": "x"}')
    with pytest.raises(UserError, match="sample_by='document': its files are json; expected text files"):
        open_split(data_files="rows.jsonl", sample_by="document")


@pytest.mark.parametrize("sample_by", ["line", "paragraph", "document"])
def test_a_byte_order_mark_is_no_part_of_the_first_document(sample_by):
    Path("marked.txt").write_bytes(lines.BOM + b"once")
    assert texts(path="text", data_files="marked.txt", sample_by=sample_by) == ["once"]


def test_a_single_file_that_cannot_be_divided_names_the_field_that_helps():
    for number in (1, 2):
        Path(f"stories/{number}.txt").unlink()
    fields = dict(path="stories", validation="", validation_share=0.5)
    sides = [open_split(split, **fields) for split in ("train", "validation")]
    reasons = [side.why_empty() for side in sides]
    assert reasons == ["validation_share cannot divide 1 row with one text: add rows, or set sample_by='paragraph'"] * 2


@pytest.mark.parametrize("sample_by", ["line", "paragraph"])
def test_files_whose_lines_are_not_found_are_refused_by_name(sample_by):
    Path("stories/1.txt").write_bytes("once\nthere was\n".encode("utf-16"))
    Path("stories/2.txt").write_bytes(b"once\rthere was\r")
    for number, reason in ((1, " is UTF-16; expected UTF-8"), (2, r": its lines end in \\r; expected \\n")):
        with pytest.raises(UserError, match=rf"stories/{number}\.txt{reason}"):
            read(path="text", data_files=f"stories/{number}.txt", sample_by=sample_by)
    whole = [row for _, row in read(path="stories")]
    assert str(whole[1]) == "not UTF-8" and whole[2] == {"text": "once\rthere was\r"}


def test_a_folder_among_the_names_of_files_is_refused_with_the_field_for_it():
    with pytest.raises(UserError, match=r"stories is a folder: expected data_dir='stories' .*data_files='stories/\*'"):
        open_split(path="text", data_files="stories")
