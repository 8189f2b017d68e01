"""The config of the tokenizer and the sources of a run. Part of `llm3.config.schema`."""

import dataclasses
import re
from typing import Any

from llm3.errors import UserError, at_least, one_of
from llm3.files import local_path

MIN_VOCAB_SIZE = 260  # 256 bytes and 4 special tokens


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
    """A byte-level BPE trained on the train splits of `sources`, or an existing tokenizer at `path`."""

    vocab_size: int = 4096  # tokens of a trained vocabulary, 4 special tokens and 256 bytes included
    sources: list[str] = dataclasses.field(default_factory=list)  # training data; empty: the pretrain stages' sources
    # a tokenizer.json of any kind, or a folder with it (a Hugging Face model, a run); "": that of the model or run to
    # start from, else train one
    path: str = ""
    # {bos, eos, pad, mask: token, ends: list of tokens} where no file beside the tokenizer.json names them; "": none
    special: dict[str, Any] = dataclasses.field(default_factory=dict)
    train_bytes: int = 40_000_000  # train on at most this many bytes, sampled by hash from larger sources
    add: list[str] = dataclasses.field(default_factory=list)  # new tokens, appended to the vocabulary of `path`
    # jinja source, or a file with it, which the run keeps; "": that of the tokenizer's folder, if there is one, else
    # contents unchanged, each answer ends with <eos>
    chat_template: str = ""

    def __post_init__(self) -> None:
        at_least("tokenizer.vocab_size", self.vocab_size, MIN_VOCAB_SIZE)
        at_least("tokenizer.train_bytes", self.train_bytes, 1)
        if self.special and not self.path:
            raise UserError(f"config.tokenizer.special={self.special}: needs tokenizer.path, whose tokens they are")
        if self.path:
            local_path(self.path, "config.tokenizer.path")
        if self.chat_template and "{" not in self.chat_template:
            local_path(self.chat_template, "config.tokenizer.chat_template")


