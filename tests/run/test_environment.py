"""Variables of launchers: believed together, refused alone, and never changing numbers unseen."""

import os

import pytest
from commands import run_here
from stages import write_answers

from rlhf.run.environment import LEFT_ASIDE, MPI_VARIABLES, Launch, leave_aside, read_launch
from rlhf.run.launch import _without_values

PEERS = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    """No variable of a launcher, whatever runs the tests."""
    for name in (*PEERS, *LEFT_ASIDE, *(name for pair in MPI_VARIABLES for name in pair)):
        monkeypatch.delenv(name, raising=False)


def test_a_launcher_is_believed_and_nothing_means_one_process(monkeypatch):
    assert read_launch() == Launch()
    for name, value in PEERS.items():
        monkeypatch.setenv(name, value)
    assert read_launch() == Launch(1, 2, 1, launched=True)
    # A launcher of several processes wins over --nproc.
    assert read_launch(nproc=4).launched


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"RANK": "8"}, "RANK=8 without WORLD_SIZE"),
        ({"RANK": "0"}, "RANK=0 without WORLD_SIZE"),
        ({"LOCAL_RANK": "0"}, "LOCAL_RANK=0 without WORLD_SIZE"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2 without RANK"),
        ({"WORLD_SIZE": ""}, "WORLD_SIZE='', which is no whole number"),
        ({"RANK": "x"}, "RANK='x', which is no whole number"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK=2, WORLD_SIZE=2: ranks count from 0"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "ranks count from 0"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "WORLD_SIZE=2 without LOCAL_RANK"),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "without MASTER_ADDR"),
        ({"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "1"}, "not by an MPI launcher"),
    ],
)
def test_what_cannot_be_right_is_refused_in_one_sentence(monkeypatch, variables, words):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=words):
        read_launch()


def test_a_single_process_of_a_launcher_gives_way_to_nproc(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert read_launch().launched and not read_launch(nproc=2).launched
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("RANK", "0")
    assert read_launch().launched and not read_launch(nproc=2).launched


def test_an_mpi_launcher_of_one_process_is_none(monkeypatch):
    monkeypatch.setenv("PMI_SIZE", "1")
    monkeypatch.setenv("PMI_RANK", "0")
    assert read_launch() == Launch()
    # accelerate would have taken it for a launcher.
    assert "PMI_RANK" not in os.environ


def test_settings_that_would_change_numbers_are_left_aside_and_said(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "false")
    assert leave_aside() == ["ACCELERATE_MIXED_PRECISION=fp16"]
    assert "ACCELERATE_USE_FSDP" not in os.environ


@pytest.mark.parametrize("script", ["sft_training", "rl_training", "merge_lora"])
def test_a_stage_that_would_keep_silent_says_so_and_fails(monkeypatch, tiny_base, tmp_path, script):
    monkeypatch.setenv("RANK", "8")
    base = "--base_model_name" if script != "sft_training" else "--model_name"
    more = {
        "sft_training": ["--dataset_name", write_answers(tmp_path / "a.jsonl")],
        "rl_training": ["--reward_model_lora_path", "r"],
        "merge_lora": ["--lora_path", "s"],
    }[script]
    code, _, errors = run_here(script, base, tiny_base, "--output_dir", str(tmp_path / "out"), *more)
    assert code == 1
    assert errors.startswith(f"{script}.py: error: the environment has RANK=8 without WORLD_SIZE")
    assert not (tmp_path / "out").exists()


def test_the_command_that_goes_on_keeps_every_flag_but_those_that_say_how_to_start():
    words = ["a.py", "--overwrite_output_dir", "--steps", "100", "--resume_from_checkpoint", "x", "--seed", "3"]
    assert _without_values(words) == ["a.py", "--steps", "100", "--seed", "3"]
    words = ["a.py", "--overwrite-output-dir", "True", "--steps", "100", "--resume_from_checkpoint=x"]
    assert _without_values(words) == ["a.py", "--steps", "100"]
