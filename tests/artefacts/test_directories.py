"""Directories of runs: foreign files and links are left alone or named, manifests are believed only where they fit."""

import json
import warnings
from pathlib import Path

import pytest
import torch
from adapters import random_adapter
from commands import run_here
from safetensors.torch import load_file, save_file
from stages import words, write_answers

from rlhf.arguments import TrainerFlags
from rlhf.artefacts.adapters import save_adapter
from rlhf.artefacts.checkpoint import MANIFEST, newest_complete, rotate, why_incomplete, write_manifest
from rlhf.artefacts.output_dir import claim_output_dir, refuse_used, sweep
from rlhf.artefacts.resume import finished_run
from rlhf.models.loading import load_base
from rlhf.models.lora import add_lora
from rlhf.run import trackers
from rlhf.run.log import MetricsLog


def step(folder: Path, number: int, prefix: str = "step_", **about) -> Path:
    """A checkpoint of PPO that looks whole."""
    place = folder / f"{prefix}{number}"
    place.mkdir(parents=True)
    names = ["adapter_config.json", "adapter_model.safetensors", "run.json"]
    names += ["optimizer.safetensors", "state.json"] if prefix == "step_" else []
    names += ["trainer_state.json", "optimizer.pt", "scheduler.pt"] if prefix != "step_" else []
    for name in names:
        (place / name).write_text("{}")
    write_manifest(place, {"step": number} | about)
    return place


# ---- manifests ----
@pytest.mark.parametrize("content", ["[]", "3", "{}", '{"files": []}', '{"files": {"a": 1}, "step": "x"}', "[" * 9999])
def test_a_manifest_that_is_none_makes_a_checkpoint_incomplete(tmp_path, content):
    place = step(tmp_path, 3)
    (place / MANIFEST).write_text(content)
    assert why_incomplete(place)
    assert newest_complete(tmp_path) is None


def test_a_manifest_of_another_step_is_not_believed(tmp_path):
    assert why_incomplete(step(tmp_path, 3)) is None
    assert "is of step 99" in why_incomplete(step(tmp_path, 4, step=99))
    assert "is of step 'x'" in why_incomplete(step(tmp_path, 5, step="x"))


@pytest.mark.parametrize("prefix", ["step_", "checkpoint-"])
def test_what_a_run_cannot_go_on_without_has_to_be_listed(tmp_path, prefix):
    place = step(tmp_path, 3, prefix)
    assert why_incomplete(place) is None
    manifest = json.loads((place / MANIFEST).read_text())
    for name in manifest["files"]:
        without = {key: value for key, value in manifest["files"].items() if key != name}
        (place / MANIFEST).write_text(json.dumps(manifest | {"files": without}))
        assert why_incomplete(place) == f"{MANIFEST} does not list {name}"


def test_a_pipe_in_place_of_a_manifest_is_not_read(tmp_path):
    import os

    place = step(tmp_path, 3)
    (place / MANIFEST).unlink()
    os.mkfifo(place / MANIFEST)
    assert "missing or unreadable" in why_incomplete(place)


def test_rotation_unlinks_a_link_and_leaves_what_is_no_checkpoint(tmp_path):
    elsewhere = step(tmp_path / "elsewhere", 1)
    run = tmp_path / "run"
    step(run, 2)
    step(run, 3)
    (run / "step_1").symlink_to(elsewhere)
    (run / "step_0").mkdir()
    (run / "step_0" / "mine.txt").write_text("x")
    rotate(run, "step_", 1)
    assert sorted(path.name for path in run.iterdir()) == ["step_0", "step_3"]
    assert (elsewhere / MANIFEST).is_file()


