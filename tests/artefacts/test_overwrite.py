"""--overwrite_output_dir: nothing is removed before every input has been read, and no input ever is."""

import json
import shutil
from pathlib import Path

import pytest
from adapters import random_adapter
from commands import run_here
from stages import words, write_answers, write_pairs


@pytest.fixture
def finished(tiny_base, tmp_path):
    """Directory of a run: an SFT adapter and what a run leaves beside it."""
    folder = tmp_path / "run"
    random_adapter(tiny_base, folder)
    (folder / "metrics.jsonl").write_text('{"step": 1}\n')
    (folder / "step_3").mkdir()
    shutil.copy(folder / "run.json", folder / "step_3")
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(folder / file, folder / "step_3")
    (folder / "notes.txt").write_text("mine")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def sft(base, out, **flags) -> tuple[int, str, str]:
    flags = {"model_name": base, "output_dir": out, "overwrite_output_dir": True, "max_steps": 1} | flags
    return run_here("sft_training", *words({"eval_size": 0, "save_steps": 0, "sample_max_new_tokens": 0} | flags))


@pytest.mark.parametrize("place", ["", "step_3"])
def test_an_adapter_that_would_be_cleared_is_refused_by_its_flag(tiny_base, finished, tmp_path, place):
    data = write_answers(tmp_path / "a.jsonl", 8)
    before = contents(finished)
    code, _, errors = sft(tiny_base, finished, dataset_name=data, previous_lora_weights=finished / place)
    assert code == 1
    assert f"--previous_lora_weights {finished / place}" in errors and "give another --output_dir" in errors
    assert contents(finished).items() >= before.items()


def test_ppo_refuses_to_clear_any_adapter_it_reads(tiny_base, finished, tmp_path):
    reward = random_adapter(tiny_base, tmp_path / "reward", "reward", 1)
    data = write_answers(tmp_path / "a.jsonl", 8)
    flags = {"base_model_name": tiny_base, "dataset_name": data, "overwrite_output_dir": True, "steps": 8}
    for name, out in (("sft_model_lora_path", finished), ("reward_model_lora_path", Path(reward))):
        before = contents(out)
        given = {"sft_model_lora_path": finished, "reward_model_lora_path": reward, "output_dir": out}
        code, _, errors = run_here("rl_training", *words(flags | given))
        assert code == 1 and f"--{name} {out} lies in --output_dir {out}" in errors
        assert contents(out).items() >= before.items()


@pytest.mark.parametrize("mistake", [{"dataset_name": "nowhere.jsonl"}, {"lora_target_models": "nothing"}])
def test_a_mistake_in_the_command_costs_the_finished_run_nothing(tiny_base, finished, tmp_path, mistake):
    before = contents(finished)
    flags = {"dataset_name": write_answers(tmp_path / "a.jsonl", 8)} | mistake
    assert sft(tiny_base, finished, **flags)[0] == 1
    assert contents(finished).items() >= before.items()


def test_what_a_run_left_is_cleared_and_other_files_stay(tiny_base, finished, tmp_path):
    code, _, errors = sft(tiny_base, finished, dataset_name=write_answers(tmp_path / "a.jsonl", 8))
    assert code == 0, errors
    assert not (finished / "step_3").exists()
    assert (finished / "notes.txt").read_text() == "mine"
    assert json.loads((finished / "run.json").read_text())["arguments"]["max_steps"] == 1


def test_malformed_rows_of_this_run_outlive_the_clearing(tiny_base, finished, tmp_path):
    data = Path(write_pairs(tmp_path / "p.jsonl", 20))
    data.write_text(data.read_text() + "{broken\n")
    (finished / "bad_rows.jsonl").write_text("old\n")
    flags = {
        "model_name": tiny_base, "dataset_name": data, "output_dir": finished, "overwrite_output_dir": True,
        "bad_rows": "skip", "max_steps": 1, "eval_size": 4, "audit_prompts": 4,
    }  # fmt: skip
    code, _, errors = run_here("reward_modeling", *words(flags))
    assert code == 0, errors
    assert "broken" in (finished / "bad_rows.jsonl").read_text()
