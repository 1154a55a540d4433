"""Limits of the shell, foreign files, other spellings, the last step: the same bytes, or one sentence."""

import os
import shutil
from pathlib import Path

import pytest
import torch
from forked import KILL, ROOT, TERM, ends_the_same, free_port, result
from safetensors.torch import save_file

from rlhf.artefacts.checkpoint import MANIFEST, newest_complete, numbered, read_manifest, why_incomplete

pytestmark = pytest.mark.slow
NAMES = ("sft", "reward", "ppo")

# Something is written, and the run has not ended: the second checkpoint is about to be.
STOPPED = {
    "sft": {"target": "transformers:Trainer._save_checkpoint", "when": "before", "call": 2},
    "reward": {"target": "transformers:Trainer._save_checkpoint", "when": "before", "call": 2},
    "ppo": {"target": "rlhf.rl.state:publish", "when": "before", "call": 2},
}


# ---- limits of the shell ----
@pytest.mark.parametrize("name", NAMES)
def test_a_limit_for_files_is_named_and_leaves_nothing_that_looks_finished(zygote, stages, whole, tmp_path, name):
    out = tmp_path / "out"
    # Less than the optimizer's state takes.
    limit = 9_000
    assert zygote.run(stages[name], out, file_bytes=limit) == 1, zygote.said()[-3000:]
    assert f"this shell's limit of {limit:,} bytes: raise it with ulimit -f unlimited" in zygote.complaint()
    assert not any((out / file).exists() for file in ("adapter_model.safetensors", "adapter_config.json", "run.json"))
    assert not any(map(why_incomplete, numbered(out, stages[name].prefix)))
    ends_the_same(zygote, stages, whole, name, out)


@pytest.mark.parametrize("name", NAMES)
def test_a_result_over_the_limit_for_files_leaves_none_of_its_parts(zygote, stages, tmp_path, name):
    out = tmp_path / "out"
    never = ("--save_freq", "1000", "--eval_freq", "0") if name == "ppo" else ("--save_steps", "0")
    assert zygote.run(stages[name], out, *never, file_bytes=100_000) == 1, zygote.said()[-3000:]
    assert "ulimit -f unlimited" in zygote.complaint()
    kept = {path.name for path in out.iterdir()}
    assert kept <= {".lock", "metrics.jsonl", "samples.jsonl", "chart.png"}


