"""docs/minimal_ppo.py learns its task, on the project's own arithmetic, and is short enough to be read."""

import importlib.util
from pathlib import Path

import pytest

FILE = Path(__file__).resolve().parents[2] / "docs" / "minimal_ppo.py"


@pytest.fixture(scope="module")
def minimal():
    spec = importlib.util.spec_from_file_location("minimal_ppo", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("seed", [0, 1])
def test_the_policy_learns_to_write_what_is_asked_for_and_to_stop(minimal, seed):
    history = minimal.main(steps=60, seed=seed)
    assert history[0]["score"] < 2
    assert sum(step["score"] for step in history[-5:]) / 5 > 4.5
    assert history[-1]["kl"] > history[0]["kl"] == pytest.approx(0, abs=1e-5)


def test_it_is_about_150_lines_long_and_uses_the_projects_arithmetic():
    text = FILE.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 160
    for name in ("token_rewards", "gae", "whiten", "policy_loss", "value_loss", "selective_logprobs"):
        assert f"ppo.{name}(" in text
