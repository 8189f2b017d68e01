"""A split of a source becomes records; an unusable name, file or field is an error that names it."""

import hashlib
import json
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest

from llm3.config.data_schema import SourceConfig
from llm3.data import tokenizer
from llm3.data.cache import cache
from llm3.data.formats import BadRow
from llm3.data.sources import selection
from llm3.data.sources import split as sources
from llm3.errors import UserError

BYTES = tokenizer.train([], 260)
FIXTURES = Path(__file__).parent / "fixtures"
ROWS = [{"body": f"document {i % 40}", "kind": "ab"[i % 2], "year": 2000 + i % 3} for i in range(200)]

WRONG_FILES = (5, "", [], {}, [5], [["rows.jsonl"]], {"train": 5}, {"train": []}, {"train": {"a": "rows.jsonl"}})


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write("rows.jsonl", ROWS)
    return tmp_path


def write(name, rows):
    Path(name).write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")


def source_of(path="json", data_files="rows.jsonl", text="body", **fields):
    return SourceConfig(path, data_files=data_files, text=text, **fields)


def open_split(split="train", **fields):
    return sources.open_split(source_of(**fields), split, cache_dir=Path("cache"))


def load(split="train", **fields):
    """The records that can be used."""
    opened = open_split(split, **fields)
    rows = [record for part in opened.parts() for _, record in opened.read_part(part)]
    return [record for record in rows if not isinstance(record, BadRow)]


def texts(split="train", **fields):
    return [record["text"] for record in load(split, **fields)]


def reference_hash(text):
    return hashlib.sha256(text.encode()).digest()[:8]


def test_records_hold_the_named_fields_relative_to_the_working_directory():
    assert load(label="kind")[:2] == [
        {"text": "document 0", "labels": ["a"]},
        {"text": "document 1", "labels": ["b"]},
    ]
    assert load()[0] == {"text": "document 0"}


def test_a_field_called_text_may_be_the_label():
    write("swapped.jsonl", [{"text": "yes", "label": "a long document"}])
    assert load(data_files="swapped.jsonl", text="label", label="text") == [
        {"text": "a long document", "labels": ["yes"]}
    ]


def test_splits_come_from_the_files_and_names_of_the_source():
    write("other.jsonl", ROWS[:7])
    files = {"learn": "rows.jsonl", "dev": "other.jsonl", "test": ["other.jsonl", "rows.jsonl"]}
    sizes = [
        len(load(split, data_files=files, train="learn", validation="dev")) for split in ("train", "validation", "test")
    ]
    assert sizes == [200, 7, 207]


def test_the_source_names_its_test_split():
    write("other.jsonl", ROWS[:7])
    assert len(load("test", data_files={"train": "rows.jsonl", "eval": "other.jsonl"}, test="eval")) == 7


def test_a_held_out_share_is_disjoint_by_content_complete_and_always_the_same():
    rows = [f"document {i % 997}" for i in range(2000)]  # each text two or three times
    write("many.jsonl", [{"body": row} for row in rows])
    options = dict(data_files="many.jsonl", validation="", validation_share=0.2)
    below = (int(0.2 * 2**64)).to_bytes(8, "big")
    assert texts("validation", **options) == [row for row in rows if reference_hash(row) < below]
    assert texts(**options) == [row for row in rows if reference_hash(row) >= below]
    assert len(texts("validation", **options)) / 2000 == pytest.approx(0.2, abs=0.04)


