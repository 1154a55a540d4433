"""PPO end to end on the tiny models: what moves, what must not, restart, refusals, a bandit to be solved."""

import dataclasses
import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from adapters import random_adapter
from safetensors.torch import load_file, save_file

import rl_training
from rlhf.artefacts.run_json import load_run
from rlhf.data.choose_format import text_format
from rlhf.data.encoding import load_tokenizer
from rlhf.models.generation import Rollout, Sampling
from rlhf.rl.roles import load_roles
from rlhf.rl.update import mini_batches, update
from rlhf.run.log import read_metrics

TUTORIAL = """--base_model_name baichuan-inc/baichuan-7B --merged_sft_model_path M
  --sft_model_lora_path S --reward_model_lora_path R --adafactor False --save_freq 10 --output_max_length 256
  --batch_size 8 --gradient_accumulation_steps 16 --batched_gen True --ppo_epochs 4 --seed 0 --learning_rate 1e-5
  --early_stopping True --output_dir O --log_with wandb"""
PROMPTS = [f"{who}{verb}什么？" for who in ("我", "小猫", "老师", "医生") for verb in ("喜欢", "想要", "今天看见了")]


@pytest.fixture(scope="module")
def world(tiny_base, tmp_path_factory):
    """Paths of an SFT adapter, a reward adapter and a prompt file that belong to the tiny base."""
    folder = tmp_path_factory.mktemp("world")
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": p}) + "\n" for p in PROMPTS), encoding="utf-8")
    return {
        "base_model_name": tiny_base,
        "sft_model_lora_path": random_adapter(tiny_base, folder / "sft"),
        "reward_model_lora_path": random_adapter(tiny_base, folder / "reward", "reward", seed=1),
        "dataset_name": str(prompts),
    }


def arguments(world, output_dir, **changed):
    flags = world | {
        "output_dir": str(output_dir), "steps": 24, "batch_size": 8, "mini_batch_size": 4, "ppo_epochs": 2,
        "gradient_accumulation_steps": 2, "output_max_length": 8, "learning_rate": 1e-3, "reward_transform": "raw",
        "init_kl_coef": 0.5,
    } | changed  # fmt: skip
    return rl_training.parse_args([word for name, value in flags.items() for word in (f"--{name}", str(value))])


def run(world, output_dir, **changed):
    rl_training.main(arguments(world, output_dir, **changed))
    return Path(output_dir)


def tensors(folder):
    return {f"{file}:{name}": tensor for file in ("adapter_model.safetensors", "value_head.safetensors")
            for name, tensor in load_file(Path(folder) / file).items()}  # fmt: skip


def timeless(rows):
    return [
        {k: v for k, v in row.items() if not k.startswith(("time/", "tokens/s", "samples/s", "mem/"))} for row in rows
    ]


# ---- the command line ----
def test_the_tutorials_command_parses_verbatim():
    args = rl_training.parse_args(shlex.split(TUTORIAL))
    assert (args.base_model_name, args.merged_sft_model_path) == ("baichuan-inc/baichuan-7B", "M")
    # Where the mini-batch is left out, an optimizer step has as many responses as a mini-batch of 1 gives it.
    assert (args.batch_size, args.mini_batch_size, args.gradient_accumulation_steps) == (8, None, 16)
    assert args.ppo_epochs == 4
    assert (args.adafactor, args.early_stopping, args.learning_rate, args.log_with) == (False, True, 1e-5, "wandb")


def test_the_defaults_are_the_tutorials_or_chosen_at_the_start():
    args = rl_training.parse_args(
        ["--base_model_name", "b", "--sft_model_lora_path", "s", "--reward_model_lora_path", "r"]
    )
    expected = {
        "learning_rate": None, "output_max_length": 128, "mini_batch_size": None, "batch_size": 32, "ppo_epochs": 4,
        "gradient_accumulation_steps": 4, "target_kl": 0.1, "reward_baseline": 0, "save_freq": None,
        "output_dir": "runs/ppo", "seed": 0, "steps": 20000, "init_kl_coef": None, "adap_kl_ctrl": False,
        "early_stopping": False, "reward_transform": "auto", "suppress_empty": True,
    }  # fmt: skip
    assert {name: getattr(args, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        ("--batch_size 6 --mini_batch_size 4", "multiple of --mini_batch_size"),
        ("--temperature 0", "--temperature 0.0 must be above 0"),
        ("--steps 0", "--steps 0 must be at least 1"),
        ("--save_freq 0", "--save_freq 0"),
        ("--min_new_tokens 128", "below --output_max_length"),
        ("--log_with neptune", "--log_with neptune"),
        ("--reward_transform tanh", "invalid choice"),
        ("--unknown 1", "unrecognized arguments"),
    ],
)
def test_bad_values_end_with_usage_and_code_2(flags, complaint, capsys):
    with pytest.raises(SystemExit) as exit_code:
        rl_training.parse_args(
            shlex.split(f"--base_model_name b --sft_model_lora_path s --reward_model_lora_path r {flags}")
        )
    assert exit_code.value.code == 2
    assert complaint in capsys.readouterr().err


