"""The built-in corpus is the same on every run, and its splits share neither modules nor texts."""

import collections
import hashlib
import itertools
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm3.data.sources import corpus
from llm3.data.sources.corpus import CLASSES, SPLITS
from llm3.data.sources.docstrings import PACKAGES, Docstring, file_docstrings
from llm3.errors import UserError

pytestmark = pytest.mark.slow  # it reads all installed packages
NAMES = ("python", "numerical", "numerical_task", "tools")
QUALIFIED_NAME = re.compile(r"(?:^|\n\n)((?:flax|jax|numpy|optax|orbax|scipy)[\w.]*)\n\n")


@pytest.fixture(scope="session")
def directory(tmp_path_factory):
    return tmp_path_factory.mktemp("corpus")


@pytest.fixture(scope="session")
def splits(directory):
    def load(name, split):
        return corpus.load_corpus(name, split, directory)

    return {name: {split: load(name, split) for split in SPLITS} for name in NAMES}


def normal(text):
    return " ".join(text.lower().split())


def entries(documents):
    """The (qualified name, docstring) pairs of documents."""
    for document in documents:
        parts = QUALIFIED_NAME.split(document)[1:]
        yield from zip(parts[::2], parts[1::2], strict=True)


def pairs_of_splits(of_split):
    return itertools.combinations((of_split[split] for split in SPLITS), 2)


@pytest.mark.parametrize("name", NAMES)
def test_no_document_or_example_is_in_two_splits(splits, name):
    texts = {split: {normal(text) for text in splits[name][split]["text"]} for split in SPLITS}
    assert all(texts.values())
    assert not any(one & other for one, other in pairs_of_splits(texts))


def test_no_docstring_of_the_domain_is_in_two_splits(splits):
    texts = {split: [normal(text) for _, text in entries(splits["numerical"][split]["text"])] for split in SPLITS}
    assert sum(map(len, texts.values())) > 10_000
    assert not any(set(one) & set(other) for one, other in pairs_of_splits(texts))


def test_the_examples_of_a_split_are_docstrings_of_modules_of_that_split(splits):
    def beginning(text):
        return normal(text)[:150]

    for split in SPLITS:
        inside = {beginning(corpus.mask_names(text)) for _, text in entries(splits["numerical"][split]["text"])}
        assert {beginning(text) for text in splits["numerical_task"][split]["text"]} <= inside


def test_the_corpora_are_large_enough_and_cover_their_subjects(splits):
    characters = {name: sum(map(len, splits[name]["train"]["text"])) for name in ("python", "numerical")}
    assert characters["python"] > 1_500_000
    assert characters["numerical"] > 5_000_000
    everything = {name: "\n".join(splits[name]["train"]["text"]) for name in characters}
    for phrase in ("argparse", "itertools", "The standard type hierarchy"):
        assert phrase in everything["python"]
    for phrase in (
        "numpy.",
        "scipy.special.",
        "jax.",
        "optax.",
        "orbax.checkpoint.",
        "flax.nnx.",
    ):
        assert f"\n\n{phrase}" in everything["numerical"]


def test_every_class_is_in_every_split_and_none_is_a_majority(splits):
    for split in SPLITS:
        counts = collections.Counter(splits["numerical_task"][split]["label"])
        assert set(counts) == set(CLASSES)
        assert min(counts.values()) >= 15
        assert max(counts.values()) < 0.35 * counts.total()


def test_examples_do_not_name_the_library_that_they_document(splits):
    named = re.compile(
        r"numpy|scipy|jax|flax|optax|orbax|\b(np|jnp|nnx|lax|linen|stats|signal|sparse)\b", re.IGNORECASE
    )
    for split in SPLITS:
        for example in splits["numerical_task"][split]["text"]:
            assert not named.search(example)
            assert 200 <= len(example) <= 800


def test_masking_goes_by_words():
    assert corpus.mask_names("np.fft of NumPy, JAX's scipy_stats; input, ifft, Jnp") == (
        "[name].[name] of [name], [name]'s [name]_[name]; input, ifft, [name]"
    )


def test_a_second_load_reads_what_the_first_has_kept(splits, directory, monkeypatch):
    monkeypatch.delattr(corpus, "_extract_into")
    again = corpus.load_corpus("numerical", "train", directory)
    assert again["text"][0] == splits["numerical"]["train"]["text"][0]


def test_extracting_twice_gives_the_same_bytes(splits, directory, tmp_path):
    corpus.load_corpus("python", "train", tmp_path)
    digests = [
        {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in root.glob("builtin-python-*/*")}
        for root in (directory, tmp_path)
    ]
    assert len(digests[0]) == 3
    assert digests[0] == digests[1]
    (built,) = tmp_path.iterdir()
    (tmp_path / "any").mkdir()
    assert built.stat().st_mode == (tmp_path / "any").stat().st_mode, "others may read it, as far as the umask allows"


def test_extraction_follows_source_order_and_reads_attached_docstrings(tmp_path):
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "hidden.py").write_text('"""Hidden."""')
    (tmp_path / "broken.py").write_text("def {{ template }}")
    (tmp_path / "module.py").write_text(
        '"""Module."""\nif True:\n    class A:\n        """Class."""\n        def f(self):\n            """Method."""\n'
        'add_newdoc("package", "thing", ("attribute", """\n    Attached text.\n    """))\n'
    )
    found = list(file_docstrings(tmp_path, "package"))
    assert [(name, text) for _, name, text in found] == [
        ("package.module", "Module."),
        ("package.module.A", "Class."),
        ("package.module.A.f", "Method."),
        ("package.thing.attribute", "Attached text."),
    ]
    assert {docstring.module for docstring in found} == {"package.module"}


def test_attached_docstrings_without_a_name_that_is_spelt_out_are_skipped(tmp_path):
    (tmp_path / "module.py").write_text(
        'add_newdoc(place, name, text)\nadd_newdoc(name, "Some text.")\nadd_newdoc("thing", "Attached text.")\n'
    )
    (found,) = file_docstrings(tmp_path, "package")
    assert (found.name, found.text) == ("package.thing", "Attached text.")


modules = st.sampled_from([f"{package}.part{i}" for package in ("numpy.lib", "jax", "json") for i in range(9)])


@given(st.lists(st.builds(Docstring, modules, st.just("name"), st.text("ab C\n", max_size=6))))
@settings(max_examples=200, deadline=None)
def test_a_text_is_kept_once_and_a_module_has_one_split(docstrings):
    kept = corpus.without_repeats(docstrings)
    assert sorted(normal(docstring.text) for docstring in kept) == sorted({normal(d.text) for d in docstrings} - {""})
    split_of = corpus.split_modules(kept, 0.2)
    assert set(split_of) == {docstring.module for docstring in kept}
    size = collections.Counter()
    for docstring in kept:
        size[split_of[docstring.module]] += len(docstring.text)
    assert max(size["validation"], size["test"]) <= 0.2 * size.total() + 1e-9


def test_capping_keeps_the_same_examples_whatever_the_order():
    examples = [Docstring("numpy.lib.a", str(i), f"text {i}") for i in range(20)]
    kept = corpus.capped(examples, 5)
    assert len(kept) == 5
    assert set(kept) == set(corpus.capped(examples[::-1], 5))


def test_a_missing_package_is_an_error_that_names_it(monkeypatch, tmp_path):
    monkeypatch.setitem(PACKAGES, "numpy", "numpy-that-nobody-has")
    with pytest.raises(UserError, match="numpy-that-nobody-has, which is not installed"):
        corpus.load_corpus("numerical", "train", tmp_path)
