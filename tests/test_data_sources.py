"""Rows come out as text and label; what cannot be used is an error that names it."""

import dataclasses
import json
from pathlib import Path

import datasets
import pytest

from llm3.config import SourceConfig
from llm3.data import sources
from llm3.errors import UserError

SHARED = Path(__file__).parents[2] / "shared"
ROWS = [{"body": f"document {i % 40}", "kind": "ab"[i % 2], "year": 2000 + i % 3} for i in range(200)]

WRONG_FILES = (5, "", [], {}, [5], [["rows.jsonl"]], {"train": 5}, {"train": []}, {"train": {"a": "rows.jsonl"}})


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write("rows.jsonl", ROWS)
    return tmp_path


def write(name, rows):
    Path(name).write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")


def load(split="train", path="json", data_files="rows.jsonl", text="body", **fields):
    source = SourceConfig(path, data_files=data_files, text=text, **fields)
    return sources.load(source, split, cache_dir=Path("cache"))


def test_fields_are_renamed_to_text_and_label_relative_to_the_working_directory():
    rows = load(label="kind")
    assert rows.column_names == ["text", "label"]
    assert rows["text"][:2] == ["document 0", "document 1"]
    assert rows["label"][:3] == ["a", "b", "a"]
    assert load().column_names == ["text"]


def test_a_field_called_text_may_be_the_label():
    write("swapped.jsonl", [{"text": "yes", "label": "a long document"}])
    assert load(data_files="swapped.jsonl", text="label", label="text")[0] == {
        "text": "a long document",
        "label": "yes",
    }


def test_whole_numbers_and_class_numbers_become_label_names():
    assert set(load(label="year")["label"]) == {"2000", "2001", "2002"}
    features = datasets.Features({"body": datasets.Value("string"), "kind": datasets.ClassLabel(names=["no", "yes"])})
    datasets.Dataset.from_dict({"body": ["x", "y"], "kind": [1, 0]}, features).to_parquet("rows.parquet")
    assert load(path="parquet", data_files="rows.parquet", label="kind")["label"][:] == ["yes", "no"]


def test_splits_come_from_the_files_and_names_of_the_source():
    write("other.jsonl", ROWS[:7])
    files = {"learn": "rows.jsonl", "dev": "other.jsonl", "test": ["other.jsonl", "rows.jsonl"]}
    sizes = [
        len(load(split, data_files=files, train="learn", validation="dev")) for split in ("train", "validation", "test")
    ]
    assert sizes == [200, 7, 207]


def test_the_test_split_has_the_name_that_the_source_gives_it():
    write("other.jsonl", ROWS[:7])
    assert len(load("test", data_files={"train": "rows.jsonl", "eval": "other.jsonl"}, test="eval")) == 7


def test_a_held_out_share_is_disjoint_by_content_complete_and_always_the_same():
    write("many.jsonl", [{"body": f"document {i % 997}"} for i in range(2000)])  # each text two or three times
    options = dict(data_files="many.jsonl", validation="", validation_share=0.2)
    train, validation = load(**options)["text"][:], load("validation", **options)["text"][:]
    assert not set(train) & set(validation)
    assert len(train) + len(validation) == 2000
    assert len(validation) / 2000 == pytest.approx(0.2, abs=0.04)
    assert load("validation", **options)["text"][:] == validation


def test_without_a_validation_split_all_rows_train_and_validation_is_refused():
    assert len(load(validation="")) == 200
    with pytest.raises(UserError, match="validation_share=0"):
        load("validation", validation="")