# ---- a run ----
@pytest.fixture(scope="module")
def finished(world, tmp_path_factory):
    return run(world, tmp_path_factory.mktemp("ppo") / "out", save_freq=1, adap_kl_ctrl=True)


def test_a_run_leaves_a_standard_adapter_a_value_head_metrics_and_its_story(finished, world, tiny_base):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32), finished)
    stored = {name.replace(".default", ""): p for name, p in model.state_dict().items() if "lora_" in name}
    assert all(torch.equal(p, stored[name]) for name, p in load_file(finished / "adapter_model.safetensors").items())
    run_json = load_run(finished)
    assert run_json["stage"] == "ppo"
    assert run_json["parents"]["sft"]["path"] == world["sft_model_lora_path"]
    assert set(load_file(finished / "value_head.safetensors")) == {"weight", "bias"}
    promised = """step score/mean score/std kl/mean kl_coef rewards/mean len/mean len/min empty_frac eos_frac
        distinct_2 entropy policykl approxkl clipfrac ratio/max loss/policy loss/value var_explained grad_norm lr
        skipped time/rollout time/score time/update time/step tokens/s samples/s mem/peak_gb env/reward_mean"""
    for number, row in enumerate(read_metrics(finished), start=1):
        assert set(promised.split()) <= set(row)
        assert row["step"] == number
    assert len(read_metrics(finished)) == 3


def test_kl_is_zero_at_the_first_step_where_policy_is_sft(finished):
    assert abs(read_metrics(finished)[0]["kl/mean"]) < 1e-5
    assert abs(read_metrics(finished)[2]["kl/mean"]) > 1e-4


def test_training_moves_the_policy_and_the_value_head_and_nothing_else(world, tmp_path):
    args = arguments(world, tmp_path)
    prompt_format = text_format(load_tokenizer(args.base_model_name))
    rows = [
        {"prompt": p, "query_ids": rl_training.encoding.load_tokenizer(args.base_model_name).encode(p)}
        for p in PROMPTS
    ]
    loop = rl_training.make_loop(args, Accelerator(), prompt_format, (rows, []), None)
    state = {**dict(loop.roles.peft_model.named_parameters()), "score": loop.roles.score_heads["reward"].weight}
    before = {name: p.detach().clone() for name, p in state.items()}
    heads = [p.detach().clone() for p in loop.roles.value_head.parameters()]
    rl_training.train_step(loop, 0)
    moved = {name for name, p in state.items() if not torch.equal(p, before[name])}
    assert moved
    assert all("lora_" in name and ".policy." in name for name in moved)
    assert not torch.equal(heads[0], loop.roles.value_head.weight)


def unfinished_copy(finished, folder):
    """A run as it was before its end: its checkpoints and metrics, no final adapter."""
    shutil.copytree(finished, folder)
    for name in ("run.json", "adapter_model.safetensors", "adapter_config.json", "value_head.safetensors"):
        (folder / name).unlink()


def test_a_restart_from_any_checkpoint_gives_the_same_bytes(world, finished, tmp_path, capsys):
    for done in (1, 2):
        again = tmp_path / f"from_{done}"
        unfinished_copy(finished, again)
        for step in range(done + 1, 4):
            shutil.rmtree(again / f"step_{step}")
        run(world, again, save_freq=1, adap_kl_ctrl=True, resume_from_checkpoint=True)
        expected, found = tensors(finished), tensors(again)
        assert all(torch.equal(expected[name], found[name]) for name in expected)
        assert timeless(read_metrics(again)) == timeless(read_metrics(finished))