@dataclasses.dataclass(frozen=True)
class SourceConfig:
    """A source of rows, and the fields to read from them.

    The named fields decide the row format (see `row_format`). A field is a column, or a template over columns
    ("{question}\\n{context}").
    """

    path: str  # `builtin:NAME`, or the path of `datasets.load_dataset`: a dataset, a folder, "json", "csv", ...
    name: str | None = None  # name of the dataset's configuration
    data_files: Any = None  # str, list of str, or {split: str or list of str}
    data_dir: str | None = None  # folder of the files
    delimiter: str | None = None  # between the cells of CSV files; None: comma, semicolon, tab or bar, as found
    quote: str | None = None  # around cells of CSV files; None: '"'; "": cells are never quoted
    # a row of plain text: "line", "paragraph" or "document" (a file); None: document in a folder, else line
    sample_by: str | None = None
    text: str = "text"  # field with the text, or with the context that holds the answers
    pair: str = ""  # field with the second text of a pair
    label: str = ""  # field with a class name, or with a list of class names (multi-label)
    tag: str = ""  # field with the name of a domain; bits per byte are reported per domain
    prompt: str = ""  # field with the question or instruction
    answer: str = ""  # field with the answer to the prompt; with `choices`, the correct one, its letter or number
    messages: str = ""  # column with turns [{role, content}, ...] or [{from, value}, ...], not with prompt and answer
    choices: Any = ""  # column with a list of choices, or a fixed list of choices or of templates over columns
    answer_base: int | None = None  # number of the first choice if answers are numbers, 0 or 1; None: found in the rows
    answers: str = ""  # column {text: [...], answer_start: [...]}: character spans of `text` that answer the prompt
    filters: list[str] = dataclasses.field(
        default_factory=list
    )  # "module:function" beside the config, row -> bool, in order
    transforms: list[str] = dataclasses.field(default_factory=list)  # "module:function", row -> row, before filters
    local: str = ""  # folder inside config.data_dir whose SPLIT.jsonl files replace `path`, if data_dir is set
    train: str = "train"  # name of the dataset's split for training
    validation: str = "validation"  # name of the validation split; "": hold out `validation_share` of train
    test: str = "test"  # name of the test split
    validation_share: float = 0.0  # share of train that is held out, of each class, if there is no validation split
    max_documents: int = 0  # size of a fixed random sample of the train split; 0: all rows
    drop: str = ""  # a file that `overlap --drop=FILE` wrote: its documents are left out of the train split
    streaming: bool = False  # stream from the hub, without a copy on disk
    bad_rows: float = 0.01  # max share of unusable rows; they are set aside and counted by reason
    max_row_bytes: int = 10_000_000  # a row with more bytes counts as unusable

    @property
    def row_format(self) -> str:
        """Name of the plugin in `llm3/data/formats` that reads the rows."""
        if self.answers:
            return "span"
        if self.choices:
            return "choice"
        return "dialogue" if self.answer or self.messages else "text"

    @property
    def is_conversation(self) -> bool:
        """Whether a chat template renders the rows."""
        return self.row_format in ("dialogue", "choice")

    def __post_init__(self) -> None:
        self._check_files()
        self._check_fields()
        if not 0 <= self.validation_share < 1:
            raise UserError(
                f"config: sources.*.validation_share={self.validation_share!r}: expected a share, 0 <= share < 1"
            )
        if not 0 <= self.bad_rows <= 1:
            raise UserError(f"config: sources.*.bad_rows={self.bad_rows!r}: expected a share from 0 to 1")
        for field in ("filters", "transforms"):
            for spec in getattr(self, field):
                if not (isinstance(spec, str) and re.fullmatch(r"[^:]+:[^:]+", spec)):
                    raise UserError(f"config: sources.*.{field}={spec!r}: expected 'module:function'")
        at_least("sources.*.max_documents", self.max_documents, 0)
        at_least("sources.*.max_row_bytes", self.max_row_bytes, 1)

    def _check_files(self) -> None:
        """Raise UserError for files that cannot be named so, or not be read so."""
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
        if self.delimiter is not None and (not self.delimiter or {*self.delimiter} & {'"', "\r", "\n"}):
            raise UserError(
                f"config: sources.*.delimiter={self.delimiter!r}: expected characters such as ',' or '\\t', "
                "no quotes and no line ends"
            )
        if self.quote is not None and len(self.quote) > 1:
            raise UserError(f"config: sources.*.quote={self.quote!r}: expected one character, or '' for none")
        one_of("sources.*.sample_by", self.sample_by, (None, "line", "paragraph", "document"))

    def _check_fields(self) -> None:
        """Raise UserError for fields of a row that do not go together."""
        one_of("sources.*.answer_base", self.answer_base, (None, 0, 1))
        if self.messages and (self.prompt or self.answer):
            raise UserError("config: sources.*.messages: holds all turns; expected no prompt and no answer with it")
        if (self.answer or self.answers) and not self.prompt:
            raise UserError(
                "config: sources.*.prompt is empty: expected the field with the question that the answer belongs to"
            )
        if self.answers and "{" in self.text:
            raise UserError(
                f"config: sources.*.text={self.text!r}: answers are spans of a column; expected no template"
            )
        fixed = () if isinstance(self.choices, str) else self.choices
        if not all(isinstance(each, str) for each in fixed):
            raise UserError(f"config: sources.*.choices={self.choices!r}: expected texts, or a column with a list")
        if self.answer_base is not None and not self.choices:
            raise UserError(f"config: sources.*.answer_base={self.answer_base}: expected choices with it")
        if self.choices and not (self.prompt and self.answer):
            raise UserError("config: sources.*.choices: needs prompt and answer (the correct choice or its index)")
        if self.label and self.tag:
            raise UserError("config: sources.*.tag and label: expected only one of them")
