"""The demo and its two other stories, each run whole at smoke size."""

import json
import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def smoke(script, *flags):
    """Run a demo script in seconds; what it prints."""
    command = ["bash", str(ROOT / "scripts" / script), "--smoke", "True", "--seed", "3", *flags]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    # From anywhere: a script finds its project itself.
    finished = subprocess.run(
        command, capture_output=True, text=True, timeout=600, check=False, cwd="/", env=environment
    )
    assert finished.returncode == 0, finished.stdout[-3000:] + finished.stderr[-3000:]
    return finished.stdout


@pytest.fixture(scope="module")
def demo_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    smoke("run_demo.sh", "--output_dir", str(folder))
    return folder


@pytest.mark.slow
def test_the_demo_runs_from_base_to_chart(demo_dir):
    summary = json.loads((demo_dir / "summary.json").read_text())
    promised = """sft/eval_loss_before sft/eval_loss_after rm/eval_accuracy ppo/score_first ppo/score_last
        ppo/kl_last len/sft len/ppo empty_frac/ppo gold/sft gold/ppo gold/win_rate gold/win_rate_low gold/win_rate_high
        seconds/base seconds/sft seconds/reward seconds/merge seconds/ppo seconds/compare"""
    assert set(promised.split()) <= set(summary)
    assert (demo_dir / "ppo.png").read_bytes().startswith(b"\x89PNG")
    assert "rlhf1" in (demo_dir / "compare" / "comparison.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("script", ["run_demo_collapse.sh", "run_demo_long.sh"])
def test_the_other_stories_go_on_from_a_demo_and_end_with_a_table_and_a_chart(script, demo_dir, tmp_path):
    words = smoke(script, "--demo_dir", str(demo_dir), "--output_dir", str(tmp_path))
    assert "SFT model" in words
    story = json.loads((tmp_path / "story.json").read_text())
    assert len(story["runs"]) == 2
    for run in story["runs"].values():
        assert set(run["checkpoints"]) == {"0", "1", "2"}
        assert set(run["evaluations"]) == {"proxy", "judge"}
    assert (tmp_path / "story.png").read_bytes().startswith(b"\x89PNG")
