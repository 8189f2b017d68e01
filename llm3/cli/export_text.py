"""The text side of an export: the tokenizer, the chat template, and where generation ends."""

import json
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers.processors import TemplateProcessing

from llm3.data.chat_templates import encode_pieces, end_of_turn, with_bos
from llm3.data.tokenizer import OWN, SPECIALS, Tokenizer
from llm3.files import CHAT_TEMPLATE, TOKENIZER, write_atomic, write_json

BOS, EOS = SPECIALS[1], SPECIALS[OWN.eos]


def write_tokenizer(directory: Path, source: Path, template: str, classifier: bool) -> list[str]:
    """Write tokenizer.json and tokenizer_config.json, from which transformers gets the token ids of llm3.

    Each text begins with BOS and, for a classifier, ends with EOS (unless add_special_tokens=False). Without a chat
    template, no text encodes to a special token. With one, the template has to write special tokens, and transformers
    encodes its text as a whole; a content that spells a special token is then read as that token. Returns lines of a
    summary.
    """
    backend = tokenizers.Tokenizer.from_file(str(source))
    single, pair = f"{BOS} $A", f"{BOS} $A $B:1"
    if classifier:
        single, pair = f"{BOS} $A {EOS}", f"{BOS} $A {EOS} $B:1 {EOS}:1"
    # set in tokenizer.json, because transformers then ignores add_bos_token
    backend.post_processor = TemplateProcessing(
        single=single,
        pair=pair,
        special_tokens=[(BOS, SPECIALS.index(BOS)), *([(EOS, OWN.eos)] if classifier else ())],
    )
    content, ends = json.loads(backend.to_str()), end_tokens(template, Tokenizer.load(source))
    for each in content["added_tokens"]:  # so that a decoded answer is without its end of turn
        each["special"] = each["special"] or each["id"] in ends
    write_json(directory / TOKENIZER, content)
    described: dict[str, Any] = dict(zip(("pad_token", "bos_token", "eos_token", "mask_token"), SPECIALS, strict=True))
    described |= {"tokenizer_class": "PreTrainedTokenizerFast", "split_special_tokens": not template}
    write_json(directory / "tokenizer_config.json", described | {"clean_up_tokenization_spaces": False})
    appends = f", and appends {EOS}, where the head reads" if classifier else ""
    lines = [f"tokenizer.json: {backend.get_vocab_size()} tokens; it prepends {BOS} to each text{appends}"]
    if template:
        write_atomic(directory / CHAT_TEMPLATE, with_bos(template))
        lines.append(f"{CHAT_TEMPLATE}: the chat template; unlike in llm3, a content can spell special tokens")
    return lines


def end_tokens(template: str, tokenizer: Tokenizer) -> list[int]:
    """The single tokens that end a text or an answer: EOS, and the template's end of turn if it is one token."""
    end = _end_of_turn(template, tokenizer)
    return sorted({*tokenizer.end_ids, *(end if len(end) == 1 else ())})


def write_generation(directory: Path, template: str, tokenizer: Tokenizer) -> list[str]:
    """Write generation_config.json with every token that ends an answer; returns lines of a summary."""
    write_json(directory / "generation_config.json", token_ids(template, tokenizer))
    end = _end_of_turn(template, tokenizer)
    if len(end) < 2:
        return []
    text = tokenizer.decode(end)
    return [
        f"the end of turn {text!r} is {len(end)} tokens, so it is not in generation_config.json: generate with "
        f"stop_strings=[{text!r}] and tokenizer=, or train with tokenizer.add=[{text!r}]"
    ]


def token_ids(template: str, tokenizer: Tokenizer) -> dict[str, Any]:
    """The ids of special tokens in transformers' config.json and generation_config.json."""
    ends = end_tokens(template, tokenizer)
    return {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": ends[0] if len(ends) == 1 else ends,
        "pad_token_id": tokenizer.pad_id,
    }


def _end_of_turn(template: str, tokenizer: Tokenizer) -> list[int]:
    return encode_pieces(end_of_turn(template, tokenizer), tokenizer)
