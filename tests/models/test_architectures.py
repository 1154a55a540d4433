"""The table of architectures in the documents: every row is what its tiny model does."""

import re
from pathlib import Path

import pytest

from benchmarks import architectures
from benchmarks.architectures import ARCHITECTURES, table, try_architecture

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """Pictures take most of the time of runs as short as these, and show nothing of an architecture."""
    monkeypatch.setattr(architectures.rl_training.charts, "draw_run", lambda folder: None)
    monkeypatch.setattr("rlhf.reward.audit_report.draw", lambda *given: None, raising=False)


@pytest.mark.parametrize("page", ["docs/running.md", "docs/zh/running.md"])
def test_the_documents_have_a_row_for_every_architecture(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    rows = re.findall(r"^\| (.*?) \| (?:yes|no) \|", text, re.MULTILINE)
    assert rows == list(ARCHITECTURES)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_an_architecture_does_what_its_row_says(name, tmp_path):
    row = table([try_architecture(name, tmp_path)]).splitlines()
    text = (ROOT / "docs" / "running.md").read_text(encoding="utf-8")
    # The row of the table, and the sentence of a refusal.
    assert row[2] in text
    assert all(line in text for line in row[4:])
