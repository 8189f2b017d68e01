"""How documents are cut into windows. A peer is one file here, found by its name.

A peer has a class `Table(cache, length)`: window i of it is a `Batch` of arrays [length], by random access. It knows
what packing cost: `waste`, the share of padded positions, `truncated`, the number of documents that lost tokens, and
`dropped`, of those that lost all that there was to learn from. `documents` is the number of those in its windows, and
`documents_of(i)` lists those of a window as (segment, document, (first, stop) token of the document).
"""
