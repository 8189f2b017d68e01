"""Kinds of predictions. A plugin is one file here, found by the name that `--what` gives.

A plugin has

    FORMATS                                   the row formats that it reads, the preferred one first
    ANSWERED (optional)                       whether it reads the answers of dialogues too
    ROWS                                      rows that are predicted, and written, at a time
    Options                                   a frozen dataclass; its fields are flags of the command
    least_length(options) -> int              the fewest tokens of a window
    refusal(trained) -> str                   why the stage cannot make such predictions; "": it can
    read(row, fields) -> record               the content of a row, see `read_row` and `read_input` of a row format
    encode(record, fields, trained, tokenizer, options) -> Document
    columns(trained, options) -> {column: pyarrow type}
    predict(session, items) -> list of {column: value}, or of BadRow for an item without a prediction

`read` and `encode` raise BadRow for an unusable row. `encode` gets a tokenizer that encodes many texts at once. A
prediction depends on its item only: not on the other items, nor on batch size, packing or devices. `predict` is called
by all processes, with the same items.
"""