@pytest.mark.parametrize("share", [0.02, 0.3, 0.97])
def test_each_class_of_two_or_more_texts_is_on_both_sides_and_other_rows_stay_where_their_hash_puts_them(share):
    rows = [{"body": f"document {i % 800}", "kind": f"{i % 800 % 3}"} for i in range(1000)]
    rows += [{"body": f"pair {i}", "kind": f"rare {i // 2}"} for i in range(60)]
    rows += [{"body": f"single {i}", "kind": f"lone {i}"} for i in range(30)]
    rows += [{"body": "twice", "kind": "same text"}] * 2
    write("classes.jsonl", rows)
    options = dict(data_files="classes.jsonl", label="kind", validation="", validation_share=share)
    train, validation = ([(r["text"], *r["labels"]) for r in load(side, **options)] for side in ("train", "validation"))
    assert sorted(train + validation) == sorted((row["body"], row["kind"]) for row in rows)
    assert not {text for text, _ in train} & {text for text, _ in validation}
    both = {"0", "1", "2", *(f"rare {i}" for i in range(30))}
    alone = {"same text", *(f"lone {i}" for i in range(30))}
    assert ({kind for _, kind in train}, {kind for _, kind in validation}) == (both | alone, both)
    below = (int(share * 2**64)).to_bytes(8, "big")
    usual = [text for text, kind in validation if kind in ("0", "1", "2")]
    assert usual == [row["body"] for row in rows[:1000] if reference_hash(row["body"]) < below]


def test_each_class_of_documents_with_several_labels_is_on_both_sides():
    rows = [{"body": f"document {i}", "kind": sorted({f"{i % 3}", f"{i % 7}", f"rare {i // 4}"})} for i in range(80)]
    write("several.jsonl", rows)
    options = dict(data_files="several.jsonl", label="kind", validation="", validation_share=0.1)
    sides = [{each for row in load(side, **options) for each in row["labels"]} for side in ("train", "validation")]
    assert sides[0] == sides[1] == {label for row in rows for label in row["kind"]}


def nothing(row):
    return False


def test_a_side_without_rows_says_which_field_empties_it(tmp_path, capsys):
    def build(split, **fields):
        return cache.build_cache(open_split(split, **fields), "text", BYTES, tmp_path / "cache", max_bad_share=1.0)

    write("five.jsonl", [{"body": f"document {i}"} for i in range(5)])
    five = dict(data_files="five.jsonl", validation="")
    with pytest.raises(
        UserError, match=r"validation_share=0\.01 of its 5 rows leaves none for validation: set a larger"
    ):
        build("validation", validation_share=0.01, **five)
    with pytest.raises(UserError, match=r"validation_share=0\.99 of its 5 rows leaves none for train: set a smaller"):
        build("train", validation_share=0.99, **five)
    with pytest.raises(UserError, match=r"each of its classes has one text only, which is for training: add rows"):
        build("validation", validation_share=0.9, label="body", **five)
    write("equal.jsonl", [{"body": "one"}] * 3)
    for split in ("train", "validation"):
        side = open_split(split, data_files="equal.jsonl", validation="", validation_share=0.5)
        assert side.why_empty() == "validation_share cannot divide 3 rows with one text: add rows"
    with pytest.raises(UserError, match=r"filters=\['tests\.data\.test_sources:nothing'\] remove all of its 200 rows"):
        build("train", filters=["tests.data.test_sources:nothing"])
    with pytest.raises(UserError, match=r"it has no documents: all its rows are bad \(longer than 5 bytes: 200\)"):
        build("train", max_row_bytes=5)
    assert "(longer than 5 bytes: 200), see sources.*.max_row_bytes" in capsys.readouterr().err


def test_numbers_of_choices_in_a_small_split_are_counted_as_in_the_train_split(tmp_path):
    options = [f"choice {i}" for i in range(4)]
    for name, answers in (("train", (1, 2, 4)), ("test", (3, 1)), ("zero", (0, 1))):
        write(f"{name}.jsonl", [{"q": "?", "options": options, "answer": each} for each in answers])

    def correct(split="test", **files):
        rows = load(split, data_files=files, prompt="q", choices="options", answer="answer")
        return [record["correct"] for record in rows]

    assert correct(train="train.jsonl", test="test.jsonl") == [2, 0]
    assert correct(train="zero.jsonl", test="test.jsonl") == [3, 1]
    with pytest.raises(UserError, match=r"source json test\.jsonl: answer: numbers from 1 to 3, none of them 0 or"):
        correct(test="test.jsonl")


