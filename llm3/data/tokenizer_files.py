"""The files of somebody else's tokenizer: a Hugging Face folder, or a tokenizer.json with the files beside it."""

import json
from pathlib import Path
from typing import Any

from llm3.data.special_tokens import NAMED_BY_MODEL, NAMED_BY_TOKENIZER
from llm3.errors import UserError
from llm3.files import CHAT_TEMPLATE, TOKENIZER

KEPT = (*NAMED_BY_TOKENIZER, CHAT_TEMPLATE)  # the files that an export of the tokenizer writes again
OTHER_FORMATS = {
    "spiece.model": "a SentencePiece model",
    "tokenizer.model": "a SentencePiece model",
    "sentencepiece.bpe.model": "a SentencePiece model",
    "vocab.txt": "a vocabulary of WordPiece",
    "vocab.json": "a vocabulary of BPE",
    "merges.txt": "the merges of a BPE",
    "tokenizer.pkl": "a pickle",
    "vocab.pkl": "a pickle",
}
CONVERT = (
    "convert it once: python -c \"from transformers import AutoTokenizer; AutoTokenizer.from_pretrained('{0}')"
    ".save_pretrained('{0}')\" writes tokenizer.json"
)


def tokenizer_file(path: Path) -> Path:
    """The tokenizer.json that a path names: itself, or the one in a folder.

    Raises UserError if there is none, with the way to convert the file of another format that is there.
    """
    file = path / TOKENIZER if path.is_dir() else path
    other = next((each for each in OTHER_FORMATS if (file.parent / each).is_file()), "")
    is_other = path.name in OTHER_FORMATS or path.suffix in (".model", ".pkl", ".pickle", ".bin", ".pt")
    if path.is_file() and is_other:
        what = OTHER_FORMATS.get(path.name, "no JSON")
        raise UserError(
            f"tokenizer: {path} is {what}, expected a tokenizer.json: {CONVERT.format(path.parent)}"
        ) from None
    if not file.is_file():
        if other:
            raise UserError(
                f"tokenizer: {file.parent} has no tokenizer.json, only {other}, {OTHER_FORMATS[other]}: "
                + CONVERT.format(file.parent)
            )
        raise UserError(f"tokenizer: {file} does not exist")
    return file


def files_beside(file: Path) -> dict[str, str]:
    """{name: text} of the files beside a tokenizer.json that say more about it. Raises UserError if one is damaged."""
    found = {}
    for name in (*NAMED_BY_TOKENIZER, *NAMED_BY_MODEL, CHAT_TEMPLATE):
        try:
            found[name] = (file.parent / name).read_text(encoding="utf-8")
        except FileNotFoundError:
            continue
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"tokenizer: {file.parent / name} cannot be read: {error}") from None
        if name.endswith(".json"):
            read_object(found[name], f"tokenizer: {file.parent / name}")
    return found


def read_object(text: str, where: str) -> dict[str, Any]:
    """A JSON object. Raises UserError, starting with `where`, for anything else."""
    try:
        content = json.loads(text)
    except ValueError as error:
        raise UserError(f"{where} cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{where} cannot be read: it holds no JSON object")
    return content


def template_of(files: dict[str, str]) -> str:
    """The chat template: chat_template.jinja, or the (default) one in tokenizer_config.json; "": none."""
    if CHAT_TEMPLATE in files:
        return files[CHAT_TEMPLATE]
    found = json.loads(files.get("tokenizer_config.json", "{}")).get("chat_template") or ""
    if isinstance(found, list):
        found = next((each["template"] for each in found if each.get("name") == "default"), "")
    return found if isinstance(found, str) else ""
