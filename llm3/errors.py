"""Errors that a user can act on, checks that raise them, and the exit status for each way that a run can end."""

import difflib
import enum
import errno
import functools
import os
import re
import shutil
import sys
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any


class Exit(enum.IntEnum):
    """The exit status of the command line; 128 + the signal's number after Ctrl-C."""

    DONE = 0
    BAD_INPUT = 2
    DIVERGED = 3  # too many steps in a row had a non-finite loss or gradient
    HUNG = 4  # a step, a read, a save or the like took longer than hang_seconds or hang_limits
    NOT_WRITTEN = 5  # a checkpoint or another file; earlier files are intact
    PARTIAL = 6  # some stage runs of an ablation failed, all others are finished
    UNREACHABLE = 7  # another process or a file was out of reach, which may pass: rerun the command
    PREEMPTED = (
        75  # SIGTERM, SIGHUP, SIGUSR1: everything is saved, rerun the command to resume (EX_TEMPFAIL in sysexits.h)
    )


class UserError(Exception):
    """Bad input, found before any device work if possible. The command line prints it without a traceback; exit 2."""

    exit: int = Exit.BAD_INPUT


class Diverged(UserError):
    """Too many steps in a row had a non-finite loss or gradient; `first` is the first of them, counted from 1."""

    exit = Exit.DIVERGED

    def __init__(self, message: str, first: int = 1):
        super().__init__(message)
        self.first = first


class NotWritten(UserError):
    """A file could not be written, e.g. because a disk is full."""

    exit = Exit.NOT_WRITTEN


class Unreachable(UserError):
    """Another process could not be reached, or a file that is not damaged could not be read: the next try may."""

    exit = Exit.UNREACHABLE


class OutOfMemory(UserError):
    """A step or an evaluation needs more memory than a device has."""


def to_stderr(text: str) -> None:
    """Write a text to standard error in one piece: threads may write at once. On a terminal it breaks between words."""
    if sys.stderr.isatty():
        width = shutil.get_terminal_size().columns
        lines = textwrap.TextWrapper(width, break_long_words=False, break_on_hyphens=False)
        text = "\n".join(lines.fill(line) for line in text.split("\n"))
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)  # full disk, quota exceeded, read-only: only a write raises these


@contextmanager
def writing(what: object, *numbers: int) -> Iterator[None]:
    """Turn an OSError into NotWritten that names `what`. numbers: only for these values of errno; none: for all."""
    try:
        yield
    except OSError as error:
        if numbers and error.errno not in numbers:
            raise
        raise NotWritten(f"{what} was not written: {error.strerror or error}") from error


def cause_chain(error: BaseException) -> list[BaseException]:
    """The chain of `__cause__`, the root cause first, the error itself last."""
    return [*(cause_chain(error.__cause__) if error.__cause__ is not None else []), error]


def root_cause(error: BaseException) -> str:
    """The type and message of the root cause, on one line."""
    first = cause_chain(error)[0]
    return f"{type(first).__name__}: {' '.join(str(first).split())[:300]}"


def os_reason(error: BaseException) -> str | None:
    """The message of the operating system if an OSError caused this error, else None."""
    for each in cause_chain(error):
        if isinstance(each, OSError):
            return each.strerror or str(each)
        if number := re.search(r"os_error_code='(\d+)'", str(each)):  # the wording of TensorStore
            return os.strerror(int(number[1]))
    return None


