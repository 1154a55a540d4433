"""Work that takes long says how far it has come: in place on a terminal, in lines elsewhere, from one process."""

import io
import time

import pytest

from rlhf.data import encoding, reading
from rlhf.data.choose_format import text_format
from rlhf.data.funnel import Funnel
from rlhf.run import progress
from rlhf.run.progress import Progress, shown


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def talkative(monkeypatch):
    """Every piece of work counts as long, and every item as a reason to say so."""
    for name in ("QUIET", "IN_FILE", "ON_TERMINAL"):
        monkeypatch.setattr(progress, name, 0.0)


def test_a_file_gets_lines_with_pace_and_time_left(talkative, capsys):
    assert list(shown(["a", "b", "c", "d"], "encoding")) == ["a", "b", "c", "d"]
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 5
    assert lines[1].startswith("encoding: 2 of 4 rows (50%), ")
    assert lines[1].endswith(" a second, 0:00:00 left")
    assert lines[-1] == "encoding: 4 rows in 0:00:00"


def test_time_left_follows_from_the_pace():
    work = Progress("encoding", 300)
    work.done = 100
    assert work.line(work.start + 50) == "encoding: 100 of 300 rows (33%), 2 a second, 0:01:40 left"
    assert Progress("reading").line(time.monotonic() + 1).startswith("reading: 0 rows, 0 a second")


def test_a_terminal_has_one_line_that_is_gone_at_the_end(talkative, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    assert len(list(shown(iter(range(3)), "reading"))) == 3
    written = terminal.getvalue()
    assert "\n" not in written
    assert written.count("\rreading: ") == 3
    assert written.endswith("\r\033[K")


def test_short_work_and_other_processes_are_silent(talkative, monkeypatch, capsys):
    launcher = {"RANK": 1, "WORLD_SIZE": 2, "LOCAL_RANK": 1, "MASTER_ADDR": "localhost", "MASTER_PORT": 1}
    for name, value in launcher.items():
        monkeypatch.setenv(name, str(value))
    list(shown(range(3), "reading"))
    for name in launcher:
        monkeypatch.delenv(name)
    monkeypatch.setattr(progress, "QUIET", 2.0)
    list(shown(range(3), "reading"))
    assert capsys.readouterr().err == ""


def test_an_error_within_the_work_ends_the_line(talkative, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    rows = shown(range(3), "reading")
    next(rows)
    next(rows)
    rows.close()
    assert terminal.getvalue().endswith("\r\033[K")


def test_reading_encoding_and_fingerprints_say_how_far_they_are(talkative, tiny_base, tmp_path, capsys):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(f'{{"prompt": "问题{n}", "answer": "回答"}}\n' for n in range(5)), encoding="utf-8")
    rows, funnel = reading.load_rows(str(file), "sft")
    encoding.sft_rows(text_format(encoding.load_tokenizer(tiny_base)), rows, 100, Funnel())
    reading.data_fingerprint(rows)
    said = capsys.readouterr().err
    assert funnel.kept == 5
    assert "reading: 5 rows in" in said
    for what in ("checking", "encoding", "fingerprint of the data"):
        assert f"{what}: 5 of 5 rows (100%)" in said