def test_a_damaged_checkpoint_is_passed_over_and_reported(world, finished, tmp_path, capsys):
    again = tmp_path / "again"
    unfinished_copy(finished, again)
    (again / "step_3" / "optimizer.safetensors").write_bytes(b"")
    run(world, again, save_freq=1, adap_kl_ctrl=True, resume_from_checkpoint=True)
    assert "ignoring checkpoint" in capsys.readouterr().out
    assert all(torch.equal(tensors(finished)[name], found) for name, found in tensors(again).items())


def test_a_finished_run_given_again_touches_nothing_and_loads_no_model(world, finished, monkeypatch, capsys):
    monkeypatch.setattr(rl_training.roles, "load_roles", lambda *a, **k: pytest.fail("a model was loaded"))
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    run(world, finished, save_freq=1, adap_kl_ctrl=True, resume_from_checkpoint=True)
    assert "is finished" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*")} == before


def test_a_run_may_be_made_longer_and_ends_as_if_it_had_been_that_long(world, finished, tmp_path):
    out = tmp_path / "out"
    run(world, out, save_freq=1, adap_kl_ctrl=True, steps=16)
    run(world, out, save_freq=1, adap_kl_ctrl=True, resume_from_checkpoint=True)
    assert all(torch.equal(tensors(finished)[name], found) for name, found in tensors(out).items())


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ({"batch_size": 4}, r"--batch_size \(was 8, is 4\)"),
        ({"seed": 1}, r"--seed \(was 0, is 1\)"),
        ({"learning_rate": 1e-5}, "--learning_rate"),
        ({"lr_scheduler_type": "linear"}, "--lr_scheduler_type"),
    ],
)
def test_a_checkpoint_of_another_command_is_refused_by_name_unless_allowed(world, finished, tmp_path, flags, named):
    out = tmp_path / "out"
    unfinished_copy(finished, out)
    shutil.rmtree(out / "step_3")
    changed = {"save_freq": 1, "adap_kl_ctrl": True, "resume_from_checkpoint": True} | flags
    with pytest.raises(ValueError, match=named):
        run(world, out, **changed)
    run(world, out, **changed, allow_changes=True)
    assert (out / "run.json").is_file()


def test_a_checkpoint_of_other_data_is_refused(world, finished, tmp_path):
    out, other = tmp_path / "out", tmp_path / "prompts.jsonl"
    unfinished_copy(finished, out)
    other.write_text(json.dumps({"prompt": "别的问题？"}) + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match="different: the data"):
        run(world | {"dataset_name": str(other)}, out, save_freq=1, adap_kl_ctrl=True, resume_from_checkpoint=True)


def test_the_same_seed_gives_the_same_run_and_another_seed_another(world, finished, tmp_path):
    same = run(world, tmp_path / "same", adap_kl_ctrl=True)
    other = run(world, tmp_path / "other", adap_kl_ctrl=True, seed=1)
    assert all(torch.equal(tensors(finished)[name], found) for name, found in tensors(same).items())
    assert timeless(read_metrics(other)) != timeless(read_metrics(finished))


def test_the_tutorials_command_runs_with_paths_and_sizes_replaced(world, tmp_path, monkeypatch):
    from peft import PeftModel

    from rlhf.models.loading import load_base

    merged = tmp_path / "merged"
    model = PeftModel.from_pretrained(load_base(world["base_model_name"], torch.float32), world["sft_model_lora_path"])
    model.merge_and_unload().save_pretrained(merged)
    monkeypatch.setenv("HOME", str(tmp_path))  # no key of the developer's own
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    line = shlex.split(TUTORIAL.replace("256", "8"))
    replaced = {"baichuan-inc/baichuan-7B": world["base_model_name"], "M": str(merged),
                "S": world["sft_model_lora_path"], "R": world["reward_model_lora_path"],
                "O": str(tmp_path / "out")}  # fmt: skip
    line = [replaced.get(word, word) for word in line]
    rl_training.main(rl_training.parse_args([*line, "--dataset_name", world["dataset_name"], "--steps", "16"]))
    rows = read_metrics(tmp_path / "out")
    assert len(rows) == 2
    assert abs(rows[0]["kl/mean"]) < 1e-3  # the merged model plays the SFT policy
    assert list((tmp_path / "out" / "wandb").glob("offline-run-*"))


