"""The best evaluation's adapter is the final one, and training ends where none is better; after kills, too."""

import shutil
from pathlib import Path

import pytest
from forked import KILL, TERM, Stage, result
from safetensors.torch import load_file, save_file
from stages import words, write_answers, write_pairs

import reward_modeling
import sft_training
from rlhf.artefacts.checkpoint import write_manifest
from rlhf.artefacts.run_json import load_run
from rlhf.run.log import read_metrics
from rlhf.trainer.best import BEST_FILE

SCRIPTS = {"sft": sft_training, "reward": reward_modeling}
# So large a learning rate that the loss soon goes up and down.
FLAGS = {
    "max_steps": 8, "learning_rate": 0.5, "lr_scheduler_type": "constant", "per_device_train_batch_size": 8,
    "eval_steps": 1, "save_steps": 1, "eval_size": 8, "lora_dropout": 0.1, "resume_from_checkpoint": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def flags(tiny_base, tmp_path_factory) -> dict[str, dict]:
    folder = tmp_path_factory.mktemp("best")
    own = {
        "sft": {"dataset_name": write_answers(folder / "answers.jsonl", 48), "sample_max_new_tokens": 0},
        "reward": {"dataset_name": write_pairs(folder / "pairs.jsonl", 48), "audit": False},
    }
    return {stage: FLAGS | more | {"model_name": tiny_base} for stage, more in own.items()}


def run(flags: dict, stage: str, out: Path, **changed) -> Path:
    script = SCRIPTS[stage]
    script.main(script.parse_args(words(flags[stage] | {"output_dir": out} | changed)))
    return out


@pytest.fixture(scope="module")
def whole(flags, tmp_path_factory) -> dict[str, Path]:
    """The directory of an uninterrupted run of either stage."""
    folder = tmp_path_factory.mktemp("whole")
    return {stage: run(flags, stage, folder / stage) for stage in SCRIPTS}


def losses(folder: Path) -> dict[int, float]:
    """Step -> evaluation loss, of the evaluations after the first step."""
    records = [record for record in read_metrics(folder) if "eval_loss" in record and record["step"]]
    return {record["step"]: record["eval_loss"] for record in records}


def adapter(folder: Path) -> bytes:
    return (folder / "adapter_model.safetensors").read_bytes()


def cut_at(folder: Path, step: int, out: Path) -> Path:
    """A run as it is when it was killed after the checkpoint of `step`."""
    out.mkdir()
    shutil.copytree(folder / f"checkpoint-{step}", out / f"checkpoint-{step}")
    shutil.copy(folder / "metrics.jsonl", out)
    return out


@pytest.mark.parametrize("stage", SCRIPTS)
def test_the_final_adapter_is_that_of_the_lowest_loss_and_run_json_says_of_which_step(flags, whole, stage, tmp_path):
    found = losses(whole[stage])
    best = min(found, key=found.get)
    assert best < 8 == max(found), found
    assert adapter(whole[stage]) == adapter(whole[stage] / f"checkpoint-{best}")
    # The score head of a reward model is among the weights.
    assert adapter(whole[stage]) != adapter(whole[stage] / "checkpoint-8")
    metrics = load_run(whole[stage])["metrics"]
    assert metrics["best_step"] == best
    assert metrics["eval_loss_after" if stage == "sft" else "eval_loss"] == found[best]

    last = run(flags, stage, tmp_path / "last", load_best=False)
    assert adapter(last) == adapter(whole[stage] / "checkpoint-8")
    assert "best_step" not in load_run(last)["metrics"]
    assert not (last / "checkpoint-8" / BEST_FILE).exists()


@pytest.mark.parametrize("stage", SCRIPTS)
def test_a_resumed_run_chooses_the_same_adapter_wherever_it_was_cut(flags, whole, stage, tmp_path):
    found = losses(whole[stage])
    best = min(found, key=found.get)
    for step in (best, 8):
        out = run(flags, stage, cut_at(whole[stage], step, tmp_path / str(step)))
        assert result(out) == result(whole[stage]), step
        assert load_run(out)["metrics"] == load_run(whole[stage])["metrics"]


def test_without_a_better_evaluation_training_ends_and_a_resumed_run_trains_no_further(flags, whole, tmp_path, capsys):
    found = losses(whole["sft"])
    patience = {"early_stopping_patience": 1}
    lowest = min(step for step in range(1, 8) if found[step + 1] >= found[step])
    out = run(flags, "sft", tmp_path / "out", **patience)
    assert list(losses(out)) == list(range(1, lowest + 2))
    assert max(losses(out)) < 8
    assert adapter(out) == adapter(whole["sft"] / f"checkpoint-{lowest}")
    assert f"no better evaluation since step {lowest}: training ends" in capsys.readouterr().out
    for step in (lowest, lowest + 1):
        again = run(flags, "sft", cut_at(out, step, tmp_path / str(step)), **patience)
        assert result(again) == result(out)


# One batch an evaluation, after which a signal is asked for.
PREDICTION = "sft_training:SupervisedTrainer.prediction_step"
BLOWS = {
    "signal, in the evaluation that ends it": {"target": PREDICTION, "when": "before", "signum": TERM},
    "kill, before the best is saved": {"target": "rlhf.trainer.best:save_file", "when": "before", "signum": KILL},
    "kill, after the best is saved": {"target": "rlhf.trainer.best:save_file", "when": "after", "signum": KILL},
}


@pytest.fixture(scope="module")
def stopped(zygote, flags, tmp_path_factory) -> tuple[Stage, Path]:
    """An early stopped run: its command, and its directory when nothing happens to it."""
    stage = Stage("sft_training", flags["sft"] | {"early_stopping_patience": 1}, "checkpoint-")
    out = tmp_path_factory.mktemp("stopped") / "out"
    assert zygote.run(stage, out) == 0, zygote.said()[-3000:]
    return stage, out


@pytest.mark.slow
@pytest.mark.parametrize("name", BLOWS)
def test_struck_and_given_again_an_early_stopped_run_ends_with_the_same_bytes(zygote, stopped, tmp_path, name):
    stage, uninterrupted = stopped
    ended = max(losses(uninterrupted))
    # The evaluation before the first step is a call, too.
    call = ended + 1 if "evaluation" in name else ended - 1
    blow = BLOWS[name]
    out = tmp_path / "out"
    assert zygote.run(stage, out, call=call, **blow) == 128 + blow["signum"], zygote.said()[-3000:]
    assert zygote.run(stage, out) == 0, zygote.said()[-3000:]
    assert result(out) == result(uninterrupted)
    assert load_run(out)["metrics"] == load_run(uninterrupted)["metrics"]


def test_weights_of_another_adapter_are_refused_by_name(flags, whole, tmp_path):
    out = cut_at(whole["sft"], 8, tmp_path / "out")
    file = out / "checkpoint-8" / BEST_FILE
    weights = {name: tensor[:1] for name, tensor in load_file(file).items()}
    save_file(weights, file, {"step": "1", "loss": "0.5", "waited": "0"})
    write_manifest(out / "checkpoint-8", {"step": 8, "processes": 1})
    with pytest.raises(ValueError, match=r"best\.safetensors cannot be used \(it holds other weights"):
        run(flags, "sft", out)


def test_patience_without_a_best_adapter_is_refused(capsys):
    for wrong in ("--early_stopping_patience 2 --load_best False", "--early_stopping_patience -1"):
        with pytest.raises(SystemExit):
            sft_training.parse_args(wrong.split())
        assert "--early_stopping_patience" in capsys.readouterr().err