# Names of other libraries, and the fields, plugins and flags that they stand for; the first one that there is is meant.
SYNONYMS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("lr", "max_lr", "eta"), ("learning_rate", "optimizer.learning_rate")),
    **dict.fromkeys(("warmup", "num_warmup_steps"), ("warmup_steps", "optimizer.warmup_steps")),
    **dict.fromkeys(("scheduler", "lr_scheduler", "lr_scheduler_type"), ("schedule", "optimizer.schedule")),
    **dict.fromkeys(("grad_clip", "max_grad_norm", "clip"), ("clip_norm", "optimizer.clip_norm")),
    **dict.fromkeys(("wd", "decay"), ("weight_decay", "optimizer.weight_decay")),
    **dict.fromkeys(("optim", "opt"), ("optimizer",)),
    **dict.fromkeys(("adam", "adamw_torch"), ("adamw",)),
    **dict.fromkeys(("bs", "bsz", "batch", "per_device_train_batch_size", "global_batch_size"), ("batch_size",)),
    **dict.fromkeys(
        (
            "seq_len",
            "seqlen",
            "seq_length",
            "max_seq_length",
            "max_length",
            "block_size",
            "context_length",
            "cutoff_len",
        ),
        ("sequence_length",),
    ),
    **dict.fromkeys(("max_steps", "num_steps", "train_steps", "iterations", "iters", "max_iters"), ("steps",)),
    **dict.fromkeys(("gradient_accumulation_steps", "grad_accum", "accumulate", "accum_steps"), ("micro_batches",)),
    **dict.fromkeys(("logging_steps", "log_steps", "log_interval"), ("log_every",)),
    **dict.fromkeys(("save_steps", "save_interval", "checkpoint_every", "ckpt_every"), ("save_every",)),
    **dict.fromkeys(("eval_steps", "eval_interval", "evaluate_every"), ("eval_every",)),
    **dict.fromkeys(("save_total_limit", "max_to_keep"), ("keep",)),
    **dict.fromkeys(("parent", "init_from", "load_from", "base_model", "pretrained", "from"), ("start",)),
    **dict.fromkeys(("loss", "task", "task_type"), ("objective",)),
    **dict.fromkeys(("clm", "lm", "next_token", "autoregressive", "gpt"), ("causal",)),
    **dict.fromkeys(("mlm", "bert", "masked_lm"), ("masked",)),
    **dict.fromkeys(("sft", "chat", "instruction", "seq2seq"), ("instruct", "generation")),
    **dict.fromkeys(("cls", "classifier", "sequence_classification"), ("classify", "classification")),
    **dict.fromkeys(("ul2", "fim", "prefix_lm"), ("prefix",)),
    **dict.fromkeys(("qa", "extractive_qa", "squad"), ("span",)),
    **dict.fromkeys(("ppl", "bpb", "bits_per_byte"), ("perplexity",)),
    **dict.fromkeys(("multiple_choice", "mc", "mmlu"), ("choice",)),
    **dict.fromkeys(("lm_eval", "tasks"), ("harness",)),
    **dict.fromkeys(("num_layers", "n_layers", "n_layer", "num_hidden_layers", "depth"), ("layers",)),
    **dict.fromkeys(("hidden_size", "dim", "n_embd", "embed_dim", "width"), ("d_model",)),
    **dict.fromkeys(("num_heads", "n_heads", "n_head", "num_attention_heads"), ("heads",)),
    **dict.fromkeys(("num_key_value_heads", "n_kv_heads"), ("kv_heads",)),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "hidden_dim"), ("d_ff",)),
    **dict.fromkeys(("vocab", "n_vocab"), ("vocab_size",)),
    **dict.fromkeys(("r", "lora_rank", "lora_r"), ("rank",)),
    **dict.fromkeys(("target_modules", "lora_target_modules"), ("targets",)),
    **dict.fromkeys(("dataset", "data_path", "dataset_name"), ("path", "data", "sources")),
    **dict.fromkeys(("file", "files", "data_file"), ("data_files",)),
    **dict.fromkeys(("text_field", "text_column", "column", "content"), ("text",)),
    **dict.fromkeys(("labels", "label_column", "target"), ("label",)),
    **dict.fromkeys(("val_share", "val_split", "test_size", "validation_split"), ("validation_share",)),
    **dict.fromkeys(("output_dir", "out_dir", "dir", "out"), ("--workdir",)),
}
# What to do instead, where llm3 has no such field: {name: (field beside which it was expected, text)}
HINTS: dict[str, tuple[str, str]] = {
    **dict.fromkeys(
        ("epochs", "num_epochs", "num_train_epochs", "n_epochs"),
        ("steps", "give steps: `python -m llm3 data` prints how many epochs they are"),
    ),
    **dict.fromkeys(
        ("max_tokens", "train_tokens", "tokens", "num_tokens"),
        ("steps", "give steps: tokens / (batch_size * sequence_length)"),
    ),
    **dict.fromkeys(("freeze", "freeze_layers", "trainable"), ("train", "give train, what trains: train='top(2)'")),
    **dict.fromkeys(("lora", "peft"), ("adapters", "give adapters=dict(NAME=dict(rank=8)), train='lora'")),
    **dict.fromkeys(("bf16", "fp16", "dtype", "precision"), ("compute_dtype", "give compute_dtype")),
}


