"""RewardBench-format files in --audit_only: every row counts, best-of-4 rows as one question, by subset."""

import json
from pathlib import Path

import pytest
from adapters import random_adapter
from stages import words, write_lines

import reward_modeling
from rlhf.data.choose_format import text_format
from rlhf.data.encoding import load_tokenizer
from rlhf.data.template import DEFAULT_TEMPLATE
from rlhf.reward import benchmark
from rlhf.reward.statistics import wilson

VERSION_1 = [
    {"prompt": f"小猫喜欢什么？{number}", "chosen": "喜欢红茶！" * (1 + number % 3), "rejected": "喜欢苹果。",
     "subset": ("math", "chat")[number % 4 == 0], "id": number}
    for number in range(12)
]  # fmt: skip
VERSION_2 = [
    {"prompt": "你好。", "chosen": ["你好！"], "rejected": ["再见。", "苹果。", "晴天。"], "subset": "Focus"},
    {"prompt": "我是谁？", "chosen": ["老师。", "医生。"], "rejected": ["苹果。", "红茶！"], "subset": "Ties"},
    {"prompt": "晴天？", "chosen": ["今天晴天。"], "rejected": ["今天。", "今天晴天。", "不。"], "subset": "Focus"},
]


def arguments(base: str, data: str, reward: str, **changed):
    flags = {
        "model_name": base, "dataset_name": data, "audit_only": True, "reward_model_lora_path": reward,
        "per_device_eval_batch_size": 8, "audit_prompts": 4,
    } | changed  # fmt: skip
    return reward_modeling.parse_args(words(flags))


@pytest.fixture(scope="module")
def reward(tiny_base, tmp_path_factory) -> str:
    return random_adapter(tiny_base, tmp_path_factory.mktemp("benchmark") / "reward", "reward", seed=1)


def load(base, reward, rows, folder, **changed):
    args = arguments(
        base, write_lines(folder / "bench.jsonl", rows), reward, prompt_template=DEFAULT_TEMPLATE, **changed
    )
    return benchmark.load(args, text_format(load_tokenizer(base)))


def test_the_audit_gives_accuracy_by_subset_over_every_row_of_the_file(tiny_base, reward, tmp_path, capsys):
    data = write_lines(tmp_path / "bench.jsonl", VERSION_1)
    reward_modeling.main(arguments(tiny_base, data, reward))
    audit = json.loads((Path(reward) / "audit.json").read_text(encoding="utf-8"))
    assert {name: part["n"] for name, part in audit["subsets"].items()} == {"chat": 3, "math": 9}
    # Over all rows the audit's own accuracy is the mean of the subsets, weighed by their sizes.
    right = sum(part["share"] * part["n"] for part in audit["subsets"].values())
    assert right == pytest.approx(audit["accuracy"]["share"] * 12)
    part = audit["subsets"]["math"]
    assert part["interval"] == pytest.approx(
        [max(0, wilson(part["share"], 9)[0]), min(1, wilson(part["share"], 9)[1])]
    )
    report = (Path(reward) / "audit.md").read_text(encoding="utf-8")
    assert "## Accuracy by subset" in report and "| mean of the subsets | 12 |" in report
    assert "math: right on" in capsys.readouterr().out


def test_a_question_of_several_answers_is_right_where_all_chosen_beat_all_rejected(
    tiny_base, reward, tmp_path, capsys
):
    rows = load(tiny_base, reward, VERSION_2, tmp_path)
    # One rejected answer of the last question is the chosen one: no part of that question counts.
    assert [row["columns"][benchmark.SUBSET] for row in rows] == ["Focus"] * 3 + ["Ties"] * 4
    assert "another answer to the same question is dropped" in capsys.readouterr().out

    tokenizer = load_tokenizer(tiny_base)
    asked = []

    def score_rows(ids):
        asked.extend(map(tuple, ids))
        texts = [tokenizer.decode(row, skip_special_tokens=True).rpartition("答：")[2] for row in ids]
        return [{"你好！": 1.0, "再见。": 0.5, "苹果。": 0.9, "晴天。": -1.0}.get(text, 0.0) for text in texts]

    found = benchmark.by_subset(score_rows, rows)
    assert len(asked) == len(set(asked)) == 8
    assert found["Focus"]["share"] == 1.0 and found["Focus"]["chance"] == pytest.approx(1 / 4)
    # A tie is lost, and one of two chosen answers would not be enough.
    assert found["Ties"]["share"] == 0.0 and found["Ties"]["chance"] == pytest.approx(1 / 6)


def test_data_without_subsets_or_that_the_model_was_trained_on_keep_their_split(tiny_base, reward, tmp_path):
    plain = [{name: value for name, value in row.items() if name != "subset"} for row in VERSION_1]
    assert load(tiny_base, reward, plain, tmp_path) is None
    own = tmp_path / "own"
    random_adapter(tiny_base, own, "reward", seed=1)
    run = json.loads((own / "run.json").read_text(encoding="utf-8"))
    run["arguments"]["dataset_name"] = str(tmp_path / "bench.jsonl")
    (own / "run.json").write_text(json.dumps(run), encoding="utf-8")
    assert load(tiny_base, str(own), VERSION_1, tmp_path) is None
    assert len(load(tiny_base, reward, VERSION_1, tmp_path)) == 12


@pytest.mark.parametrize(
    ("row", "words_of_it"),
    [
        ({"prompt": "甲？", "chosen": None, "rejected": "乙。", "subset": "math"}, "bench.jsonl:13"),
        ("只有文字", "bench.jsonl:13: a row must be an object"),
    ],
)
def test_a_malformed_row_is_named(tiny_base, reward, tmp_path, row, words_of_it):
    with pytest.raises(ValueError, match=words_of_it):
        load(tiny_base, reward, [*VERSION_1, row], tmp_path)


def test_a_file_that_leaves_nothing_is_refused(tiny_base, reward, tmp_path):
    with pytest.raises(ValueError, match="leaves no question to judge"):
        load(tiny_base, reward, VERSION_1, tmp_path, max_length=3)