def test_bad_rows_are_held_out_like_other_rows():
    write("holes.jsonl", [{"body": None if i % 4 == 0 else f"document {i}"} for i in range(2000)])
    sides = {}
    for split in ("train", "validation"):
        opened = open_split(split, data_files="holes.jsonl", validation="", validation_share=0.2)
        rows = [row for part in opened.parts() for row in opened.read_part(part)]
        sides[split] = {number for number, row in rows if isinstance(row, BadRow)}
        assert len(sides[split]) / len(rows) == pytest.approx(0.25, abs=0.07)
    assert sides["train"] | sides["validation"] == set(range(0, 2000, 4))
    assert not sides["train"] & sides["validation"]


def test_without_a_validation_split_all_rows_train_and_validation_is_refused():
    assert len(load(validation="")) == 200
    with pytest.raises(UserError, match="validation_share=0"):
        open_split("validation", validation="")


@pytest.mark.parametrize("most", [1, 9, 100, 199, 200, 1000])
def test_max_documents_keeps_the_rows_with_the_smallest_hashes_and_the_first_of_equal_texts(most):
    rows = [(reference_hash(row["body"]), number) for number, row in enumerate(ROWS)]
    opened = open_split(max_documents=most)
    kept = [number for part in opened.parts() for number, _ in opened.read_part(part)]
    assert kept == sorted(number for _, number in sorted(rows)[:most])


def test_max_documents_does_not_count_bad_rows_and_takes_none_from_the_other_splits():
    write("null.jsonl", [{"body": None}] * 50 + [{"body": f"document {i}"} for i in range(50)])
    files = {"train": "null.jsonl", "validation": "rows.jsonl"}
    assert len(load(data_files=files, max_documents=20)) == 20
    assert len(load("validation", data_files=files, max_documents=20)) == 200


@pytest.mark.parametrize("count", [1, 100, 7000, 19_999])
def test_the_threshold_of_a_sample_equals_a_full_sort(count, monkeypatch):
    monkeypatch.setattr(selection, "ROWS_AT_A_TIME", 256)
    hashes = np.random.default_rng(0).integers(0, 5000, 20_000).tolist()  # with ties
    pairs = list(zip(hashes, range(20_000), strict=True))
    assert selection.sample_threshold(iter(pairs), count) == sorted(pairs)[count - 1]


def test_a_sample_of_all_rows_has_no_threshold():
    assert selection.sample_threshold(iter([(5, 0), (3, 1)]), 2) is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(data_files="row.jsonl"), r"row\.jsonl does not exist: did you mean 'rows\.jsonl'"),
        (dict(data_files="nowhere/rows.jsonl"), r"nor does its folder .*nowhere"),
        (dict(data_files="*.csv"), r"no file matches \*\.csv"),
        (dict(text="bod"), r"unknown field 'bod': did you mean 'body'\? valid: body, kind, year"),
        (dict(label="kinds"), r"unknown field 'kinds': did you mean 'kind'"),
        (dict(text="{body} {kin}"), r"unknown field 'kin': did you mean 'kind'"),
        (dict(text="{body"), r"field '\{body': expected '\}' before end of string; expected a column, or a template"),
        (dict(pair="bodi"), r"unknown field 'bodi': did you mean 'body'"),
        (dict(tag="kinds"), r"unknown field 'kinds': did you mean 'kind'"),
        (dict(train="trian"), r"unknown split 'trian': .*train"),
        (dict(split="validation"), r"unknown split 'validation': .*valid: train .*validation_share"),
        (dict(split="dev"), r"split='dev'.*valid: test, train, validation"),
        (dict(path="builtin:python", sample_by="line"), r"sample_by='line': its files are built-in; expected text"),
        (dict(path="builtin:nothing"), r"nothing.*valid: numerical, numerical_task, python"),
    ],
)
def test_a_wrong_name_is_an_error_with_the_nearest_right_ones(options, message):
    with pytest.raises(UserError, match=message):
        open_split(**options)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        *((dict(data_files=wrong), r"sources\.\*\.data_files=.*expected a file name, a list") for wrong in WRONG_FILES),
        (dict(), r"sources\.\*\.data_files=None: path='json' needs data_files or data_dir"),
        (dict(path="text"), "path='text' needs data_files or data_dir"),
        (dict(data_files="x", validation_share=1.0), r"sources\.\*\.validation_share=1\.0: expected a share"),
        (dict(data_files="x", validation_share=-0.1), r"validation_share=-0\.1"),
        (dict(data_files="x", answer_base=1), r"sources\.\*\.answer_base=1: expected choices with it"),
        (dict(data_files="x", max_documents=-1), r"sources\.\*\.max_documents=-1: expected at least 0"),
    ],
)
def test_an_inconsistent_source_is_an_error_that_names_the_field(fields, message):
    with pytest.raises(UserError, match=message):
        SourceConfig(**dict(path="json") | fields)