@functools.cache
def say(message: str) -> None:
    """Print a message to stderr, once."""
    to_stderr(message)


def listed(names: Iterable[str], most: int = 5) -> str:
    """The first `most` names for a message, and how many more there are."""
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def counted(number: int, noun: str, plural: str = "") -> str:
    """A number with its noun: "1 row", "2,000 rows"; plural: one that is not the noun with an "s"."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def together(errors: Sequence[UserError]) -> UserError:
    """One error that says all, each on a line of its own."""
    return errors[0] if len(errors) == 1 else UserError("\n".join(dict.fromkeys(map(str, errors))))


def nearest(name: str, options: Iterable[str]) -> str:
    """The end of an error message: the nearest of `options` to `name`, and all of them."""
    names = sorted(str(option) for option in options)
    return f"{closest(name, names)}valid: {', '.join(names) or '(none)'}"


def closest(name: str, names: Iterable[str]) -> str:
    """The nearest of many names as a question with a space behind it, "did you mean 'x'? "; "" if none is near.

    A name that other libraries have for one of them is near: see `known_as`.
    """
    names = list(names)
    if known := known_as(name, names):
        return known
    close = difflib.get_close_matches(str(name), names, n=2, cutoff=0.5)
    return f"did you mean {' or '.join(repr(match) for match in close)}? " if close else ""


def known_as(name: str, names: Iterable[str]) -> str:
    """As `closest`, only for names that other libraries have for one of `names`, or have where llm3 has none."""
    names, plain = set(names), str(name).lower().lstrip("-").replace("-", "_")
    for each in SYNONYMS.get(plain, ()):
        if each.partition(".")[0] in names:
            return f"did you mean {each!r}? "
    field, text = HINTS.get(plain, ("", ""))
    return f"{text}; " if field in names else ""


def within(where: str, error: UserError) -> UserError:
    """The error of a field, with the place of the field in front: "steps=0: ..." -> "config.stages.x.steps=0: ..."."""
    text = str(error).removeprefix("config: ")
    glue = "." if re.match(r"[a-z_][\w.*]*(\[\d+\])*(=| is empty|: )", text) else ": "
    return type(error)(f"{where}{glue}{text}")


def one_of(field: str, value: Any, options: Iterable[Any]) -> None:
    """Raise a UserError unless a config's `field` has one of `options` as its value."""
    if value not in (options := tuple(options)):
        raise UserError(f"config: {field}={value!r}: {nearest(value, options)}")


def check_share(field: str, share: float) -> None:
    """Raise a UserError unless a share is in (0, 1]."""
    if not 0 < share <= 1:
        raise UserError(f"{field}={share!r}: expected a share above 0, up to 1")


def at_least(field: str, value: float, least: float) -> None:
    """Raise a UserError unless the value of a config's `field` is at least `least`."""
    if value < least:
        raise UserError(f"config: {field}={value!r}: expected at least {least}")