def test_max_documents_keeps_that_many_of_the_train_split():
    assert len(load(max_documents=9)) == 9
    assert len(load(max_documents=1000)) == 200


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(data_files="row.jsonl"), r"row\.jsonl does not exist: did you mean 'rows\.jsonl'"),
        (dict(data_files="nowhere/rows.jsonl"), r"nor does its folder .*nowhere"),
        (dict(data_files="*.csv"), r"no file matches \*\.csv"),
        (dict(text="bod"), r"unknown field 'bod': did you mean 'body'\? valid: body, kind, year"),
        (dict(label="kinds"), r"unknown field 'kinds': did you mean 'kind'"),
        (dict(text="year"), r"field 'year' holds int64, expected strings"),
        (dict(train="trian"), r"unknown split 'trian': .*train"),
        (dict(split="validation"), r"unknown split 'validation': .*valid: train .*validation_share"),
        (dict(split="dev"), r"split='dev'.*valid: test, train, validation"),
        (dict(path="builtin:nothing"), r"nothing.*valid: numerical, numerical_task, python"),
    ],
)
def test_a_wrong_name_is_an_error_with_the_nearest_right_ones(options, message):
    with pytest.raises(UserError, match=message):
        load(**options)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        *((dict(data_files=wrong), r"sources\.\*\.data_files=.*expected a file name, a list") for wrong in WRONG_FILES),
        (dict(), r"sources\.\*\.data_files=None: path='json' needs data_files or data_dir"),
        (dict(path="text"), "path='text' needs data_files or data_dir"),
        (dict(data_files="x", validation_share=1.0), r"sources\.\*\.validation_share=1\.0: expected a share"),
        (dict(data_files="x", validation_share=-0.1), r"validation_share=-0\.1"),
        (dict(data_files="x", max_documents=-1), r"sources\.\*\.max_documents=-1: expected at least 0"),
    ],
)
def test_a_source_that_makes_no_sense_is_refused_by_its_field(fields, message):
    with pytest.raises(UserError, match=message):
        SourceConfig(**dict(path="json") | fields)