def test_data_files_may_be_a_name_a_list_splits_or_a_folder():
    for files in ("rows.jsonl", ["rows.jsonl"], {"train": "rows.jsonl"}, {"train": ["rows.jsonl"]}):
        assert len(load(data_files=files)) == 200
    assert SourceConfig("json", data_dir="folder").data_files is None


@pytest.mark.parametrize(("path", "name"), [("text", "empty.txt"), ("json", "empty.jsonl"), ("csv", "empty.csv")])
def test_an_empty_file_is_named(path, name):
    Path(name).touch()
    with pytest.raises(UserError, match=f"{name} is empty"):
        open_split(path=path, data_files=["rows.jsonl", name], text="text")


@pytest.mark.parametrize("content", ["\n \n", "[]"])
def test_no_rows_are_an_error(content):
    Path("none.json").write_text(content)
    with pytest.raises(UserError, match=r"(train split|split 'train') has no rows"):
        open_split(data_files="none.json")


def test_a_field_may_be_missing_in_some_rows_which_are_then_bad():
    write("some.jsonl", [{"other": 1}, {"body": "x"}, {"other": 2}])
    opened = open_split(data_files="some.jsonl")
    rows = [(number, str(row)) for part in opened.parts() for number, row in opened.read_part(part)]
    assert rows == [(0, "no field 'body'"), (1, "{'text': 'x'}"), (2, "no field 'body'")]


def test_the_key_changes_with_the_file_the_split_and_fields_that_change_records():
    def key(split="train", **fields):
        return open_split(split, **fields).key

    files = {"train": "rows.jsonl", "validation": "rows.jsonl"}
    keys = [key(), key(label="kind"), key(text="kind"), key(max_documents=5)]
    keys += [key(split, data_files=files, validation="", validation_share=0.5) for split in ("train", "validation")]
    assert len(set(keys)) == len(keys)
    assert key("validation", data_files=files) == key() == key(bad_rows=0.5) == key(test="other")
    Path("rows.jsonl").write_text(Path("rows.jsonl").read_text().replace("document 3", "document 4"))
    assert key() != keys[0]


def test_the_key_of_a_table_changes_with_its_file():
    datasets.Dataset.from_list(ROWS).to_parquet("rows.parquet")
    options = dict(path="parquet", data_files="rows.parquet")
    keys = [open_split(**options).key for _ in range(2)]
    assert keys[0] == keys[1]
    datasets.Dataset.from_list(ROWS[:50]).to_parquet("rows.parquet")
    assert open_split(**options).key != keys[0]
    assert len(load(**options)) == 50


def test_an_unreachable_hub_is_an_error_that_names_the_source(monkeypatch):
    def unreachable(*_, **__):
        raise ConnectionError("no route to the hub")

    monkeypatch.setattr(datasets, "load_dataset_builder", unreachable)
    with pytest.raises(UserError, match=r"some/corpus: not found here.*no route to the hub"):
        open_split(path="some/corpus", data_files=None)


def test_a_bucket_that_nothing_here_can_read_is_an_error_with_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(UserError, match="to read it from a bucket, pip install s3fs"):
        open_split(data_files="s3://bucket/rows.jsonl")


def test_medical_questions_load_with_their_labels():
    files = {split: str(FIXTURES / f"medical/medquad/{split}.jsonl") for split in ("train", "validation")}
    rows = load("validation", data_files=files, text="question", label="question_type")
    assert len(rows) == 27
    assert len({label for row in rows for label in row["labels"]}) > 5
