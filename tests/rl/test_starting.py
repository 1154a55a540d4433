"""Defaults that depend on the run: what is chosen, what it changes, what a resumed run keeps; flat scores."""

import hashlib
import json
import shutil
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from adapters import random_adapter
from safetensors.torch import load_file, save_file
from stages import words
from test_rl_training import PROMPTS, TUTORIAL, stored_rollout, updated, world  # noqa: F401 (a fixture)

import rl_training
from rlhf.artefacts.run_json import load_run
from rlhf.rl import starting, update
from rlhf.run.log import read_metrics

# The same run with everything that the defaults would choose; the tiny base is 32 wide.
SMALL = {"steps": 16, "batch_size": 8, "output_max_length": 4, "ppo_epochs": 1, "save_freq": 1, "bf16": False}


def arguments(world, **flags):  # noqa: F811
    return rl_training.parse_args(words(SMALL | world | flags))


def settled(world, **flags):  # noqa: F811
    args = arguments(world, **flags)
    said = starting.settle(args)
    return args, said


@pytest.fixture(autouse=True, scope="module")
def few_answers():
    """Fewer answers for statistics and gate: a tiny model's cost as much time as a real one's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rlhf.rl.evaluation.STATISTICS_SAMPLES", 16)
        patch.setattr("rlhf.rl.gate.QUICK_PROMPTS", 4)
        yield


# ---- what is chosen ----
def test_the_score_is_standardized_unless_the_tutorials_command_asks(world):  # noqa: F811
    args, said = settled(world)
    assert (args.reward_transform, args.init_kl_coef) == ("standardize", 0.2)
    assert said[0] == "--reward_transform standardize: a sigmoid of a good reward model hardly varies"

    tutorial = rl_training.parse_args([*TUTORIAL.split(), "--base_model_name", world["base_model_name"]])
    said = starting.settle(tutorial)
    assert (tutorial.reward_transform, tutorial.init_kl_coef, tutorial.learning_rate) == ("sigmoid", 0.5, 1e-5)
    assert "as in the tutorial's command" in said[0]
    # 16 rows an optimizer step, as with a mini-batch of 1.
    assert tutorial.mini_batch_size * tutorial.gradient_accumulation_steps == 16


def test_what_the_command_gives_is_not_touched(world):  # noqa: F811
    flags = {"reward_transform": "raw", "init_kl_coef": 0.0, "learning_rate": 1e-3, "mini_batch_size": 2}
    args, said = settled(world, **flags)
    assert {name: getattr(args, name) for name in flags} == flags
    assert args.gradient_accumulation_steps == 4 and said == []


def test_the_learning_rate_is_the_tutorials_at_7b_and_falls_with_the_width(world, tmp_path):  # noqa: F811
    config = json.loads((Path(world["base_model_name"]) / "config.json").read_text(encoding="utf-8"))
    args, _ = settled(world)
    assert args.learning_rate == pytest.approx(1.41e-5 * 4096 / config["hidden_size"], rel=0.01)
    (tmp_path / "config.json").write_text(json.dumps(config | {"hidden_size": 4096, "head_dim": 128}))
    assert settled(world | {"base_model_name": tmp_path}, mini_batch_size=1)[0].learning_rate == 1.41e-5


def test_the_mini_batch_is_as_large_as_memory_takes_within_an_optimizer_step(world, monkeypatch):  # noqa: F811
    assert settled(world)[0].mini_batch_size == 4
    assert settled(world, mini_batch_size=0, gradient_accumulation_steps=16)[0].mini_batch_size == 8
    monkeypatch.setattr("rlhf.cost.fitting.memory_here", lambda args: 1.0)
    args, said = settled(world)
    assert (args.mini_batch_size, args.gradient_accumulation_steps) == (1, 4)
    assert said[-1].startswith("--mini_batch_size 1: ")


@pytest.mark.parametrize(("rows", "passes"), [(8, 16), (8, 6)])
def test_the_update_is_the_same_whatever_mini_batch_is_chosen(world, rows, passes):  # noqa: F811
    """Windows of 6 or 16 rows over batches of 8 span epochs; every divisor takes the same optimizer steps."""
    rollout = stored_rollout(None, rows=rows)
    chosen = [size for size in (1, 2, 4, 8) if rows % size == 0 and passes % size == 0]
    found = []
    for size in chosen:
        flags = {"mini_batch_size": size, "gradient_accumulation_steps": passes // size, "ppo_epochs": 3}
        before, after, metrics = updated(world, rollout, **flags)
        found.append((after, metrics))
    assert len(chosen) > 1
    expected, numbers = found[0]
    assert any((before[name] - p).abs().max() > 1e-3 for name, p in expected.items())
    for after, metrics in found[1:]:
        for name, p in after.items():
            torch.testing.assert_close(p, expected[name], atol=1e-5, rtol=0)
        for name in ("loss/policy", "loss/value", "grad_norm", "approxkl"):
            assert metrics[name] == pytest.approx(numbers[name], abs=1e-5)


@pytest.mark.parametrize("passes", [4, 3])
def test_tokens_bound_a_backward_pass_and_change_no_optimizer_step(world, passes, monkeypatch):  # noqa: F811
    """Windows of 8 or 6 rows over batches of 8; of 6 they span epochs."""
    rollout = stored_rollout(None, rows=8)
    flags = {"mini_batch_size": 2, "gradient_accumulation_steps": passes, "ppo_epochs": 3}
    _, expected, numbers = updated(world, rollout, **flags)
    lengths = rollout.attention_mask.sum(1)
    seen = []
    backward = update.Learner.backward

    def watched(self, part):
        seen.append((len(part.mask), int(part.attention_mask.sum(1).max())))
        return backward(self, part)

    monkeypatch.setattr(update.Learner, "backward", watched)
    for limit in (1, 2 * int(lengths.max()), 10_000):
        seen.clear()
        _, after, metrics = updated(world, rollout, tokens_per_backward=limit, **flags)
        for name, p in after.items():
            torch.testing.assert_close(p, expected[name], atol=1e-5, rtol=0)
        for name in ("loss/policy", "loss/value", "grad_norm", "approxkl"):
            assert metrics[name] == pytest.approx(numbers[name], abs=1e-5)
        assert sum(rows for rows, _ in seen) == 24
        assert all(rows == 1 or rows * longest <= limit for rows, longest in seen)
    # Without a bound that counts, a window (or what of it an epoch holds) is one pass.
    assert len(seen) == (3 if passes == 4 else 6)


def test_rows_are_cut_into_the_fewest_passes_that_hold_so_many_tokens():
    lengths = torch.randint(1, 50, (40,), generator=torch.Generator().manual_seed(0))
    rows = torch.randperm(40, generator=torch.Generator().manual_seed(1))[:30]
    for limit in (1, 60, 200, 5000):
        pieces = update.by_tokens(rows, lengths, limit)
        assert sorted(torch.cat(pieces).tolist()) == sorted(rows.tolist())
        padded = [len(piece) * int(lengths[piece].max()) for piece in pieces]
        assert all(size <= limit or len(piece) == 1 for size, piece in zip(padded, pieces, strict=True))
        # No row of the next pass would have found room.
        for piece, following in pairwise(pieces):
            assert (len(piece) + 1) * int(lengths[following].min()) > limit


# ---- resuming ----
@pytest.fixture(scope="module")
def finished(world, tmp_path_factory):  # noqa: F811
    out = tmp_path_factory.mktemp("finished") / "out"
    rl_training.main(arguments(world, output_dir=out))
    return out


def digest(folder: Path) -> str:
    return hashlib.sha256((folder / "adapter_model.safetensors").read_bytes()).hexdigest()


def cut_back(finished: Path, out: Path) -> None:
    """A copy of a run that was stopped after its first of two steps."""
    shutil.copytree(finished, out)
    for file in out.iterdir():
        if file.is_file() and file.name != "metrics.jsonl":
            file.unlink()
    shutil.rmtree(out / "step_2")


def test_what_was_chosen_is_in_run_json_and_said(world, finished, tmp_path, capsys):  # noqa: F811
    stored = load_run(finished)["arguments"]
    assert stored["reward_transform"] == "standardize"
    assert (stored["mini_batch_size"], stored["gradient_accumulation_steps"]) == (4, 1)
    rl_training.main(arguments(world, output_dir=finished, resume_from_checkpoint=True))
    assert "is finished" in capsys.readouterr().out


def test_a_resumed_run_keeps_what_was_chosen_on_another_machine(world, finished, tmp_path, monkeypatch, capsys):  # noqa: F811
    out = tmp_path / "out"
    cut_back(finished, out)
    monkeypatch.setattr("rlhf.cost.fitting.memory_here", lambda args: 1.0)
    rl_training.main(arguments(world, output_dir=out, resume_from_checkpoint=True))
    assert digest(out) == digest(finished)
    assert "--mini_batch_size 4: as the run began" in capsys.readouterr().out


def test_a_run_of_the_former_defaults_goes_on_exactly(world, tmp_path):  # noqa: F811
    former = {"reward_transform": "sigmoid", "mini_batch_size": 1, "init_kl_coef": 0.5, "learning_rate": 1.41e-5}
    whole, out = tmp_path / "whole", tmp_path / "out"
    rl_training.main(arguments(world, output_dir=whole, check=False, **former))
    cut_back(whole, out)
    rl_training.main(arguments(world, output_dir=out, check=False, resume_from_checkpoint=True))
    assert digest(out) == digest(whole)
    assert [row["score/mean"] for row in read_metrics(out)] == [row["score/mean"] for row in read_metrics(whole)]


def test_another_optimizer_step_than_the_runs_is_refused_by_name(world, finished, tmp_path):  # noqa: F811
    out = tmp_path / "out"
    cut_back(finished, out)
    flags = {"gradient_accumulation_steps": 2, "output_dir": out, "resume_from_checkpoint": True}
    with pytest.raises(ValueError, match=r"--mini_batch_size \(was 4, is 1\)"):
        rl_training.main(arguments(world, **flags))


def test_a_run_in_the_former_default_directory_is_not_passed_over(world, finished, tmp_path, monkeypatch):  # noqa: F811
    shutil.copytree(finished, tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    args = arguments(world, resume_from_checkpoint=True)
    assert args.output_dir == "runs/ppo"
    with pytest.raises(ValueError, match="give --output_dir runs/ to go on with it"):
        rl_training.main(args)


# ---- scores that hardly vary ----
@pytest.fixture
def flat(world, tmp_path):  # noqa: F811
    """The world with a reward model whose scores vary by thousandths."""
    reward = random_adapter(world["base_model_name"], tmp_path / "flat", "reward", seed=1)
    file = Path(reward) / "adapter_model.safetensors"
    weights = load_file(file)
    heads = [name for name in weights if name.endswith("score.weight")]
    assert heads
    save_file(weights | {name: weights[name] * 1e-3 for name in heads}, file, {"format": "pt"})
    return world | {"reward_model_lora_path": reward, "output_dir": tmp_path / "out", "steps": 8}


def test_a_saturated_sigmoid_is_refused_with_its_numbers_and_the_mend(flat):
    with pytest.raises(ValueError, match=r"hardly vary: mean 0\.\d+, standard deviation 0\.00\d over 16 answers") as e:
        rl_training.main(arguments(flat, reward_transform="sigmoid", init_kl_coef=0.0))
    assert "a sigmoid needs 0.05. Give --reward_transform standardize" in str(e.value)


def test_scores_that_drown_in_the_kl_penalty_are_refused_and_a_lower_one_is_not(flat):
    with pytest.raises(ValueError, match=r"against --init_kl_coef 0.5 it needs 0.05"):
        rl_training.main(arguments(flat, reward_transform="raw", init_kl_coef=0.5))
    rl_training.main(arguments(flat, reward_transform="raw", init_kl_coef=1e-6, overwrite_output_dir=True))
    assert len(read_metrics(flat["output_dir"])) == 1


def test_a_standardized_score_varies_however_flat_the_reward_model_is(flat):
    rl_training.main(arguments(flat))
    assert read_metrics(flat["output_dir"])[0]["score/std"] > 0.1
