"""How documents are cut into windows. A plugin is one file here, found by its name.

A plugin has a class `WindowTable(cache, length)`: window i of it is a `Batch` of arrays [length], by random access.
Its attributes say what packing costs:

    waste       share of positions that are padding
    truncated   documents that lost tokens
    dropped     documents that lost every target
    documents   documents that have a window
    max_pieces  the most documents, or pieces of documents, in one window

`documents_of(i)` lists the documents of window i as (segment, document, (first, stop) token of the document).
"""
