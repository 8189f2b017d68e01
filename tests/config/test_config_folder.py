"""A config and the hooks that it names import their neighbours, whatever the working directory is."""

import json
import sys

import pytest

from llm3 import config_folder
from llm3.config import load as configfile
from llm3.data.cache import cache
from llm3.data.sources import hooks, lines
from llm3.data.sources import split as sources
from tests.helpers.tiny_records import trained

CONFIG = """
from neighbour import STEPS
from ml_collections import ConfigDict


def get_config():
    import later  # only when it is called
    c = ConfigDict(dict(model=dict(layers=2, d_model=16, heads=2, d_ff=32), tokenizer=dict()))
    c.sources = dict(g=dict(path="json", data_files="rows.jsonl", filters=["neighbour:is_long"]))
    c.stages = dict(a=dict(kind="pretrain", data=dict(g=1.0), steps=STEPS, batch_size=8, sequence_length=later.LENGTH))
    return c
"""
NEIGHBOUR = "from words import LONG\nSTEPS = {steps}\ndef is_long(row): return len(row['text']) >= LONG\n"


def project(folder, steps, long=4):
    folder.mkdir(exist_ok=True)
    (folder / "mine.py").write_text(CONFIG)
    (folder / "neighbour.py").write_text(NEIGHBOUR.format(steps=steps))
    (folder / "words.py").write_text(f"LONG = {long}\n")
    (folder / "later.py").write_text("LENGTH = 32\n")
    return str(folder / "mine.py")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": "x" * (i % 8)}) + "\n" for i in range(40)))
    before = list(sys.path)
    yield
    config_folder.enter("")
    assert sys.path == before, "the folder of a config stayed on the import path"


def records(file):
    return sources.open_split(configfile.load(file).sources["g"], "train", cache_dir=sources.Path("cache"))


def test_two_configs_with_neighbours_of_the_same_name_each_get_their_own(tmp_path):
    first, second = project(tmp_path / "one", steps=3), project(tmp_path / "two", steps=5, long=6)
    assert [configfile.load(file).stages["a"].steps for file in (first, second, first)] == [3, 5, 3]
    assert [len(list(records(file).texts())) for file in (first, second)] == [20, 10]


def test_hooks_are_found_in_the_folder_of_the_config_in_worker_processes_too(tmp_path, monkeypatch):
    monkeypatch.setattr(lines, "PART_BYTES", 200)
    monkeypatch.setattr(lines, "SMALLEST_PART_BYTES", 200)
    found = records(project(tmp_path / "one", steps=3))
    assert len(found.parts()) > 2
    assert cache.build_cache(found, "text", trained, tmp_path / "cache", workers=2, progress=False).documents == 20


def test_the_key_of_a_source_changes_with_the_neighbours_that_its_hooks_import(tmp_path):
    file = project(tmp_path / "one", steps=3)
    keys = [records(file).key]
    for change in ({}, {"long": 5}):  # a change of `words.py`, which `neighbour.py` imports by value
        project(tmp_path / "one", steps=3, **change)
        config_folder.enter("")  # as in a new process
        hooks._load_function.cache_clear()
        keys.append(records(file).key)
    assert keys[0] == keys[1] != keys[2]


def test_a_hook_may_import_its_neighbour_when_it_is_called(tmp_path):
    file = project(tmp_path / "one", steps=3)
    (tmp_path / "one" / "neighbour.py").write_text(
        "STEPS = 3\ndef is_long(row):\n    from words import LONG\n    return len(row['text']) >= LONG\n"
    )
    assert len(list(records(file).texts())) == 20


def test_the_key_of_a_source_changes_with_what_a_package_of_hooks_imports_relatively(tmp_path):
    keys = []
    for long in (4, 4, 5):
        file = project(tmp_path / "one", steps=3)
        package = tmp_path / "one" / "neighbour"
        package.mkdir(exist_ok=True)
        (tmp_path / "one" / "neighbour.py").unlink()
        (package / "__init__.py").write_text("STEPS = 3\nfrom .rules import is_long\n")
        (package / "rules.py").write_text("from . import limits\ndef is_long(row): return row['text'] > limits.X\n")
        (package / "limits.py").write_text(f"X = '{long}'\n")
        config_folder.enter("")  # as in a new process
        hooks._load_function.cache_clear()
        keys.append(records(file).key)
    assert keys[0] == keys[1] != keys[2]


def test_a_config_in_json_names_the_folder_whose_functions_it_uses(tmp_path):
    """As the config of a stage run of an ablation does, which is in another folder than the base's config."""
    file = tmp_path / "runs" / "node.json"
    file.parent.mkdir()
    given = configfile.values(project(tmp_path / "mine", steps=3))
    file.write_text(json.dumps(given | {configfile.FOLDER: str(tmp_path / "mine")}))
    config_folder.enter("")
    config = configfile.load(str(file))
    assert config.stages["a"].steps == 3 and config_folder.current() == str(tmp_path / "mine")
    assert hooks.load_function("neighbour:is_long", "filters")({"text": "long"})
    file.write_text(json.dumps(given))
    configfile.load(str(file))
    assert config_folder.current() == str(file.parent)