def test_tensorboard_gets_the_same_numbers(world, tmp_path):
    run(world, tmp_path / "out", steps=8, log_with="tensorboard")
    assert list((tmp_path / "out" / "tensorboard").iterdir())


def test_gradient_checkpointing_changes_nothing(world, tmp_path):
    plain, checkpointed = (run(world, tmp_path / str(on), steps=8, gradient_checkpointing=on) for on in (False, True))
    for name, tensor in tensors(plain).items():
        torch.testing.assert_close(tensors(checkpointed)[name], tensor, atol=1e-5, rtol=0)


def test_inspecting_the_data_shows_rows_and_starts_nothing(world, tmp_path, capsys):
    run(world, tmp_path / "out", inspect_data=True)
    assert "我喜欢什么" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


# ---- refusals ----
def test_wrong_inputs_are_refused_in_one_sentence_before_a_model_loads(world, tmp_path, tiny_llama, monkeypatch):
    monkeypatch.setattr(rl_training.roles, "load_roles", lambda *a, **k: pytest.fail("a model was loaded"))
    other_sft = random_adapter(tiny_llama, tmp_path / "other")
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    used = tmp_path / "used"
    used.mkdir()
    (used / "metrics.jsonl").write_text("{}\n")
    for changed, complaint in [
        ({"base_model_name": str(tmp_path / "nowhere")}, "--base_model_name .*nowhere does not exist"),
        ({"sft_model_lora_path": str(tmp_path)}, "--sft_model_lora_path .* no adapter_config.json"),
        ({"sft_model_lora_path": other_sft}, "another base model_type: 'llama' there, 'baichuan' here"),
        ({"reward_model_lora_path": world["sft_model_lora_path"]}, "stage 'sft', but reward is wanted here"),
        ({"prompt_template": "Q: {prompt} A:"}, "another prompt_template"),
        ({"dataset_name": str(empty)}, "empty.jsonl"),
        ({"output_dir": str(used)}, "is not empty"),
        ({"resume_from_checkpoint": str(tmp_path)}, "cannot be used"),
    ]:
        with pytest.raises((ValueError, OSError), match=complaint):
            run(world | changed, changed.get("output_dir", tmp_path / "out"))


def test_overwriting_clears_what_a_run_left_and_nothing_else(world, tmp_path):
    out = tmp_path / "out"
    for name in ("step_3", "best", "step_by_step_notes"):
        (out / name).mkdir(parents=True)
    (out / "notes.txt").write_text("mine")
    run(world, out, steps=8, overwrite_output_dir=True)
    assert not (out / "step_3").exists()
    assert not (out / "best").exists()
    assert (out / "step_by_step_notes").is_dir()
    assert (out / "notes.txt").read_text() == "mine"


def test_an_adapter_of_the_same_shape_but_other_weights_is_refused(world, tiny_base, tmp_path):
    other = tmp_path / "base"
    shutil.copytree(tiny_base, other)
    weights = load_file(other / "model.safetensors")
    save_file({name: tensor + 0.01 for name, tensor in weights.items()}, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="another base weights"):
        run(world | {"base_model_name": str(other)}, tmp_path / "out")


# ---- the update ----
def stored_rollout(roles, seed=0, rows=8):
    """A rollout drawn at random: any tokens will do for the arithmetic of an update."""
    g = torch.Generator().manual_seed(seed)
    lengths, queries = torch.randint(1, 9, (rows,), generator=g), torch.randint(1, 6, (rows,), generator=g)
    mask = torch.arange(8) < lengths[:, None]
    query_mask = torch.arange(5).flip(0) < queries[:, None]
    draw = lambda *shape: torch.where(mask, torch.randn(*shape, generator=g), 0)  # noqa: E731
    return Rollout(
        query_ids=torch.randint(3, 500, (rows, 5), generator=g) * query_mask,
        query_mask=query_mask,
        response_ids=torch.randint(3, 500, (rows, 8), generator=g) * mask,
        mask=mask,
        logprobs=draw(rows, 8) * 0.1 - 6.3,
        values=draw(rows, 8) * 0.1,
        entropy=draw(rows, 8),
        advantages=draw(rows, 8),
        returns=draw(rows, 8),
    )


