"""Small tokenizers of others, as folders that transformers writes: one of every kind, trained on a few sentences."""

import functools
import json
import tempfile
from pathlib import Path

from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend

from llm3.data.tokenizer import Tokenizer

TEXTS = [
    "The quick brown fox jumps over the lazy dog. Is it so? It is so, isn't it!",
    "system user assistant model question answer: yes no maybe",
    "Ünïcödé naïve café 漢字 and the fox, the dog and the cat.",
] * 4
CHATML = """{%- if messages[0]['role'] != 'system' %}{{- '<|im_start|>system\\nBe kind.<|im_end|>\\n' }}{%- endif %}
{%- for m in messages %}
    {{- '<|im_start|>' + m['role'] + '\\n' }}
    {%- if m['role'] == 'assistant' %}{% generation %}{{- m['content'] + '<|im_end|>' }}{% endgeneration %}
    {%- else %}{{- m['content'] + '<|im_end|>' }}{%- endif %}
    {{- '\\n' }}
{%- endfor %}
{%- if tools %}{{- tools | tojson }}{%- endif %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""
LLAMA3 = """{{- bos_token }}
{%- for m in messages %}{{- '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n' }}
{%- if m['role'] == 'assistant' %}{% generation %}{{- m['content'] | trim + '<|eot_id|>' }}{% endgeneration %}
{%- else %}{{- m['content'] | trim + '<|eot_id|>' }}{%- endif %}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"""
GEMMA = """{{- bos_token }}{%- for m in messages %}{%- set role = 'model' if m['role'] == 'assistant' else m['role'] %}
{{- '<start_of_turn>' + role + '\\n' }}
{%- if role == 'model' %}{% generation %}{{- m['content'] | trim + '<end_of_turn>' }}{% endgeneration %}
{%- else %}{{- m['content'] | trim + '<end_of_turn>' }}{%- endif %}{{- '\\n' }}{%- endfor %}
{%- if add_generation_prompt %}{{- '<start_of_turn>model\\n' }}{%- endif %}"""

LLAMA2 = """{{- bos_token }}{%- for m in messages %}
{%- if m['role'] == 'assistant' %}{% generation %}{{- ' ' + m['content'] | trim + ' ' + eos_token }}{% endgeneration %}
{%- else %}{{- '[INST] ' + m['content'] | trim + ' [/INST]' }}{%- endif %}{%- endfor %}"""


def _write(folder: Path, backend: Backend, **files: dict) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def _byte_level(folder: Path, specials: list[str], ends: list[str], normalizer=None, added=(), **files) -> Path:
    """A byte-level BPE; generation_config.json names the tokens `ends`."""
    backend = Backend(models.BPE())
    if normalizer is not None:
        backend.normalizer = normalizer
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    )
    backend.add_special_tokens([AddedToken(each, special=True, normalized=False) for each in specials])
    backend.add_tokens([AddedToken(each, special=False, normalized=False) for each in added])
    generation = {
        "eos_token_id": [backend.token_to_id(each) for each in ends],
        "bos_token_id": backend.token_to_id(specials[0]),
    }
    return _write(folder, backend, generation_config=generation, **files)


def qwen(folder: Path) -> Path:
    """Byte-level BPE with NFC and no bos; two tokens end a turn; tags that are no special tokens."""
    return _byte_level(
        folder,
        ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        ["<|im_end|>", "<|endoftext|>"],
        normalizers.NFC(),
        ["<tool_call>", "<think>", "</think>"],
        tokenizer_config={
            "bos_token": None,
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "chat_template": CHATML,
        },
    )


def llama3(folder: Path) -> Path:
    """Byte-level BPE, lossless, whose post-processor begins a text with bos."""
    names = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    _byte_level(
        folder,
        names,
        [names[1], names[4]],
        tokenizer_config={"bos_token": names[0], "eos_token": {"content": names[4]}, "chat_template": LLAMA3},
    )
    backend = Backend.from_file(str(folder / "tokenizer.json"))
    begin = (names[0], backend.token_to_id(names[0]))
    backend.post_processor = processors.TemplateProcessing(single=f"{names[0]} $A", special_tokens=[begin])
    return _write(folder, backend)


def _sentencepiece(folder: Path, specials: list[str], **files) -> Path:
    """BPE as SentencePiece writes it, with byte fallback and a space before the first word."""
    backend = Backend(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=180, special_tokens=specials, show_progress=False)
    )
    content = json.loads(backend.to_str())
    vocab = content["model"]["vocab"]
    vocab |= {f"<0x{byte:02X}>": len(vocab) + byte for byte in range(256)}
    strip = decoders.Strip(" ", 1, 0)
    backend = Backend.from_str(json.dumps(content))
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), strip])
    return _write(folder, backend, **files)


def gemma(folder: Path) -> Path:
    """SentencePiece, which puts no space after a special token; a second token ends a turn."""
    specials = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<start_of_turn>", "<end_of_turn>"]
    _sentencepiece(
        folder,
        specials,
        tokenizer_config={"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "mask_token": "<mask>"},
        generation_config={"eos_token_id": [specials.index("<eos>"), specials.index("<end_of_turn>")]},
    )
    (folder / "chat_template.jinja").write_text(GEMMA)
    return folder


def llama2(folder: Path) -> Path:
    """SentencePiece as it was converted at first: a normalizer puts a space before each text, also after a special."""
    config = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "chat_template": LLAMA2}
    _sentencepiece(folder, ["<unk>", "<s>", "</s>"], tokenizer_config=config)
    backend = Backend.from_file(str(folder / "tokenizer.json"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    content = json.loads(backend.to_str()) | {"pre_tokenizer": None}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return folder


def unigram(folder: Path) -> Path:
    """A Unigram with NFKC, whose vocabulary holds its special tokens as pieces; special_tokens_map.json names them."""
    backend = Backend(models.Unigram())
    backend.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace("  ", " ")])
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    specials = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    trainer = trainers.UnigramTrainer(
        vocab_size=120, special_tokens=specials, unk_token="<unk>", show_progress=False, max_piece_length=8
    )
    backend.train_from_iterator(TEXTS, trainer)
    named = {f"{name}_token": f"<{text}>" for name, text in dict(bos="s", eos="/s", pad="pad", mask="mask").items()}
    return _write(folder, backend, special_tokens_map=named)


def bert(folder: Path) -> Path:
    """A lower-casing WordPiece as old folders have it: no file names its special tokens, its post-processor does."""
    backend = Backend(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer, backend.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    backend.train_from_iterator(
        TEXTS, trainers.WordPieceTrainer(vocab_size=150, special_tokens=specials, show_progress=False)
    )
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    backend.enable_truncation(8)
    backend.enable_padding(length=8)
    return _write(folder, backend, tokenizer_config={"do_lower_case": True}, config={"pad_token_id": 0})


KINDS = {"qwen": qwen, "llama3": llama3, "gemma": gemma, "llama2": llama2, "unigram": unigram, "bert": bert}


@functools.cache
def foreign(kind: str) -> Tokenizer:
    """A tokenizer of one of KINDS."""
    with tempfile.TemporaryDirectory() as folder:
        return Tokenizer.load(KINDS[kind](Path(folder)))
