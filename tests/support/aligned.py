"""Bases whose tensors lie at multiples of 64 bytes in their file."""

import struct
from pathlib import Path

from safetensors.torch import load_file, save_file


def align(base: Path | str) -> str:
    """Write the weights of a base anew, at addresses that every product rounds alike; returns the directory.

    Weights are mapped from their file as they lie there, while gathered ones lie at the allocator's addresses. MKL's
    product of a single row rounds by the address.
    """
    file = Path(base) / "model.safetensors"
    tensors = load_file(file)
    for spare in range(64):
        save_file(tensors, file, metadata={"format": "pt", "spare": "x" * spare})
        with file.open("rb") as stream:
            start = 8 + struct.unpack("<Q", stream.read(8))[0]
        if start % 64 == 0:
            return str(base)
    raise AssertionError("no header has the right length")