def updated(world, rollout, order=0, poison=None, **changed):
    """Trainable parameters after one update of a stored rollout."""
    args = arguments(world, "unused", learning_rate=1e-2, **changed)
    roles = load_roles(
        args.base_model_name, args.sft_model_lora_path, args.reward_model_lora_path, dtype=torch.float32, device="cpu"
    )
    before = {name: p.detach().clone() for name, p in roles.trainable().items()}
    optimizer = torch.optim.Adam(roles.trainable().values(), lr=args.learning_rate, eps=1e-5)
    sampling = Sampling(stop_ids=(2,), pad_token_id=0, max_new_tokens=8, suppress_empty=False)
    metrics = {}
    try:
        metrics = update(
            roles, optimizer, rollout, sampling, args, Accelerator(), torch.Generator().manual_seed(order)
        )
    except FloatingPointError as error:
        metrics["error"] = str(error)
    return before, {name: p.detach().clone() for name, p in roles.trainable().items()}, metrics


def test_neither_mini_batches_nor_their_order_change_what_is_optimised(world):
    rollout = stored_rollout(None)
    whole = {"mini_batch_size": 8, "gradient_accumulation_steps": 1, "ppo_epochs": 1}
    parts = {"mini_batch_size": 2, "gradient_accumulation_steps": 4, "ppo_epochs": 1}
    before, expected, _ = updated(world, rollout, **whole)
    assert any(not torch.equal(before[name], p) for name, p in expected.items())
    for order in (0, 1):
        for name, p in updated(world, rollout, order=order, **parts)[1].items():
            torch.testing.assert_close(p, expected[name], atol=1e-5, rtol=0)


def test_padding_with_nan_changes_nothing(world):
    rollout = stored_rollout(None)
    _, expected, _ = updated(world, rollout)
    for field in ("logprobs", "values", "advantages", "returns"):
        setattr(rollout, field, torch.where(rollout.mask, getattr(rollout, field), torch.nan))
    _, found, _ = updated(world, rollout)
    assert all(torch.equal(found[name], p) for name, p in expected.items())


@pytest.mark.parametrize("field", ["logprobs", "advantages", "returns", "values"])
def test_one_non_finite_number_leaves_every_parameter_bit_identical(world, field):
    rollout = stored_rollout(None)
    getattr(rollout, field)[-1, 0] = torch.nan
    before, after, metrics = updated(world, rollout, mini_batch_size=1, gradient_accumulation_steps=1, ppo_epochs=3)
    assert "not finite" in metrics["error"]
    assert all(torch.equal(before[name], p) for name, p in after.items())


def test_a_non_finite_score_is_named_with_its_row_before_anything_is_learnt(world, tmp_path, monkeypatch):
    scores = rl_training.experience.score_responses
    monkeypatch.setattr(
        rl_training.experience, "score_responses", lambda *a: scores(*a).index_fill(0, torch.tensor([3]), torch.nan)
    )
    with pytest.raises(FloatingPointError, match=r"score in rows \[3\]"):
        run(world, tmp_path / "out")


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("can't allocate memory")]
)
def test_out_of_memory_names_the_batch_its_longest_row_and_the_flags(world, tmp_path, monkeypatch, error):
    def full(*args, **kwargs):
        raise error

    with monkeypatch.context() as patch, pytest.raises(MemoryError, match=r"sampling of 8 rows.*--batch_size"):
        patch.setattr("rlhf.rl.experience.generate", full)
        run(world, tmp_path / "one")
    monkeypatch.setattr("rlhf.rl.update.policy_loss", full)
    with pytest.raises(MemoryError, match=r"the update of 4 rows, the longest of \d+ tokens: lower --mini_batch_size"):
        run(world, tmp_path / "two")


