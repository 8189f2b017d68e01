"""The text side of an export: the tokenizer, the chat template, and where generation ends."""

import json
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers.processors import TemplateProcessing

from llm3.data.chat_templates import end_of_turn, with_bos
from llm3.data.encoding import encode_pieces
from llm3.data.tokenizer import OWN, SPECIALS, Tokenizer
from llm3.files import CHAT_TEMPLATE, TOKENIZER, write_atomic, write_json

BOS, EOS = SPECIALS[1], SPECIALS[OWN.eos]


def write_tokenizer(directory: Path, source: Path, template: str, closed: bool, pad: int | None) -> list[str]:
    """Write tokenizer.json and tokenizer_config.json, from which transformers gets the token ids of llm3.

    Of a tokenizer of others, its files are written as they came, with added tokens and the run's template. With one of
    llm3's own, each text begins with BOS (unless add_special_tokens=False). Without a chat template, no text encodes to
    a special token. With one, the template has to write special tokens, and transformers encodes its text as a whole; a
    content that spells a special token is then read as that token.

    closed: each text, and each of a pair, ends with EOS, as every document does in training. pad: see `padding_id`.
    Returns lines of a summary.
    """
    tokenizer = Tokenizer.load(source)
    if tokenizer.foreign:
        return _write_foreign(directory, tokenizer, template, closed, pad)
    backend = tokenizers.Tokenizer.from_file(str(source))
    # set in tokenizer.json, because transformers then ignores add_bos_token
    backend.post_processor = _around([BOS], [EOS] if closed else [], {BOS: SPECIALS.index(BOS), EOS: OWN.eos})
    content, ends = json.loads(backend.to_str()), end_tokens(template, tokenizer)
    for each in content["added_tokens"]:  # so that a decoded answer is without its end of turn
        each["special"] = each["special"] or each["id"] in ends
    write_json(directory / TOKENIZER, content)
    described: dict[str, Any] = dict(zip(("pad_token", "bos_token", "eos_token", "mask_token"), SPECIALS, strict=True))
    described |= {"tokenizer_class": "PreTrainedTokenizerFast", "split_special_tokens": not template}
    write_json(directory / "tokenizer_config.json", described | {"clean_up_tokenization_spaces": False})
    appends = f", and appends {EOS}" if closed else ""
    lines = [f"tokenizer.json: {backend.get_vocab_size()} tokens; it prepends {BOS} to each text{appends}"]
    if template:
        write_atomic(directory / CHAT_TEMPLATE, with_bos(template))
        lines.append(f"{CHAT_TEMPLATE}: the chat template; unlike in llm3, a content can spell special tokens")
    return lines


def _around(before: list[str], after: list[str], ids: dict[str, int]) -> TemplateProcessing:
    """A post-processor that puts special tokens around a text, and after the second of a pair; all of token type 0.

    ids: {token: id}.
    """
    single, pair = [*before, "$A", *after], [*before, "$A", *after, "$B:0", *after]
    used = [(each, ids[each]) for each in dict.fromkeys((*before, *after))]
    return TemplateProcessing(single=" ".join(single), pair=" ".join(pair), special_tokens=used)


def _write_foreign(directory: Path, tokenizer: Tokenizer, template: str, closed: bool, pad: int | None) -> list[str]:
    """Write the files of a tokenizer of others; see `write_tokenizer`."""
    files = tokenizer.files()
    described = json.loads(files.pop("tokenizer_config.json", "{}"))
    lines = [f"tokenizer.json: {tokenizer.vocab_size} tokens, as it came"]
    if closed:
        names, ids = tokenizer.tokens, dict(zip(tokenizer.tokens, range(tokenizer.vocab_size), strict=True))
        backend = tokenizers.Tokenizer.from_str(files[TOKENIZER])
        eos = names[tokenizer.eos_id]
        backend.post_processor = _around([names[each] for each in tokenizer.starts], [eos], ids)
        files[TOKENIZER] = backend.to_str(pretty=True)
        described |= {"tokenizer_class": "PreTrainedTokenizerFast"}  # other classes can replace the post-processor
        lines = [f"tokenizer.json: {tokenizer.vocab_size} tokens; as in training, each text ends with {eos}"]
    if pad != tokenizer.pad_id:
        described |= {"pad_token": None if pad is None else tokenizer.tokens[pad]}
        no_padding = "no token to pad with: give transformers one text at a time"
        lines.append(no_padding if pad is None else f"padding is {described['pad_token']}, which ends no text")
    if template != tokenizer.chat_template:
        described.pop("chat_template", None)
        files.pop(CHAT_TEMPLATE, None)
        files |= {CHAT_TEMPLATE: template} if template else {}
    for name, text in files.items():
        write_atomic(directory / name, text)
    write_json(directory / "tokenizer_config.json", described)
    if template:
        lines.append("the chat template" + ", as it came" * (template == tokenizer.chat_template))
    return lines


def padding_id(tokenizer: Tokenizer, reads_last: bool) -> int | None:
    """The id to pad batches with in transformers; None: there is none.

    reads_last: a head reads the last token that is no padding. That is the token that ends the text, so padding has to
    be another one, even if the tokenizer has one token for both.
    """
    if not reads_last or tokenizer.pad_id not in tokenizer.end_ids:
        return tokenizer.pad_id
    taken = {*tokenizer.end_ids, *tokenizer.starts}
    return next((each for each in sorted(tokenizer.specials.values()) if each not in taken), None)


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
