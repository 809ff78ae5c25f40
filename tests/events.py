"""TensorBoard's event files, read back."""

from tensorboardX.proto.event_pb2 import Event


def events(folder):
  """Events in all files of a folder: length (8 bytes), its checksum (4), payload, its checksum (4)."""
  found = []
  for file in sorted(folder.glob("events.*")):
    rest = file.read_bytes()
    while rest:
      size = int.from_bytes(rest[:8], "little")
      found.append(Event.FromString(rest[12 : 12 + size]))
      rest = rest[16 + size :]
  return found
