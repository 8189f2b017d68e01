"""What TensorBoard shows of a stage, read back from the records of its event files."""

import pathlib

from tensorboardX.proto.event_pb2 import Event


def events(directory: pathlib.Path) -> list[tuple]:
    """(step, value) from the records of the event files: 8 bytes of length, 4 of its checksum, data, 4 more."""
    found = []
    for path in sorted(directory.glob("events.out.tfevents.*")):
        data = path.read_bytes()
        while data:
            size = int.from_bytes(data[:8], "little")
            event = Event.FromString(data[12 : 12 + size])
            found += [(event.step, value) for value in event.summary.value]
            data = data[16 + size :]
    return found


def scalars(directory: pathlib.Path) -> list[tuple[int, str, float]]:
    """(step, tag, value), as written."""
    values = [(step, value) for step, value in events(directory) if not value.HasField("metadata")]
    return [(step, value.tag, value.simple_value) for step, value in values]
