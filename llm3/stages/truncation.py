"""Warnings about documents that are longer than a window."""

import numpy as np

from llm3.data.cache.token_cache import TokenCache
from llm3.data.packing import Windows
from llm3.errors import counted

# shares of the documents of a source from which on a user is warned; a long document often needs only its beginning
CUT_SHARE = 0.5
DROPPED_SHARE = 0.1  # without any target that fits


def truncation_warning(table: Windows, cache: TokenCache, source: str, length: int, field: str) -> str:
    """What is lost of a source, and which field to raise; "" for little. length: tokens of a window."""
    if cache.documents and table.dropped >= DROPPED_SHARE * cache.documents:
        share, lost = table.dropped / cache.documents, "have no target that fits, and are dropped"
    elif cache.documents and table.truncated >= CUT_SHARE * cache.documents:
        share, lost = table.truncated / cache.documents, "are cut"
    else:
        return ""
    most, longest = np.quantile(np.diff(cache.offsets), [0.9, 1], method="higher").tolist()
    return (
        f"warning: {100 * share:.0f} % of the documents of {source} {lost}: a window holds {counted(length, 'token')}; "
        f"raise {field} ({most:,} would hold 90 % of the documents, the longest has {counted(longest, 'token')})"
    )
