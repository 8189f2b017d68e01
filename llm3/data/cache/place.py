"""Where the cache is: one for all runs and verbs of a user, unless the config or the environment names another."""

import os
from pathlib import Path

from llm3.errors import UserError, say
from llm3.files import TOKENIZER, can_rename_folders, local_path

VARIABLE = "LLM3_CACHE_DIR"
INSIDE = "cache"  # the folder of a workdir that holds its cache, if the user's cannot be written


def cache_directory(given: str, workdir: Path) -> Path:
    """The directory of the cache.

    given: config.cache_dir. Where it is empty: $LLM3_CACHE_DIR; else the cache inside the workdir, of a run that began
    with one; else that of the user, `user_cache`; if there is no home, or it cannot be written, workdir/cache, which is
    said. Raises UserError for a URL, and for a folder in a mounted bucket, which cannot rename folders.
    """
    directory = _chosen(given, workdir)
    there = next(each for each in (directory, *directory.absolute().parents) if each.is_dir())
    if not can_rename_folders(there):
        raise UserError(
            f"the cache cannot be in {directory}: folders cannot be renamed there, as in a mounted bucket; "
            f"set config.cache_dir or {VARIABLE} to a folder on a disk"
        )
    return directory


def _chosen(given: str, workdir: Path) -> Path:
    if given:
        return local_path(given, "config.cache_dir")
    if os.environ.get(VARIABLE):
        return local_path(os.environ[VARIABLE], f"${VARIABLE}")
    inside = workdir / INSIDE
    if inside.is_dir() and (workdir / TOKENIZER).is_file():
        return inside
    own = user_cache()
    if own is not None and _can_be_written(own):
        return own
    why = "there is no home directory" if own is None else f"{own} cannot be written"
    say(f"tokens: the cache is in {inside}, since {why}: set {VARIABLE} or config.cache_dir to a folder that can")
    return inside


def user_cache() -> Path | None:
    """$LLM3_CACHE_DIR, else $XDG_CACHE_HOME/llm3 (an absolute path), else ~/.cache/llm3; None: there is no home."""
    if os.environ.get(VARIABLE):
        return local_path(os.environ[VARIABLE], f"${VARIABLE}")
    if os.path.isabs(folder := os.environ.get("XDG_CACHE_HOME", "")):
        return Path(folder) / "llm3"
    try:
        return Path("~/.cache/llm3").expanduser()
    except RuntimeError:
        return None


def _can_be_written(directory: Path) -> bool:
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(directory, os.W_OK | os.X_OK)
