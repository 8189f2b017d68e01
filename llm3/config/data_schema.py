"""The knobs of texts: a tokenizer, and sources; parts of `llm3.config.schema`."""

import dataclasses
from typing import Any

from llm3.errors import UserError, at_least


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
    """A byte-level BPE trained on the train splits of `sources`, or an existing tokenizer.json at `path`."""

    vocab_size: int = 4096
    sources: list[str] = dataclasses.field(default_factory=list)  # empty: those of the pretrain stages
    path: str = ""
    train_bytes: int = 40_000_000  # of texts that it is trained on; of more, a fixed pseudo-random sample
    add: list[str] = dataclasses.field(default_factory=list)  # new tokens, behind those of the tokenizer at `path`
    chat_template: str = ""  # how turns become text: jinja, or a file of it; "": the bare texts, an end to each answer


@dataclasses.dataclass(frozen=True)
class SourceConfig:
    """Where rows come from: `path` and the rest as `datasets.load_dataset` takes them, or a `builtin:` corpus.

    What a row is follows from the fields that are named (see `form`). A field is a column, or a template over columns
    ("{question}\\n{context}").
    """

    path: str
    name: str | None = None
    data_files: Any = None  # str, list of str, or {split: str or list of str}
    data_dir: str | None = None
    text: str = "text"
    pair: str = ""  # the second text of a pair
    label: str = ""  # a class name, or a list of them (several labels)
    tag: str = ""  # a domain's name, by which bits per byte are told apart
    prompt: str = ""
    answer: str = ""  # to the prompt; or, with `choices`, the right one of them or its number
    messages: str = ""  # a column of turns, [{role, content}, ...], instead of prompt and answer
    choices: Any = ""  # a column of lists, or a list of texts
    answers: str = ""  # a column {text: [...], answer_start: [...]}: spans of `text`, by character, that answer it
    filters: list[str] = dataclasses.field(default_factory=list)  # "module:function", row -> bool, in order
    transforms: list[str] = dataclasses.field(default_factory=list)  # "module:function", row -> row, before the filters
    local: str = ""  # where config.data_dir is set, its folder of SPLIT.jsonl that is read instead of `path`
    train: str = "train"  # the split of the dataset that is used for training ...
    validation: str = "validation"  # ... and for validation; if empty, `validation_share` of train is held out
    test: str = "test"
    validation_share: float = 0.0
    max_documents: int = 0  # of the train split, a fixed pseudo-random sample; 0: all
    streaming: bool = False  # read from the hub as it comes, without a copy on disk
    bad_rows: float = 0.01  # the share of rows that may be unusable: they are set aside, and counted by reason
    max_row_bytes: int = 10_000_000  # a longer row is a bad one

    @property
    def row_format(self) -> str:
        """What a row is: the file in `llm3/data/formats` that reads it."""
        if self.answers:
            return "span"
        if self.choices:
            return "choice"
        return "dialogue" if self.answer or self.messages else "text"

    def __post_init__(self):
        files = self.data_files
        for each in files.values() if isinstance(files, dict) and files else [files]:
            names = each if isinstance(each, list) and each else [each]
            if files is not None and not all(isinstance(name, str) and name for name in names):
                raise UserError(
                    f"config: sources.*.data_files={files!r}: "
                    "expected a file name, a list of them, or {split: file name or list of them}"
                )
        if self.path in ("arrow", "csv", "json", "parquet", "text") and not (files or self.data_dir):
            raise UserError(f"config: sources.*.data_files={files!r}: path={self.path!r} needs data_files or data_dir")
        if not 0 <= self.validation_share < 1:
            raise UserError(
                f"config: sources.*.validation_share={self.validation_share!r}: expected a share from 0 up to, not "
                "including, 1"
            )
        if not 0 <= self.bad_rows <= 1:
            raise UserError(f"config: sources.*.bad_rows={self.bad_rows!r}: expected a share from 0 to 1")
        if self.messages and (self.prompt or self.answer):
            raise UserError("config: sources.*.messages: holds all turns; expected no prompt and no answer beside it")
        if (self.answer or self.answers) and not self.prompt:
            raise UserError("config: sources.*.prompt is empty: expected the field that the answer answers")
        if self.answers and "{" in self.text:
            raise UserError(
                f"config: sources.*.text={self.text!r}: answers lie in a column, not in a template of several"
            )
        if self.choices and not (self.prompt and self.answer):
            raise UserError("config: sources.*.choices: needs prompt, and answer: the right choice or its number")
        if self.label and self.tag:
            raise UserError("config: sources.*.tag and label: expected one of them")
        at_least("sources.*.max_documents", self.max_documents, 0)
        at_least("sources.*.max_row_bytes", self.max_row_bytes, 1)
