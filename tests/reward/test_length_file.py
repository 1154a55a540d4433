"""Length calibration from the audit to PPO: fitted, stored, subtracted, refused, compared when a run is resumed."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from adapters import random_adapter, that_ends
from stages import words, write_pairs

import reward_modeling
import rl_training
from rlhf.artefacts.files import write_json
from rlhf.artefacts.fingerprints import parent_entry
from rlhf.artefacts.run_json import load_run
from rlhf.reward.length_file import LENGTH_FILE, calibrate, read_length_file, section
from rlhf.reward.statistics import length_results, points


def planted(pairs: int = 400) -> dict[str, list]:
    """Points of answers whose score is what they are worth and, three times as strong, the root of their length."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(5, 200, size=(pairs, 2))
    worth = rng.normal(size=(2, pairs)) + np.array([[0.7], [-0.7]])
    chosen, rejected = worth + np.sqrt(lengths.T / 20.0)
    return points(lengths, chosen, rejected)


def test_what_length_adds_is_gone_and_length_balanced_accuracy_is_not_lower():
    found = calibrate(planted())
    assert found["before"]["spearman"] > 0.4
    assert abs(found["after"]["spearman"]) <= 0.1
    assert found["after"]["debiased"] > found["before"]["debiased"]
    assert found["answers"] == 800
    table = section({"length_calibration": found})[0][1]
    assert table[1] == [
        "rank correlation with length",
        f"{found['before']['spearman']:.3f}",
        f"{found['after']['spearman']:.3f}",
    ]


def test_too_few_answers_give_a_reason_in_place_of_a_fit():
    found = calibrate(planted(3))
    assert found == {"impossible": "length calibration needs 20 held-out answers, there are 6"}
    assert section({"length_calibration": found})[0][1][0][1] == found["impossible"]
    assert section({}) == []


@pytest.fixture(scope="module")
def world(tiny_base, tmp_path_factory) -> dict:
    """Flags of a short PPO run whose reward adapter has been audited."""
    folder = tmp_path_factory.mktemp("length")
    tiny_base = that_ends(tiny_base, folder / "base")
    reward = random_adapter(tiny_base, folder / "reward", "reward", seed=1)
    pairs = write_pairs(folder / "pairs.jsonl", 40)
    audit = {
        "model_name": tiny_base, "dataset_name": pairs, "eval_size": 30, "audit_only": True, "audit_prompts": 4,
        "reward_model_lora_path": reward, "per_device_eval_batch_size": 8,
    }  # fmt: skip
    reward_modeling.main(reward_modeling.parse_args(words(audit)))
    return {
        "base_model_name": tiny_base, "sft_model_lora_path": random_adapter(tiny_base, folder / "sft"),
        "reward_model_lora_path": reward, "dataset_name": pairs, "steps": 8, "batch_size": 8, "mini_batch_size": 4,
        "ppo_epochs": 1, "output_max_length": 12, "check": False, "sample_freq": 1, "reward_transform": "raw",
    }  # fmt: skip


def run(world: dict, out: Path, **changed) -> Path:
    rl_training.main(rl_training.parse_args(words(world | {"output_dir": out} | changed)))
    return out


def first_answers(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text(encoding="utf-8").splitlines()]


def test_the_audit_stores_the_fit_and_ppo_subtracts_it_from_the_reward_models_score(world, tmp_path):
    folder = Path(world["reward_model_lora_path"])
    stored = json.loads((folder / LENGTH_FILE).read_text(encoding="utf-8"))
    audit = json.loads((folder / "audit.json").read_text(encoding="utf-8"))
    assert stored["lengths"] == audit["length_calibration"]["lengths"]
    assert "## Length calibration" in (folder / "audit.md").read_text(encoding="utf-8")
    lengths = np.array([[tokens for tokens, _ in audit["points"][side]] for side in ("chosen", "rejected")])
    scores = [np.array([score for _, score in audit["points"][side]]) for side in ("chosen", "rejected")]
    assert stored["before"]["spearman"] == length_results(*scores, lengths.T)["spearman"]

    plain = first_answers(run(world, tmp_path / "plain"))
    calibrated = first_answers(run(world, tmp_path / "calibrated", length_calibration=True))
    correction = read_length_file(folder).correction(torch.tensor([row["length"] for row in plain])).tolist()
    assert len({round(value, 4) for value in correction}) > 1
    for before, after, subtracted in zip(plain, calibrated, correction, strict=True):
        # Both runs sampled the same answers: nothing has been learnt yet.
        assert before["response"] == after["response"]
        assert after["raw_score"] == pytest.approx(before["raw_score"] - subtracted, abs=1e-4)
    assert "length_calibration" not in load_run(tmp_path / "plain")
    assert len(load_run(tmp_path / "calibrated")["length_calibration"]) == 1


def test_a_run_is_not_resumed_with_another_calibration(world, tmp_path):
    folder = tmp_path / "reward"
    reward = random_adapter(world["base_model_name"], folder, "reward", seed=1)
    fit = {"lengths": [1.0, 10.0], "predicted": [0.0, 1.0], "mean": 0.5} | parent_entry(folder)
    write_json(folder / LENGTH_FILE, fit)
    changed = {"reward_model_lora_path": reward, "length_calibration": True, "save_freq": 1, "reward_gate": "warn"}
    out = run(world, tmp_path / "out", **changed, steps=16)
    (out / "adapter_model.safetensors").unlink()
    (out / "run.json").unlink()
    write_json(folder / LENGTH_FILE, fit | {"predicted": [0.0, 2.0]})
    with pytest.raises(ValueError, match="different: the length calibration"):
        run(world, out, **changed, steps=16, resume_from_checkpoint=True)


@pytest.mark.parametrize(
    ("content", "words_of_it"),
    [
        (None, "has no length_calibration.json: make it with reward_modeling.py --audit_only True"),
        ({"impossible": "all have 7 tokens"}, "is not possible with .*: all have 7 tokens"),
        ({"adapter": "0" * 16}, "is of another state of the adapter"),
        ({"lengths": [3.0, 2.0], "predicted": [0.0, 0.0], "mean": 0.0}, "no rising lengths"),
        ({"lengths": [2.0, 3.0], "predicted": [0.0], "mean": 0.0}, "no rising lengths"),
        ({"lengths": [2.0, "3"], "predicted": [0.0, 0.0], "mean": 0.0}, "'lengths 1' cannot be '3'"),
        ({"lengths": [2.0, 3.0], "predicted": [0.0, 0.0]}, "has no field 'mean'"),
    ],
)
def test_what_cannot_be_subtracted_is_refused_before_a_model_loads(world, tmp_path, content, words_of_it):
    folder = tmp_path / "reward"
    reward = random_adapter(world["base_model_name"], folder, "reward", seed=1)
    if content is not None:
        write_json(folder / LENGTH_FILE, parent_entry(folder) | content)
    with pytest.raises((ValueError, FileNotFoundError), match=words_of_it):
        run(world, tmp_path / "out", reward_model_lora_path=reward, length_calibration=True)


def test_without_a_reward_model_there_is_nothing_to_calibrate(world, capsys):
    flags = {name: value for name, value in world.items() if name != "reward_model_lora_path"}
    with pytest.raises(SystemExit):
        rl_training.parse_args([*words(flags | {"length_calibration": True}), "--reward_functions", "repetition"])
    assert "--length_calibration True mends the score of a reward model" in capsys.readouterr().err
