"""The demo's two studies of a reward model, length and best of n: their pairs, their promises, their tables."""

import random

import pytest
import torch

from demo import best_of_n, length
from demo.pairs import longer_pairs, sure_pairs
from demo.world import split_prompts
from rlhf.reward import best_of

TRAIN, HELD = split_prompts(0)


def test_in_pairs_that_teach_length_the_chosen_answer_is_longer_and_test_pairs_are_balanced():
    rows = longer_pairs(TRAIN, 100, random.Random(0))
    assert len(rows) == 100
    longer = sum(len(row["chosen"]) >= 1.2 * len(row["rejected"]) for row in rows)
    assert 60 < longer < 100
    test = length.balanced(sure_pairs(HELD, 400, random.Random(0)), 50)
    assert sum(len(row["chosen"]) > len(row["rejected"]) for row in test) == 50
    assert sum(len(row["chosen"]) < len(row["rejected"]) for row in test) == 50
    with pytest.raises(ValueError, match="too few pairs to balance"):
        length.balanced(rows, 50)


def test_broken_promises_about_length_are_named():
    one = {"as it is": {"spearman": 0.6, "accuracy": 0.7}, "calibrated": {"spearman": 0.1, "accuracy": 0.7}}
    measured = {"fresh": one, "balanced": one}
    lengths = {"sft": 20.0, "plain": 25.0, "calibrated": 21.9}
    assert length.broken_promises(measured, lengths) == []
    one["calibrated"] = {"spearman": -0.2, "accuracy": 0.6}
    broken = length.broken_promises(measured, {"sft": 20.0, "plain": 21.0, "calibrated": 17.0})
    assert [words[:20] for words in broken] == [
        "the rank correlation", "accuracy on length-b", "the policy's length ", "without calibration ",
    ]  # fmt: skip


def test_the_table_of_best_of_n_has_a_line_for_each_n_and_the_chart_both_panels(tmp_path):
    torch.manual_seed(0)
    scores = torch.randn(20, 8, dtype=torch.float64)
    found = {name: best_of.summary(scores, sign * scores) for name, sign in (("careless", -1), ("own", 1))}
    for each in found.values():
        each["gold"] = best_of.summary(scores, scores)
    lines = best_of_n.table(found).splitlines()
    assert [line.split()[0] for line in lines[2:]] == ["1", "2", "4", "8"]
    last = [float(cell) for cell in lines[-1].split()]
    assert last[2] == -last[3] == last[4] == last[5] == last[6]
    best_of_n.draw(found, tmp_path / "chart.png")
    assert (tmp_path / "chart.png").stat().st_size > 10_000
