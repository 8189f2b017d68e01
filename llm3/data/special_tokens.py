"""The special tokens of a tokenizer: which ones there are, and the files of a Hugging Face folder that name them.

The files of a tokenizer name tokens by their text (tokenizer_config.json, special_tokens_map.json), those of a model by
their id (generation_config.json, config.json). Older folders name none: then the post-processor of tokenizer.json does.
"""

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from llm3.errors import UserError, nearest

NAMES = ("bos", "eos", "pad", "mask")  # fields of `tokenizer.special`, besides "ends"
NAMED_BY_TOKENIZER = ("tokenizer_config.json", "special_tokens_map.json")
NAMED_BY_MODEL = ("generation_config.json", "config.json")
SECOND_NAMES = {"bos": "cls", "eos": "sep"}  # BERT's names
MASKS = ("[MASK]", "<mask>", "<|mask|>")  # what the classes of transformers call it where no file does


class Specials(NamedTuple):
    """Ids of special tokens. bos, mask: None if there is none. ends: all that end a text or a turn, eos first."""

    pad: int
    bos: int | None
    eos: int
    mask: int | None
    ends: tuple[int, ...]


def find_specials(
    files: Mapping[str, dict], content: dict, ids: Mapping[str, int], given: Mapping[str, Any], where: str
) -> Specials:
    """The special tokens of a tokenizer.

    files: the JSON files beside tokenizer.json, by name. content: the JSON of tokenizer.json. ids: {token: id}. given:
    `tokenizer.special` of the config, texts of tokens, which come first; "": there is none. Raises UserError, for a
    token that the vocabulary lacks, and if nothing names the end of a text.
    """
    for name in given:
        if name not in (*NAMES, "ends"):
            raise UserError(f"tokenizer.special.{name}: no such field; {nearest(name, (*NAMES, 'ends'))}")
    known: dict[str, int | None] = {
        name: _known(f"tokenizer.special.{name}", given[name], ids) for name in NAMES if name in given
    }
    texts = {name: found for name in NAMES if (found := _named_by_tokenizer(name, files)) is not None}
    for name, text in texts.items():
        known.setdefault(name, _known(f"{where}: {name}_token", text, ids))
    valid = set(ids.values())
    around = post_processor_tokens(content.get("post_processor"))
    if "bos" not in known:
        # a tokenizer that names its end and no beginning has none, whatever the model's config says
        model = [] if "eos" in texts else _named_by_model("bos", files, valid)
        known["bos"] = next(iter([*(ids[each] for each in around[:1] if each in ids), *model]), None)
    if known.get("eos") is None:
        last = [ids[each] for each in around[1:] if each in ids]
        known["eos"] = next(iter([*_named_by_model("eos", files, valid), *last]), None)
    if (eos := known["eos"]) is None:
        raise UserError(
            f"{where}: nothing names the token that ends a text: expected eos_token in a tokenizer_config.json beside "
            "it, or tokenizer.special=dict(eos=...), with bos, pad and mask where there are such tokens"
        )
    pad = known.get("pad")
    if pad is None:
        pad = next(iter(_named_by_model("pad", files, valid)), eos)
    mask = known["mask"] if "mask" in known else next((ids[each] for each in MASKS if each in ids), None)
    ends: list[int | None] = [*_named_by_model("eos", files, valid)]
    if said := given.get("ends"):
        ends = [_known("tokenizer.special.ends", each, ids) for each in ([said] if isinstance(said, str) else said)]
    kept = dict.fromkeys(each for each in (eos, *ends) if each is not None)
    return Specials(pad, known["bos"], eos, mask, tuple(kept))


def token_text(value: Any) -> str:
    """The text of a token in a file, which may be written as {"content": text}; "" for none."""
    text = value.get("content") if isinstance(value, Mapping) else value
    return text if isinstance(text, str) else ""


def _named_by_tokenizer(name: str, files: Mapping[str, dict]) -> str | None:
    """The text of a token; "" where a file says that there is none; None where no file says anything."""
    said = None
    for key in (name, SECOND_NAMES.get(name, name)):
        for file in NAMED_BY_TOKENIZER:
            if f"{key}_token" in files.get(file, {}):
                said = token_text(files[file][f"{key}_token"])
                if said:
                    return said
    return said


def _named_by_model(name: str, files: Mapping[str, dict], valid: Collection[int]) -> list[int]:
    """The ids of the vocabulary that the configs name; those of many models name others, as -1 for none."""
    found = [files.get(file, {}).get(f"{name}_token_id") for file in NAMED_BY_MODEL]
    listed = [each if isinstance(each, list) else [each] for each in found]
    return [number for each in listed for number in each if number is not None and number in valid]


def _known(where: str, token: Any, ids: Mapping[str, int]) -> int | None:
    """The id of a token; None for "". Raises UserError if the vocabulary lacks it."""
    if not token:
        return None
    if token not in ids:
        special = [each for each in ids if each[:1] in "<[" and each[-1:] in ">]"]
        raise UserError(f"{where}={token!r}: the vocabulary has no such token; {nearest(token, special[:40])}")
    return ids[token]


def post_processor_tokens(node: Any) -> tuple[str, ...]:
    """(first, last) special token that a post-processor puts around one text, "" for none; () where it puts none."""
    if not isinstance(node, Mapping):
        return ()
    if node.get("type") == "Sequence":
        return next((found for each in node.get("processors", ()) if (found := post_processor_tokens(each))), ())
    if node.get("type") in ("BertProcessing", "RobertaProcessing"):
        return node["cls"][0], node["sep"][0]
    if node.get("type") != "TemplateProcessing":
        return ()
    single = [each.get("SpecialToken", {}).get("id", "") for each in node.get("single", ())]
    return (single[0], single[-1]) if len(single) > 1 else ()