# MB beyond what the imports take: a file cannot be mapped, or a tensor not allocated.
@pytest.mark.parametrize("more", [2, 40])
def test_a_limit_for_memory_is_one_sentence_in_sft_too(zygote, stages, tmp_path, more):
    own = int(Path(f"/proc/{zygote.process.pid}/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    assert zygote.run(stages["sft"], tmp_path / "out", bytes=own + (more << 20)) == 1, zygote.said()[-3000:]
    assert "memory" in zygote.complaint()
    assert not (tmp_path / "out" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize(
    ("target", "words"),
    [("rlhf.rl.charts:pyplot", "a picture could not be drawn"), ("rlhf.page.report:page", "the report could not be")],
)
def test_a_chart_or_report_that_cannot_be_drawn_costs_no_policy(zygote, stages, whole, tmp_path, target, words):
    out = tmp_path / "out"
    assert zygote.run(stages["ppo"], out, target=target, when="full") == 0, zygote.said()[-3000:]
    assert f"{words}" in zygote.said() and "(OSError" in zygote.said()
    assert result(out) == whole["ppo"]


# ---- foreign files in a checkpoint ----
@pytest.mark.parametrize("name", NAMES)
def test_files_that_a_manifest_does_not_list_change_no_byte(zygote, stages, whole, tmp_path, name):
    out = tmp_path / "out"
    assert zygote.run(stages[name], out, signum=KILL, **STOPPED[name]) == 128 + KILL, zygote.said()[-3000:]
    newest = newest_complete(out, stages[name].prefix)
    listed = read_manifest(newest)["files"]

    # What transformers, accelerate, peft and this project would read, some of it valid and some rubbish.
    weights = {"base_model.model.score.weight": torch.ones(1, 32), "parameter.0": torch.ones(2)}
    for file in ("model.safetensors", "good.safetensors", "value_head.safetensors"):
        if file not in listed:
            save_file(weights, newest / file)
    for file in ("scaler.pt", "pytorch_model.bin", "adapter_model.bin", "rng_state_0.pth", "optimizer.bin", "notes"):
        (newest / file).write_bytes(b"rubbish")
    for file in ("config.json", "tokenizer.json", "special_tokens_map.json", "added_tokens.json", "audit.json"):
        (newest / file).write_text('{"model_type": "gpt2", "vocab_size": 1}')
    for file in ("default", "global_step2", "policy"):
        (newest / file).mkdir()
        (newest / file / "adapter_config.json").write_text("{}")
    assert newest_complete(out, stages[name].prefix) == newest
    ends_the_same(zygote, stages, whole, name, out)


# ---- other spellings ----
def copied(path: str, folder: Path) -> str:
    """The same contents in another place, as after a move."""
    target = folder / f"moved {Path(path).name}"
    if not target.exists():
        (shutil.copytree if Path(path).is_dir() else shutil.copy)(path, target)
    return str(target)


def linked(path: str, folder: Path) -> str:
    link = folder / f"link_{Path(path).name}"
    if not link.exists():
        link.symlink_to(path)
    return str(link)


SPELLINGS = {
    "from here": lambda path, folder: os.path.join(".", os.path.relpath(path, ROOT)),
    "roundabout": lambda path, folder: f"{Path(path).parent}/../{Path(path).parent.name}/./{Path(path).name}",
    "linked": linked,
    "moved": copied,
}


@pytest.mark.parametrize("name", NAMES)
def test_a_run_whose_paths_are_spelled_otherwise_is_finished_or_goes_on(zygote, stages, whole, tmp_path, name):
    stage = stages[name]
    out = tmp_path / "out"
    assert zygote.run(stage, out, signum=KILL, **STOPPED[name]) == 128 + KILL

    respelled = {}
    for way, spell in SPELLINGS.items():
        # Paths alone are values that exist.
        argv = [spell(word, tmp_path) if "/" in word and Path(word).exists() else word for word in stage.argv]
        assert argv != stage.argv
        respelled[way] = [*argv, "--output_dir", str(out), "--resume_from_checkpoint", "True"]

    # Stopped: every spelling goes on, here one for the rest of the run.
    assert zygote.run_script(stage.script, respelled["moved"], tmp_path / "log") == 0, zygote.said()[-3000:]
    assert "going on from" in zygote.said()
    assert result(out) == whole[name]

    # Finished: a model that loads would kill the run.
    load = {"signum": KILL, "target": "rlhf.models.loading:load_base", "when": "before"}
    for way, argv in respelled.items():
        assert zygote.run_script(stage.script, argv, tmp_path / "log", **load) == 0, (way, zygote.said()[-2000:])
        assert "is finished" in zygote.said(), way

    # And the output directory itself, by a link.
    (tmp_path / "other").symlink_to(out)
    argv = [*stage.argv, "--output_dir", str(tmp_path / "other"), "--resume_from_checkpoint", "True"]
    assert zygote.run_script(stage.script, argv, tmp_path / "log", **load) == 0, zygote.said()[-2000:]


@pytest.mark.parametrize("name", NAMES)
def test_a_finished_run_on_other_data_is_refused_by_that(zygote, stages, tmp_path, name):
    stage = stages[name]
    out = tmp_path / "out"
    assert zygote.run(stage, out) == 0
    # As many rows, the first of them another.
    flag = stage.argv.index("--dataset_name") + 1
    rows = Path(stage.argv[flag]).read_text("utf-8").splitlines()
    (tmp_path / "other.jsonl").write_text("\n".join([*rows[1:], rows[0].replace("喜欢", "不喜欢")]), "utf-8")
    code = zygote.run(stage, out, "--dataset_name", str(tmp_path / "other.jsonl"))
    assert code == 1, zygote.said()[-2000:]
    assert "holds a finished run of another command; different: the data" in zygote.complaint()


# ---- the last step ----
LAST = {
    "before the last evaluation": {"target": "rlhf.trainer.training:final_evaluation", "when": "before"},
    "before the result": {"target": "sft_training:finish", "when": "before"},
    "in the result": {"target": "rlhf.artefacts.output_dir:sync_directory", "when": "before"},
}


@pytest.fixture(scope="module")
def samples(zygote, stages, tmp_path_factory) -> bytes:
    """samples.jsonl of an SFT run that nothing happens to."""
    out = tmp_path_factory.mktemp("samples") / "out"
    assert zygote.run(stages["sft"], out, "--sample_max_new_tokens", "8") == 0, zygote.said()[-3000:]
    return (out / "samples.jsonl").read_bytes()


@pytest.mark.parametrize("point", LAST)
def test_a_run_resumed_at_its_last_step_shows_the_same_answers(zygote, stages, whole, samples, tmp_path, point):
    out = tmp_path / "out"
    flags = ("--sample_max_new_tokens", "8")
    assert zygote.run(stages["sft"], out, *flags, signum=KILL, **LAST[point]) == 128 + KILL, zygote.said()[-3000:]
    # And again where the newest checkpoint is damaged, so that the steps after the one before it are made again.
    if point == "before the result":
        (numbered(out, "checkpoint-")[-1] / MANIFEST).unlink()
    assert zygote.run(stages["sft"], out, *flags) == 0, zygote.said()[-3000:]
    assert (out / "samples.jsonl").read_bytes() == samples
    assert result(out) == whole["sft"]


# ---- waiting for others ----
def test_a_process_that_waits_for_others_ends_at_a_signal(zygote, stages, tmp_path):
    # The other of two processes never comes.
    variables = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
    variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    job = {"environment": variables, "signum": TERM, "delay": 2.0, "seconds": 60}
    assert zygote.run(stages["sft"], tmp_path / "out", **job) == 128 + TERM, zygote.said()[-3000:]
    assert not (tmp_path / "out" / "adapter_model.safetensors").exists()
