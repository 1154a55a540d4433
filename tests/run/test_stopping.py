"""Signals: noted wherever they come, in the middle of a print too."""

import io
import os
import signal
import sys

from rlhf.run import stopping


class Interrupting(io.RawIOBase):
    """A file in whose first write a signal comes."""

    def __init__(self):
        self.written = b""
        self.signalled = False

    def writable(self):
        return True

    def write(self, data):
        if not self.signalled:
            self.signalled = True
            os.kill(os.getpid(), signal.SIGTERM)
        self.written += data
        return len(data)


def test_a_signal_in_the_middle_of_a_print_is_noted_and_the_print_ends(monkeypatch, capfd):
    monkeypatch.setattr(stopping, "_first", {})
    before = signal.signal(signal.SIGTERM, stopping._note)
    file = Interrupting()
    try:
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BufferedWriter(file), encoding="utf-8"))
        print("step 3", flush=True)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert file.written == b"step 3\n"
    assert stopping._first == {"signum": signal.SIGTERM}
    assert "SIGTERM: stopping at the next safe point" in capfd.readouterr().err
