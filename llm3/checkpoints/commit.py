"""How a finished checkpoint is told from an unfinished one: by the name of its folder, or by its last file.

On an ordinary file system Orbax writes a step into a temporary folder, which it renames at the end. A bucket has no
folders to rename, whether it is mounted (gcsfuse, s3fs) or named by a URL. There, Orbax writes into the final folder,
and a step counts once it has `COMMITTED`, which Orbax writes last: the commit is one small file. A folder on a disk
that holds `BY_FILE` is of the second kind, for all readers, also after it was copied elsewhere.
"""

import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

from llm3 import remote
from llm3.errors import writing
from llm3.files import can_rename_folders

BY_FILE = "committed_by_file"  # an empty file
COMMITTED = "commit_success.txt"  # Orbax's name


def located(directory: Path) -> Path:
    """Where the checkpoints of a folder are: in the folder, made absolute, or for the copy of a run in its bucket.

    The second is an epath.Path, with the same methods.
    """
    if not isinstance(directory, Path):
        return directory
    if (url := remote.url_of(directory)) is None:
        return directory.absolute()
    from etils import epath

    return cast(Path, epath.Path(url))


def remove_tree(directory: Any) -> None:
    """Remove a folder with all that it holds, as far as possible. directory: as `located` returns it."""
    if isinstance(directory, Path):
        shutil.rmtree(directory, ignore_errors=True)
    else:
        with suppress(Exception):  # of several libraries
            directory.rmtree()


def by_file(directory: Path) -> bool:
    """Whether the checkpoints in a folder are committed by a file."""
    return not isinstance(directory, Path) or (directory / BY_FILE).is_file()


def saved_steps(directory: Path) -> list[int]:
    """The steps of the finished checkpoints in a folder, ascending; none if there is no folder."""
    directory = located(directory)
    folders = _folders(directory)
    if by_file(directory):
        folders = [each for each in folders if (each / COMMITTED).is_file()]
    return sorted(int(each.name) for each in folders)


def _folders(directory: Path) -> list[Path]:
    """The folders that are named by a step."""
    try:
        return [each for each in directory.iterdir() if each.name.isdecimal() and each.is_dir()]
    except (FileNotFoundError, NotADirectoryError):  # a bucket has no empty folders
        return []


def prepare(directory: Path) -> bool:
    """Make a folder ready for saves, and return whether they are committed by a file. One process calls it.

    Steps that were not committed are removed; where the names of folders commit them, Orbax does that. Raises
    NotWritten if a bucket refuses; what a disk refuses, the save says.
    """
    with suppress(OSError):
        directory.mkdir(parents=True, exist_ok=True)
    if not by_file(directory):
        if can_rename_folders(directory):
            return False
        with writing(directory):
            for step in saved_steps(directory):  # committed by their names, before they were moved here
                (directory / str(step) / COMMITTED).touch()
            (directory / BY_FILE).touch()
    finished = set(map(str, saved_steps(directory)))
    for each in _folders(directory):
        if each.name not in finished:
            remove_tree(each)
    return True


def delete(step: Path) -> None:
    """Delete a checkpoint: first what makes it count, so that no part of it does. Raises NotWritten."""
    if by_file(step.parent):
        with writing(step):
            (step / COMMITTED).unlink(missing_ok=True)
        remove_tree(step)
        return
    unnamed = step.with_name(f"{step.name}.orbax-checkpoint-tmp-deleted")  # Orbax removes one that is left behind
    with writing(step), suppress(FileNotFoundError):  # someone else may delete it at the same time
        step.rename(unnamed)
    shutil.rmtree(unnamed, ignore_errors=True)


def set_aside(step: Path) -> Path:
    """The path to which a damaged step is to be renamed: the first free one that is no checkpoint."""
    names = (step.with_name(f"{step.name}.damaged{suffix}") for suffix in ("", *(f"-{n}" for n in range(2, 100))))
    return next(name for name in names if not name.exists())


def rename(step: Path, target: Path) -> None:
    """Give a step another name, as a copy where folders cannot be renamed. Raises NotWritten if the disk refuses."""
    step, target = located(step), located(target)
    with writing(target):
        if not by_file(step.parent):
            step.rename(target)
            return
        if isinstance(step, Path):
            shutil.copytree(step, target)
        else:
            remote.file_system(str(step)).copy(str(step), str(target), recursive=True)
        delete(step)