def test_a_source_of_files_takes_names_lists_splits_or_a_folder():
    for files in ("rows.jsonl", ["rows.jsonl"], {"train": "rows.jsonl"}, {"train": ["rows.jsonl"]}):
        assert len(load(data_files=files)) == 200
    assert SourceConfig("json", data_dir="folder").data_files is None


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b"", "empty.txt is empty"),
        ("latin.txt", b"caf\xc3\xa9\ncaf\xe9\n", r"latin\.txt is not UTF-8: byte 0xe9 at offset 9"),
        ("late.txt", b"a" * (1 << 20) + "é".encode() + b"\xff", "not UTF-8: byte 0xff at offset 1048578"),
        ("split.txt", b"a" * ((1 << 20) - 1) + b"\xe2\x82(", "not UTF-8: byte 0xe2 at offset 1048575"),
        ("cut.txt", "word é".encode()[:-1], "ends within a character, at offset 5"),
    ],
)
def test_a_file_that_is_empty_or_not_utf8_is_named_with_the_offset(name, content, message):
    Path(name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        load(path="text", data_files=name, text="text")


def test_a_character_across_two_reads_is_utf8():
    Path("long.txt").write_text("a" * ((1 << 20) - 1) + "é", encoding="utf-8")
    assert len(load(path="text", data_files="long.txt", text="text")) == 1


def test_a_null_text_is_an_error_that_names_its_row():
    write("null.jsonl", [*ROWS[:5], {"body": None, "kind": "a", "year": 1}])
    with pytest.raises(UserError, match="field 'body' is missing or null in row 5"):
        load(data_files="null.jsonl")


def test_rows_without_text_or_label_are_left_out_where_the_config_says_so_and_counted(caplog):
    holes = [{"body": None, "kind": "a", "year": 1}, {"body": "x", "kind": None, "year": 1}]
    write("null.jsonl", [*ROWS[:5], *holes, *ROWS[5:9]])
    kept = load(data_files="null.jsonl", label="kind", skip_null=True)
    assert kept["text"] == [row["body"] for row in ROWS[:9]]
    assert "2 of 11 rows have no body or no kind" in caplog.text
    assert len(load(data_files="null.jsonl", skip_null=True)) == 10  # without a label, only the text counts


def test_no_rows_and_damaged_json_are_errors():
    Path("none.json").write_text("[]")
    with pytest.raises(UserError, match="has no rows"):
        load(data_files="none.json")
    Path("damaged.jsonl").write_text('{"body": "x"\n{{')
    with pytest.raises(UserError, match=r"damaged\.jsonl: cannot read split 'train': JSON"):
        load(data_files="damaged.jsonl")


def test_a_name_that_the_hub_does_not_answer_for_is_an_error(monkeypatch):
    def unreachable(*_, **__):
        raise ConnectionError("no route to the hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(UserError, match=r"some/corpus: not found here.*no route to the hub"):
        load(path="some/corpus", data_files=None)


HUB = SourceConfig("some/questions", text="body", label="kind", local="medical/questions", train="train[:90%]")


def copies(*splits, folder="copies/medical/questions"):
    """Local copies of these splits, of 3, 2 and 1 documents."""
    Path(folder).mkdir(parents=True)
    for split in splits:
        count = {"train": 3, "validation": 2, "test": 1}[split]
        write(f"{folder}/{split}.jsonl", [{"body": f"{split} {i}", "kind": "x"} for i in range(count)])


def read(source, split):
    return sources.load(source, split, cache_dir=Path("cache"))["text"][:]


def test_with_a_data_dir_a_source_is_read_from_its_local_files_by_split():
    copies("train", "validation", "test")
    local = sources.resolved(HUB, "copies")
    assert {split: len(read(local, split)) for split in ("train", "validation", "test")} == {
        "train": 3,
        "validation": 2,
        "test": 1,
    }
    assert read(local, "test") == ["test 0"]
    assert (local.text, local.label) == ("body", "kind")


def test_without_a_data_dir_or_a_local_folder_a_source_stays_as_it_is():
    copies("train")
    assert sources.resolved(HUB, "") is HUB
    builtin = SourceConfig("builtin:python")
    assert sources.resolved(builtin, "copies") is builtin


def test_local_copies_without_a_validation_file_hold_out_the_share():
    copies("train")
    write("copies/medical/questions/train.jsonl", [{"body": f"document {i}", "kind": "x"} for i in range(300)])
    local = sources.resolved(dataclasses.replace(HUB, validation="", validation_share=0.3), "copies")
    train, validation = read(local, "train"), read(local, "validation")
    assert len(train) + len(validation) == 300
    assert len(validation) == pytest.approx(90, abs=30)
    with pytest.raises(UserError, match="validation_share=0"):
        read(sources.resolved(HUB, "copies"), "validation")
    with pytest.raises(UserError, match=r"unknown split 'test'.*valid: train"):
        read(local, "test")


@pytest.mark.parametrize(
    ("data_dir", "message"),
    [
        ("copy", r"config\.data_dir='copy'.*copy/medical/questions/train\.jsonl does not exist: .*mean 'copies'"),
        ("copies/medicine", r"medicine/medical/questions/train\.jsonl.*did you mean 'medical'"),
        ("copies", r"copies/medical/questions/train\.jsonl does not exist: .*did you mean 'trian\.jsonl'"),
        ("rows.jsonl", r"rows\.jsonl is not a folder"),
    ],
)
def test_a_missing_local_copy_names_the_field_the_file_and_the_nearest_name(data_dir, message):
    copies()
    write("copies/medical/questions/trian.jsonl", ROWS)
    with pytest.raises(UserError, match=message):
        sources.resolved(HUB, data_dir)


def test_the_shared_medical_questions_load_with_their_labels():
    if not SHARED.exists():
        pytest.skip("the folder of shared real text is absent")
    files = {split: str(SHARED / f"data/medical/medquad/{split}.jsonl") for split in ("train", "validation")}
    rows = load("validation", data_files=files, text="question", label="question_type")
    assert len(rows) == 703
    assert len(set(rows["label"])) > 5
