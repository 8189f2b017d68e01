"""The tokenizer and the chat template of a run: kept, given, trained, or inherited from what its stages start from."""

from pathlib import Path

from llm3.config.data_schema import SourceConfig
from llm3.config.schema import RunConfig
from llm3.data import tokenizer as tokenizers
from llm3.data.chat_templates import kept_template
from llm3.data.library import trained_tokenizer
from llm3.errors import UserError, nearest
from llm3.files import CHECKPOINTS, RESOLVED, TOKENIZER, local_path
from llm3.handoff.start import ModelStart, Start, read_start
from llm3.interop.folder import open_folder
from llm3.stages.parents import origin
from llm3.stages.records import newest_meta
from llm3.stages.workdir import tokenizer_sources


def load_tokenizer(
    config: RunConfig, sources: dict[str, SourceConfig], workdir: Path, cache_dir: Path
) -> tokenizers.Tokenizer:
    """The tokenizer saved with the run, else the one at `tokenizer.path`, else that of the model or run to start from.

    Where there is none of these, a new one (in the cache). Raises UserError, also if the stages of the run were trained
    with another one.
    """
    saved = workdir / TOKENIZER
    kept = saved.is_file()  # it may be lost, or have been damaged
    found = tokenizers.Tokenizer.load(saved) if kept else _new_tokenizer(config, sources, workdir, cache_dir)
    for name in config.stages:
        if (meta := newest_meta(workdir, name)) and meta["tokenizer_hash"] != found.hash:
            raise UserError(
                f"{workdir / name} was trained with the tokenizer {meta['tokenizer_hash'][:12]}, and "
                f"{saved if kept else 'the config'} has {found.hash[:12]}: restore {saved} from a copy, or use another "
                "--workdir"
            )
    return found


def _new_tokenizer(
    config: RunConfig, sources: dict[str, SourceConfig], workdir: Path, cache_dir: Path
) -> tokenizers.Tokenizer:
    add = config.tokenizer.add
    if loaded := given_tokenizer(config, workdir):
        return loaded.extended(add) if add else loaded
    if add:
        raise UserError(f"config.tokenizer.add={add}: needs tokenizer.path, the tokenizer to extend")
    if not (names := tokenizer_sources(config)):
        raise UserError("config.tokenizer: without a pretrain stage, give the parent's tokenizer.json as path")
    sizes = {"vocab_size": config.tokenizer.vocab_size, "train_bytes": config.tokenizer.train_bytes}
    return trained_tokenizer(sources, names, cache_dir, **sizes)


def given_tokenizer(config: RunConfig, workdir: Path) -> tokenizers.Tokenizer | None:
    """The tokenizer at `tokenizer.path`, else that of the model or run to start from; None: of neither.

    Raises UserError.
    """
    if config.tokenizer.path:
        return tokenizers.Tokenizer.load(
            local_path(config.tokenizer.path, "config.tokenizer.path"), config.tokenizer.special
        )
    if config.tokenizer.sources or (found := origin(config, workdir)) is None:
        return None
    name, start = found
    if isinstance(start, ModelStart):
        where = f"config.stages.{name}.start.model"
        return tokenizers.Tokenizer.load(open_folder(start.model, start.revision, where).path)
    if not (start.run / TOKENIZER).is_file():
        beside = start.run.parent.iterdir() if start.run.parent.is_dir() else ()
        raise UserError(
            f"config.stages.{name}.start.run={str(start.run)!r}: expected a run with its {TOKENIZER}: "
            f"{nearest(start.run.name, (each.name for each in beside if (each / TOKENIZER).is_file()))}"
        )
    return tokenizers.Tokenizer.load(start.run / TOKENIZER)


def inherited_template(config: RunConfig, workdir: Path) -> str:
    """The chat template that a run has from the run that it starts from, as long as it takes its tokenizer from there.

    A run that has begun keeps the one that it began with, or none. Raises UserError if a template is damaged.
    """
    found = None if config.tokenizer.path or config.tokenizer.sources else origin(config, workdir)
    if found is None or not isinstance(start := found[1], Start):
        return ""
    begun = any((workdir / name).is_file() for name in (TOKENIZER, RESOLVED))
    return kept_template(workdir if begun else start.run)


def check_parents_tokenizers(
    config: RunConfig, workdir: Path, order: list[str], tokenizer: tokenizers.Tokenizer
) -> None:
    """Raise UserError, before anything is tokenized, if a stage starts from a run with another tokenizer.

    Stages that have begun do not need their parents.
    """
    add = config.tokenizer.add
    known, ours = {tokenizer.hash}, tokenizer.hash[:12]
    if add:
        known.add(extended := tokenizer.without(add).hash)
        ours += f", which extends {extended[:12]}"
    runs: dict[str, tuple[Path, str]] = {}
    for name in order:
        start = read_start(config.stages[name].start, workdir, f"config.stages.{name}.start")
        if not isinstance(start, Start) or start.run == workdir or (workdir / name / CHECKPOINTS).is_dir():
            continue
        if (start.run / TOKENIZER).is_file():  # else the search for the parent says what is missing
            runs[name] = start.run, tokenizers.Tokenizer.load(start.run / TOKENIZER).hash
    same = next((name for name, (_, theirs) in runs.items() if theirs in known), None)
    for name, (run, theirs) in runs.items():
        if theirs in known:
            continue
        has = f"config.stages.{name}.start.run={str(run)!r} has the tokenizer {theirs[:12]}"
        if same is not None:
            raise UserError(
                f"{has}, but {runs[same][0]}, from which stage {same!r} starts, has {runs[same][1][:12]}: expected "
                "parents with one tokenizer in a run"
            )
        raise UserError(f"{has}, this run has {ours}: in a new --workdir, set tokenizer.path={str(run / TOKENIZER)!r}")
