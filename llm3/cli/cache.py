"""The verb `cache`: what the cache of a user holds, and making room in it."""

import datetime
import sys
from pathlib import Path

from rich.table import Table

from llm3.cli.checks import seconds_of
from llm3.data.cache.inventory import Entry, entries, prune
from llm3.data.cache.place import user_cache
from llm3.errors import UserError, counted, writing
from llm3.report.console import new_console
from llm3.report.units import count


def cache(
    action: str,
    cache_dir: Path | None = None,
    older_than: str | None = None,
    max_gb: float | None = None,
    everything: bool = False,
    dry_run: bool = False,
) -> int:
    """List the entries of a cache (action "ls"), or remove some of them ("prune") unless a process uses them.

    cache_dir: None is the user's. older_than: "30d", remove what was not used for so long. max_gb: then remove the
    least recently used until so many GB are left. everything: remove all. dry_run: only say what would be removed.
    Raises UserError, and NotWritten if an entry cannot be removed.
    """
    directory = cache_dir or user_cache()
    if directory is None:
        raise UserError("cache: there is no home directory: expected --cache_dir=DIR")
    if action == "ls":
        _show(entries(directory), directory)
        return 0
    unused_for = 0.0 if everything else None if older_than is None else seconds_of(older_than)
    most = None if max_gb is None else max_gb * 1e9
    with writing(f"the change of {directory}"):
        pruned = prune(directory, unused_for=unused_for, most_bytes=most, dry_run=dry_run)
    for each in pruned.removed:
        print(f"{'would remove' if dry_run else 'removed'} {described(each)}")
    for each in pruned.in_use:
        print(f"in use: {described(each)}")
    freed = sum(each.size for each in pruned.removed)
    removed = "would be removed" if dry_run else "removed"
    print(f"{_entries(pruned.removed)} {removed}, {count(freed)}B; {len(pruned.in_use):,} in use")
    return 0


def described(entry: Entry) -> str:
    """An entry on one line."""
    return " ".join(part for part in (entry.kind, entry.path.name, entry.source, entry.split, f"{count(entry.size)}B"))


def _show(found: list[Entry], directory: Path) -> None:
    table = Table("kind", "source", "split", box=None, header_style="bold")
    for column in ("documents", "tokens", "size"):
        table.add_column(column, justify="right")
    table.add_column("last used", no_wrap=True)
    table.add_column("built in")
    for each in found:
        documents = "" if each.documents is None else f"{each.documents:,}"
        used = datetime.datetime.fromtimestamp(each.used).strftime("%Y-%m-%d %H:%M")
        tokens = "" if each.tokens is None else count(each.tokens)
        source = each.source or each.path.name
        table.add_row(each.kind, source, each.split, documents, tokens, f"{count(each.size)}B", used, each.folder)
    if found:
        new_console(width=None if sys.stdout.isatty() else 160).print(table)
    print(f"{_entries(found)}, {count(sum(each.size for each in found))}B in {directory}")


def _entries(found: list[Entry]) -> str:
    return counted(len(found), "entry").replace("entrys", "entries")