def test_another_runtime_error_stays_what_it_is(world, tmp_path, monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr("rlhf.rl.update.policy_loss", broken)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        run(world, tmp_path / "out")


@pytest.mark.parametrize("mode", ["stop", "skip"])
def test_a_step_that_is_not_finite_ends_the_run_or_is_left_out_and_counted(world, tmp_path, monkeypatch, mode):
    scores, count = rl_training.experience.score_responses, []

    def sometimes(*args):
        count.append(1)
        found = scores(*args)
        return found.index_fill(0, torch.tensor([3]), torch.nan) if len(count) == 2 else found

    monkeypatch.setattr(rl_training.experience, "score_responses", sometimes)
    if mode == "stop":
        with pytest.raises(FloatingPointError, match=r"score in rows \[3\]"):
            run(world, tmp_path / "out", on_non_finite=mode, check=False)
        return
    out = run(world, tmp_path / "out", on_non_finite=mode, save_freq=1, check=False)
    assert [row["step"] for row in read_metrics(out)] == [1, 3]
    assert read_metrics(out)[-1]["left_out"] == 1


def test_a_window_whose_ratio_exploded_is_skipped_and_counted(world):
    rollout = stored_rollout(None)
    rollout.logprobs -= 10
    before, after, metrics = updated(world, rollout, ppo_epochs=1)
    assert metrics["skipped"] == 1
    assert all(torch.equal(before[name], p) for name, p in after.items())


def test_early_stopping_leaves_out_the_other_epochs_and_drops_the_open_window(world):
    rollout = stored_rollout(None)
    rollout.logprobs += 2  # policykl is far over its target from the first epoch on
    flags = {"ppo_epochs": 4, "mini_batch_size": 2, "gradient_accumulation_steps": 16}
    before, after, metrics = updated(world, rollout, early_stopping=True, **flags)
    assert metrics["epochs"] == 1
    assert all(torch.equal(before[name], p) for name, p in after.items())
    before, after, metrics = updated(world, rollout, early_stopping=False, **flags)
    assert metrics["epochs"] == 4
    assert any(not torch.equal(before[name], p) for name, p in after.items())


def test_a_window_may_span_epochs_and_every_row_comes_once_an_epoch(world):
    rollout = stored_rollout(None)
    args = dataclasses.replace(arguments(world, "unused"), mini_batch_size=1, gradient_accumulation_steps=16)
    rows = mini_batches(
        rollout, args.mini_batch_size, args.gradient_accumulation_steps, torch.Generator().manual_seed(0)
    )
    assert sorted(torch.cat(rows).tolist()) == list(range(8))
    _, _, metrics = updated(world, rollout, mini_batch_size=1, gradient_accumulation_steps=16, ppo_epochs=4)
    assert metrics["epochs"] == 4


# ---- does it learn ----
def sharper(base, folder):
    """A copy of the base whose distributions are peaked, so that one token has a chance that sampling can find."""
    shutil.copytree(base, folder)
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] *= 6
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return str(folder)


@pytest.mark.parametrize(
    "flags",
    [
        {"advantage": "gae", "learning_rate": 2e-2},
        {"advantage": "rloo", "group_size": 8, "learning_rate": 5e-3},
        {"advantage": "grpo", "group_size": 8, "learning_rate": 5e-3},
    ],
    ids=lambda flags: flags["advantage"],
)
def test_a_bandit_is_solved(world, tiny_base, tmp_path, monkeypatch, flags):
    """Reward 1 for one token that comes up twice in the first 64 draws: from chance to over 0.95, by the real loop."""
    base = sharper(tiny_base, tmp_path / "base")
    sft, reward_model = random_adapter(base, tmp_path / "sft"), random_adapter(base, tmp_path / "reward", "reward")
    world = world | {"base_model_name": base, "sft_model_lora_path": sft, "reward_model_lora_path": reward_model}
    wanted = []

    def reward(loop, rollout, role):
        drawn = rollout.response_ids[:, 0].tolist()
        if not wanted:
            wanted.append(min(token for token in drawn if drawn.count(token) == 2))
        return torch.tensor([float(token == wanted[0]) for token in drawn])

    monkeypatch.setattr(rl_training.experience, "score_responses", reward)
    out = run(
        world, tmp_path / "out", steps=64 * 40, batch_size=64, mini_batch_size=64, gradient_accumulation_steps=1,
        ppo_epochs=4, output_max_length=1, init_kl_coef=0.0, suppress_empty=False, sample_freq=1000,
        on_collapse="off", check=False, **flags,
    )  # fmt: skip
    scores = [row["score/mean"] for row in read_metrics(out)]
    assert scores[0] < 0.1
    assert max(scores) > 0.95
    assert scores[-1] > 0.95


def test_ppo_imports_neither_the_trainer_nor_datasets_which_cost_90_mb():
    code = "import sys, rl_training; sys.exit(bool({'transformers.trainer', 'datasets'} & set(sys.modules)))"
    root = Path(__file__).resolve().parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0
