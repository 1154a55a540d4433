"""The story of several reward models: its command lines parse, and its figures say where a run fell and who warned."""

import importlib
import json

from demo import ensembles
from demo.ensembles import Arguments, figures, models, place, runs, table


def test_every_command_parses_and_every_run_has_its_reward_models(tmp_path):
    made = [*models(Arguments(), 1, tmp_path), *runs(Arguments(), 1, tmp_path)]
    for each in made:
        module = importlib.import_module(each.module)
        parsed = module.parse_args(list(each.argv)[2 if each.argv[0] == "-m" else 1 :])
        if each.module == "rl_training":
            members, _, _ = ensembles.RUNS[each.name]
            assert [folder.rpartition("/")[2] for folder in parsed.reward_roles.values()] == list(members)
    assert [each.name for each in made if each.name in ensembles.RUNS] == list(ensembles.RUNS)


def test_figures_name_the_height_the_fall_and_the_first_warning(tmp_path):
    (tmp_path / "gold_ppo_mean").mkdir()
    (tmp_path / place("mean")).mkdir()
    gold = {0: 0.5, 10: 0.8, 20: 0.9, 30: 0.86, 40: 0.84, 50: 0.6}
    story = {"runs": {"mean": {"checkpoints": {str(step): {"gold": score} for step, score in gold.items()}}}}
    (tmp_path / "gold_ppo_mean" / "story.json").write_text(json.dumps(story))
    rows = [{"step": step, "score/spread": 0.4 + 0.01 * step, "score/mean": step / 10} for step in range(1, 51)]
    lines = [json.dumps(row) + "\n" for row in rows]
    (tmp_path / place("mean") / "metrics.jsonl").write_text("".join(lines))

    found = figures(tmp_path, "mean", [1.5, 3.0])
    assert (found["height"], found["fell"], found["end"]) == (20, 40, 0.6)
    # 1.5 times 0.41 is passed at 0.4 + 0.22.
    assert found["warned"] == {1.5: list(range(22, 51)), 3.0: []}
    last = table({(0, "mean"): found}, [1.5, 3.0]).splitlines()[-1].split()
    assert last == ["0", "mean", "0.500", "0.900", "20", "0.600", "40", "1.95", "2.20", "22", "(29)", "-"]
