"""The demo and its two other stories, each run whole at smoke size."""

import json
import subprocess
from pathlib import Path

import pytest

from demo import report
from demo.commands import STORIES
from rlhf.run.pictures import chinese_font

ROOT = Path(__file__).resolve().parents[2]
SMOKE = ["--smoke", "True", "--seed", "3"]


def scripted(name, *flags):
    """What a demo script prints."""
    # From anywhere: a script finds its project itself.
    command = ["bash", str(ROOT / "scripts" / name), *flags]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False, cwd="/")
    assert finished.returncode == 0, finished.stdout[-3000:] + finished.stderr[-3000:]
    return finished.stdout


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """Directory of a smoke run, and what it printed."""
    folder = tmp_path_factory.mktemp("demo")
    return folder, scripted("run_demo.sh", *SMOKE, "--output_dir", str(folder))


@pytest.mark.slow
def test_the_demo_runs_from_base_to_chart_and_ends_with_what_to_do_next(demo):
    folder, said = demo
    summary = json.loads((folder / "summary.json").read_text())
    promised = """sft/eval_loss_before sft/eval_loss_after rm/eval_accuracy ppo/score_first ppo/score_last
        ppo/kl_last len/sft len/ppo empty_frac/ppo gold/sft gold/ppo gold/win_rate gold/win_rate_low gold/win_rate_high
        seconds/base seconds/sft seconds/reward seconds/merge seconds/ppo seconds/compare cpu/ppo"""
    assert set(promised.split()) <= set(summary)
    assert (folder / "ppo.png").read_bytes().startswith(b"\x89PNG")
    assert "rlhf1" in (folder / "compare" / "comparison.md").read_text()

    # Every stage has its heading, and the end shows where to go on.
    assert all(f"[{number}/7] " in said for number in range(1, 8))
    assert "Talk to it:" in said and "Next, your own data:" in said and "python playground.py" in said
    # The same three prompts, answered by each version in turn.
    for version in ("base", "sft", "step_1", "step_2"):
        assert sum(line.split("|")[0].strip() == version for line in said.splitlines()) >= 3, version


@pytest.mark.slow
def test_the_picture_has_chinese_words_where_there_is_a_font_for_them(demo):
    folder, _ = demo
    english = (folder / "ppo.png").read_bytes()
    report.draw(folder, "zh")
    chinese = (folder / "ppo.png").read_bytes()
    assert (chinese != english) == (chinese_font() is not None)
    # The same picture again.
    report.draw(folder, "en")
    assert (folder / "ppo.png").read_bytes() == english


@pytest.mark.slow
@pytest.mark.parametrize("story", ["collapse", "long"])
def test_the_other_stories_go_on_from_a_demo_and_end_with_a_table_and_a_chart(story, demo, tmp_path, zygote):
    out = tmp_path / "out"
    flags = ["--story", story, *SMOKE, "--demo_dir", str(demo[0]), "--output_dir", str(out)]
    assert zygote.run_script("demo.run", flags, tmp_path / "log") == 0, zygote.said()[-3000:]
    assert "SFT model" in zygote.said()

    told = json.loads((out / "story.json").read_text())
    assert len(told["runs"]) == 2
    for run in told["runs"].values():
        assert set(run["checkpoints"]) == {"0", "1", "2"}
        assert set(run["evaluations"]) == {"proxy", "judge"}
    assert (out / "story.png").read_bytes().startswith(b"\x89PNG")


def test_each_story_has_a_script_that_passes_flags_on():
    names = {"demo": "run_demo.sh", "collapse": "run_demo_collapse.sh", "long": "run_demo_long.sh"}
    assert set(names) == set(STORIES)
    for story, name in names.items():
        last = (ROOT / "scripts" / name).read_text(encoding="utf-8").splitlines()[-1]
        assert last == f'exec python -m demo.run --story {story} "$@"'