# ---- whose files ----
def test_files_of_the_user_that_look_like_temporaries_are_left_alone(tmp_path):
    mine = [".best.old", ".best.2024", ".adapter.backup", ".run.json.bak", ".step_3.copy"]
    for name in mine:
        (tmp_path / name).write_text("mine")
    (tmp_path / ".step_3.rlhf-abc").mkdir()
    sweep(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(mine)


@pytest.mark.parametrize("name", ["best", "step_1", "checkpoint-9"])
def test_a_folder_that_no_run_has_written_is_refused_by_name(tmp_path, name):
    (tmp_path / name).mkdir()
    (tmp_path / name / "photo.jpg").write_text("x")
    with pytest.raises(FileExistsError, match=f"holds {name}, which no run of this project has written"):
        claim_output_dir(tmp_path, resume=False, overwrite=True)
    assert (tmp_path / name / "photo.jpg").is_file()


def test_a_run_never_writes_through_a_link(tiny_base, tmp_path):
    out, outside = tmp_path / "out", tmp_path / "outside"
    out.mkdir()
    outside.mkdir()
    names = ["metrics.jsonl", "samples.jsonl", "tokenizer_config.json", "adapter_config.json", "run.json"]
    for name in names:
        (outside / name).write_text("mine")
        (out / name).symlink_to(outside / name)
    flags = {
        "model_name": tiny_base, "dataset_name": write_answers(tmp_path / "a.jsonl", 8), "output_dir": out,
        "overwrite_output_dir": True, "max_steps": 1, "eval_size": 0,
    }  # fmt: skip
    code, _, errors = run_here("sft_training", *words(flags))
    assert code == 0, errors
    assert all((outside / name).read_text() == "mine" for name in names)
    (out / ".lock").unlink()
    (out / ".lock").symlink_to(outside / "run.json")
    code, _, _ = run_here(
        "sft_training", *words(flags | {"overwrite_output_dir": False, "resume_from_checkpoint": True})
    )
    assert (outside / "run.json").read_text() == "mine"


def test_a_merge_fills_the_target_of_a_link_and_refuses_what_it_cannot_write(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert refuse_used(str(tmp_path / "link")) == tmp_path / "real"
    (tmp_path / "file").write_text("x")
    with pytest.raises(OSError, match="cannot be written"):
        refuse_used(str(tmp_path / "file" / "out"))


# ---- resuming ----
def flags_of(folder, **changed):
    flags = TrainerFlags(**changed)
    flags.output_dir = str(folder)
    flags.resume_from_checkpoint = "True"
    return flags


def test_a_run_without_its_adapter_is_not_finished_and_another_stage_is_named(tiny_base, tmp_path):
    adapter = Path(random_adapter(tiny_base, tmp_path / "sft"))
    assert finished_run(flags_of(adapter), "sft") is not None
    with pytest.raises(ValueError, match="holds a run of stage sft"):
        finished_run(flags_of(adapter), "ppo")
    (adapter / "adapter_model.safetensors").unlink()
    assert finished_run(flags_of(adapter), "sft") is None

    unfinished = tmp_path / "unfinished"
    (unfinished / "checkpoint-3").mkdir(parents=True)
    (unfinished / "checkpoint-3" / "run.json").write_text('{"stage": "sft"}')
    with pytest.raises(ValueError, match="holds a run of stage sft"):
        finished_run(flags_of(unfinished), "ppo")


def test_fewer_steps_than_are_done_are_refused_in_a_sentence(tiny_base, tmp_path):
    data = write_answers(tmp_path / "a.jsonl", 30)
    flags = {
        "model_name": tiny_base, "dataset_name": data, "output_dir": tmp_path / "out", "max_steps": 4,
        "lr_scheduler_type": "constant", "save_steps": 2, "eval_size": 0, "sample_max_new_tokens": 0,
        "resume_from_checkpoint": True,
    }  # fmt: skip
    assert run_here("sft_training", *words(flags))[0] == 0
    code, _, errors = run_here("sft_training", *words(flags | {"max_steps": 3}))
    assert code == 1 and "--max_steps 3 is less than the 4 steps that are done" in errors
    code, _, errors = run_here("sft_training", *words(flags | {"max_steps": 6}))
    assert code == 0, errors


# ---- numbers ----
@pytest.mark.parametrize(
    ("flag", "value", "complaint"),
    [
        ("learning_rate", "inf", "no finite number|at most 1"),
        ("learning_rate", "1e30", "out of range|at most 1"),
        ("learning_rate", "2", "at most 1"),
        ("lora_rank", "1000000000000000000", "1e[+]18 is out of range"),
        ("sample_max_new_tokens", "1000000000000000000", "out of range"),
        ("lora_alpha", "1e30", "out of range"),
        ("per_device_train_batch_size", "100000000000", "out of range"),
        ("seed", "-1", "must be from 0 to"),
        ("seed", "4294967296", "must be from 0 to"),
        ("lora_rank", "33", "more than the base's width of 32"),
    ],
)
def test_absurd_numbers_are_refused_by_the_name_of_their_flag(tiny_base, tmp_path, flag, value, complaint):
    import re

    flags = {"model_name": tiny_base, "dataset_name": write_answers(tmp_path / "a.jsonl", 8), flag: value}
    code, _, errors = run_here("sft_training", *words(flags | {"output_dir": tmp_path / "out", "eval_size": 0}))
    assert code in (1, 2) and re.search(complaint, errors), errors


def test_no_adapter_that_is_no_number_is_published_or_put_on(tiny_base, tmp_path):
    adapter = Path(random_adapter(tiny_base, tmp_path / "sft"))
    model, _ = add_lora(load_base(tiny_base, torch.float32), adapter, "default", trainable=True)
    next(p for name, p in model.named_parameters() if "lora_B" in name).data[0, 0] = torch.inf
    with pytest.raises(FloatingPointError, match=r"holds NaN or infinity .* it is not saved"):
        save_adapter(model, tmp_path / "out")
    assert not (tmp_path / "out" / "adapter_model.safetensors").exists()

    weights = load_file(adapter / "adapter_model.safetensors")
    next(iter(weights.values()))[0, 0] = torch.nan
    save_file(weights, adapter / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="holds NaN or infinity"):
        add_lora(load_base(tiny_base, torch.float32), adapter, "judge", trainable=False)


# ---- trackers ----
def test_a_tracker_that_fails_is_a_warning_and_the_record_goes_on(tmp_path, monkeypatch):
    def broken(*given):
        raise RuntimeError("service\nis gone")

    monkeypatch.setitem(trackers.OPENERS, "wandb", broken)
    with pytest.warns(UserWarning, match="wandb could not be started .*service is gone.* goes on with metrics.jsonl"):
        MetricsLog(tmp_path, "wandb").write({"step": 1})
    monkeypatch.setitem(trackers.OPENERS, "wandb", lambda *given: (broken, broken, broken))
    log = MetricsLog(tmp_path, "wandb", done=1)
    with pytest.warns(UserWarning, match="wandb failed"):
        log.write({"step": 2})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # Said once.
        log.write({"step": 3})
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [1, 2, 3]
