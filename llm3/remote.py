"""A run in a bucket: `gs://bucket/run` or `s3://bucket/run` as a workdir.

Its checkpoints are in the bucket alone; Orbax reads and writes them there. Its small files are also in a temporary
folder of each process, the copy, which is what the rest of llm3 sees as the workdir. `push` uploads the files of the
copy that have changed, `pull` brings it up to date. The first process pushes what the others are to find, before every
checkpoint, and at the end; the others pull. A bucket has no folders: a file is there at once, or not at all.
"""

import atexit
import importlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llm3.errors import NotWritten, UserError
from llm3.files import BASE, CHECKPOINTS, COMPILED, local_path, show_as

SCHEMES = ("gs://", "s3://")
UNCOPIED = frozenset({BASE, CHECKPOINTS, COMPILED, "cache"})  # folders of a run or stage
NOT_UPLOADED = (".lock", ".partial")


class Copy:
    """The copy of a run. Raises UserError if the bucket cannot be read."""

    def __init__(self, url: str):
        self.url = url.rstrip("/")
        self._store = file_system(self.url)
        self._root = name_of(self.url)
        temporary = Path(tempfile.mkdtemp(prefix="llm3-")).resolve()
        atexit.register(shutil.rmtree, temporary, ignore_errors=True)
        self.folder = temporary / self._root  # so that messages name the bucket and the run
        self.folder.mkdir(parents=True)
        self._uploaded: dict[str, tuple[int, int]] = {}  # {name: (mtime in ns, size) of what the bucket has}
        self._downloaded: dict[str, Any] = {}  # {name: version in the bucket}
        self.pull()

    def push(self) -> None:
        """Upload what has changed since the last push or pull, and remove what is gone. Raises NotWritten."""
        found = {name: (path.stat().st_mtime_ns, path.stat().st_size) for name, path in self._files()}
        try:
            changed = [name for name in found if self._uploaded.get(name) != found[name]]
            for name in sorted(changed, key=found.__getitem__):  # as they were written: a row after what it speaks of
                self._store.pipe_file(f"{self._root}/{name}", (self.folder / name).read_bytes())
                self._uploaded[name] = found[name]
            for name in self._uploaded.keys() - found.keys():
                self._store.rm_file(f"{self._root}/{name}")
                del self._uploaded[name]
        except Exception as error:  # of several libraries
            raise NotWritten(f"{self.url} was not written: {error}") from error

    def pull(self) -> None:
        """Download what has changed since the last pull, and remove what is gone."""
        try:
            found = dict(self._objects(self._root))
            for name in [each for each in found if self._downloaded.get(each) != found[each]]:
                path = self.folder / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(self._store.cat_file(f"{self._root}/{name}"))
                self._downloaded[name] = found[name]
                self._uploaded[name] = (path.stat().st_mtime_ns, path.stat().st_size)
        except Exception as error:
            raise UserError(f"{self.url} cannot be read: {error}") from error
        for name in self._downloaded.keys() - found.keys():
            (self.folder / name).unlink(missing_ok=True)
            del self._downloaded[name], self._uploaded[name]

    def _files(self) -> Iterator[tuple[str, Path]]:
        for path in sorted(self.folder.rglob("*")):
            inside = path.relative_to(self.folder)
            if path.is_file() and not UNCOPIED & set(inside.parts) and not path.name.endswith(NOT_UPLOADED):
                yield str(inside), path

    def _objects(self, folder: str) -> Iterator[tuple[str, Any]]:
        """(name, version) of the objects below a folder; of the folders that are not copied, empty ones are made."""
        try:
            entries = self._store.ls(folder, detail=True)
        except FileNotFoundError:
            return
        for entry in entries:
            name = entry["name"].rstrip("/").removeprefix(f"{self._root}/")
            last = name.rpartition("/")[2]
            if entry["type"] == "directory" and last in UNCOPIED:
                (self.folder / name).mkdir(parents=True, exist_ok=True)
            elif entry["type"] == "directory":
                yield from self._objects(entry["name"].rstrip("/"))
            elif not last.endswith(NOT_UPLOADED) and entry["name"] != folder:
                yield name, entry.get("generation") or entry.get("ETag") or (entry["size"], entry.get("mtime"))


_copies: dict[str, Copy] = {}


def workdir_path(text: str | Path, where: str) -> Path:
    """The workdir that a flag names: a path on this machine, or for the URL of a bucket its copy.

    Raises UserError for other URLs, and if the bucket cannot be read.
    """
    if not str(text).startswith(SCHEMES):
        return local_path(text, where)
    if not name_of(str(text)).partition("/")[2].strip("/"):
        raise UserError(f"{where}={text}: expected {str(text)[:5]}BUCKET/RUN")
    url = str(text).rstrip("/")
    if url not in _copies:
        _copies[url] = Copy(url)
        show_as(_copies[url].folder, url)
    return _copies[url].folder


def url_of(path: Path) -> str | None:
    """The URL of a file or folder in the copy of a run; None if it is in none."""
    for copy in _copies.values():
        if path.is_relative_to(copy.folder):
            return f"{copy.url}/{path.relative_to(copy.folder)}".removesuffix("/.")
    return None


def address(path: Path) -> str:
    """A file or folder as others find it: its URL in a bucket, or else its absolute path."""
    return url_of(path.resolve()) or str(path.resolve())


def copies() -> list[Copy]:
    """The copies of this process."""
    return list(_copies.values())


def push() -> None:
    """Upload what has changed in the copies. Raises NotWritten."""
    for copy in _copies.values():
        copy.push()


def pull() -> None:
    """Bring the copies up to date."""
    for copy in _copies.values():
        copy.pull()


def name_of(url: str) -> str:
    """The bucket and the name in it, as fsspec takes them."""
    return url.partition("://")[2]


def file_system(url: str) -> Any:
    """Where a URL is, through fsspec, without a cache of listings. Raises UserError if its library is not installed."""
    # gcsfs would ask for the kind of the bucket by another protocol, for a minute where only HTTP gets through
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    try:
        import fsspec

        importlib.import_module("s3fs" if url.startswith("s3://") else "gcsfs")
    except ImportError as error:
        raise UserError(f"{url}: to use it, pip install {error.name}") from None
    for protocol in (
        "gs",
        "gcs",
        "s3",
    ):  # also for etils, which Orbax uses: TensorStore writes behind the back of a cache
        fsspec.config.conf.setdefault(protocol, {})["use_listings_cache"] = False
    return fsspec.filesystem("s3" if url.startswith("s3://") else "gcs")
