"""Stage 2: the loss and the metrics by hand, scores that survive a reload, the tutorial's command."""

import json
import math
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from adapters import random_adapter
from peft import PeftModel
from safetensors.torch import load_file, save_file
from stages import words, write_lines, write_pairs
from transformers import AutoModelForSequenceClassification, EvalPrediction

import reward_modeling
from rlhf.artefacts.run_json import load_run
from rlhf.data.batches import LengthGroupedSampler
from rlhf.data.choose_format import text_format
from rlhf.data.encoding import load_tokenizer
from rlhf.models.forward import backbone_of
from rlhf.models.scoring import score_in_parts
from rlhf.reward.pairs import PairCollator
from rlhf.rl.roles import load_roles
from rlhf.run.log import read_metrics

TUTORIAL = """--model_name baichuan-inc/baichuan-7B --lora_target_models W_pack
  --num_train_epochs 2 --eval_steps 200 --save_steps 50 --per_device_train_batch_size 10
  --per_device_eval_batch_size 16 --train_subset -1 --eval_subset -1 --max_length 1000"""


def arguments(base, data, output_dir, **changed):
    flags = {
        "model_name": base, "dataset_name": data, "output_dir": output_dir, "num_train_epochs": 2,
        "learning_rate": 5e-3, "per_device_train_batch_size": 8, "per_device_eval_batch_size": 8,
        "gradient_accumulation_steps": 2, "save_steps": 0,
    } | changed  # fmt: skip
    return reward_modeling.parse_args(words(flags))


def run(base, data, output_dir, **changed):
    reward_modeling.main(arguments(base, data, output_dir, **changed))
    return Path(output_dir)


def run_broken(base, data, output_dir, **changed):
    """A run whose updates break the weights at once: no command line may ask for such a learning rate."""
    args = arguments(base, data, output_dir, max_grad_norm=0, **changed)
    args.learning_rate = 1e30
    reward_modeling.main(args)
    return Path(output_dir)


def adapter(folder):
    return load_file(Path(folder) / "adapter_model.safetensors")


def adapter_bytes(folder):
    return (Path(folder) / "adapter_model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return write_pairs(tmp_path_factory.mktemp("data") / "pairs.jsonl")


@pytest.fixture(scope="module")
def trained(tiny_base, pairs, tmp_path_factory):
    """Directory of a run of eight steps, evaluated in between and checkpointed in its second epoch."""
    return run(tiny_base, pairs, tmp_path_factory.mktemp("runs") / "reward", save_steps=6, eval_steps=4)


def make_trainer(base, data, output_dir, **changed):
    args = arguments(base, data, output_dir, lora_dropout=0, **changed)
    tokenizer = load_tokenizer(base)
    rows, eval_rows, _ = reward_modeling.load_data(args, text_format(tokenizer))
    model = reward_modeling.build_model(args, base)
    for parameter in model.parameters():
        # A new adapter is zero and a new head tiny; the scores are to depend on both.
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)
    sampler = LengthGroupedSampler([reward_modeling.pairs.pair_length(row) for row in rows], 8, args.seed)
    trainer = reward_modeling.build_trainer(args, model, text_format(tokenizer), {}, rows, eval_rows, sampler)
    return trainer, tokenizer, rows, eval_rows


@torch.no_grad()
def plain_score(model, ids: list[int]) -> float:
    """The head on the state of the last token, one unpadded sequence at a time."""
    inner = model.get_base_model()
    hidden = backbone_of(inner)(input_ids=torch.tensor([ids])).last_hidden_state
    return inner.score(hidden[0, -1]).item()


def plain_margins(model, rows) -> list[float]:
    model.eval()
    return [
        plain_score(model, row["query_ids"] + row["chosen_ids"])
        - plain_score(model, row["query_ids"] + row["rejected_ids"])
        for row in rows
    ]


# ---- loss and metrics ----
def test_pairwise_loss_equals_a_plain_loop():
    chosen, rejected = torch.tensor([1.0, -2.0, 0.5]), torch.tensor([0.0, 3.0, 0.5])
    expected = sum(math.log(1 + math.exp(r - c)) for c, r in zip(chosen.tolist(), rejected.tolist(), strict=True)) / 3
    assert reward_modeling.pairwise_loss(chosen, rejected).item() == pytest.approx(expected, abs=1e-6)


def test_a_tie_counts_as_wrong_and_the_metrics_are_the_plain_ones():
    scores = np.array([[2.0, 1.0], [0.0, 0.0], [-1.0, 3.0], [5.0, 1.0]], dtype="float32")
    found = reward_modeling.pair_metrics(EvalPrediction(predictions=scores, label_ids=None))
    assert found["accuracy"] == 0.5
    assert found["margin"] == pytest.approx((1 + 0 - 4 + 4) / 4)
    assert found["loss"] == pytest.approx(sum(math.log(1 + math.exp(-m)) for m in (1, 0, -4, 4)) / 4)
    assert (found["chosen_mean"], found["rejected_mean"]) == (1.5, 1.25)


@pytest.mark.parametrize(("pairs_a_batch", "parts"), [(1, 1), (3, 1), (4, 2), (9, 4), (20, 4)])
def test_the_training_loss_is_the_plain_one_from_rows_of_like_length(tiny_base, pairs, tmp_path, pairs_a_batch, parts):
    trainer, _, rows, _ = make_trainer(tiny_base, pairs, tmp_path)
    rows = rows[:pairs_a_batch]
    margins = plain_margins(trainer.model, rows)
    computed, lengths = [], []
    backbone = backbone_of(trainer.model.get_base_model())
    backbone.register_forward_pre_hook(lambda _, __, of: computed.append(of["input_ids"].numel()), with_kwargs=True)
    backbone.register_forward_pre_hook(lambda _, __, of: lengths.append(of["row_lengths"]), with_kwargs=True)
    batch = trainer.data_collator(rows)
    loss = trainer.compute_loss(trainer.model.train(), dict(batch))
    assert loss.item() == pytest.approx(sum(math.log(1 + math.exp(-m)) for m in margins) / len(rows), abs=1e-5)
    assert len(lengths) == parts
    together = [length for part in lengths for length in part]
    # All rows, none of them with padding, the shorter ones first.
    assert together == sorted(batch["attention_mask"].sum(1).tolist())
    assert computed == [sum(part) for part in lengths]


def test_scores_in_parts_are_those_of_the_rows_in_their_order(tiny_base, pairs, tmp_path):
    trainer, _, rows, _ = make_trainer(tiny_base, pairs, tmp_path)
    inner, batch = trainer.model.get_base_model().eval(), trainer.data_collator(rows[:20])
    with torch.no_grad():
        found = score_in_parts(backbone_of(inner), inner.score, **batch)
    sides = [row["query_ids"] + row[side] for side in ("chosen_ids", "rejected_ids") for row in rows[:20]]
    assert found.tolist() == pytest.approx([plain_score(trainer.model, ids) for ids in sides], abs=1e-5)


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_evaluation_is_the_plain_one_for_any_batch_size(tiny_base, pairs, tmp_path, batch_size):
    trainer, _, _, eval_rows = make_trainer(
        tiny_base, pairs, tmp_path, per_device_eval_batch_size=batch_size, eval_size=7
    )
    margins = plain_margins(trainer.model, eval_rows)
    found = trainer.evaluate()
    assert found["eval_accuracy"] == sum(margin > 0 for margin in margins) / len(margins)
    assert found["eval_margin"] == pytest.approx(sum(margins) / len(margins), abs=1e-5)
    assert found["eval_loss"] == pytest.approx(
        sum(math.log(1 + math.exp(-margin)) for margin in margins) / len(margins), abs=1e-5
    )


def test_scores_keep_their_digits_under_autocast(tiny_base, pairs, tmp_path):
    trainer, _, rows, _ = make_trainer(tiny_base, pairs, tmp_path)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        scores = trainer.model(**trainer.data_collator(rows[:8])).logits
    assert scores.dtype == torch.float32
    # Rounded to bfloat16 they would tie where they are close, and every tie counts as wrong.
    assert not torch.equal(scores, scores.bfloat16().float())


def test_gradients_reach_the_adapter_and_the_head_only(tiny_base, pairs, tmp_path):
    trainer, _, rows, _ = make_trainer(tiny_base, pairs, tmp_path)
    trainer.compute_loss(trainer.model, trainer.data_collator(rows[:4])).backward()
    touched = {name for name, parameter in trainer.model.named_parameters() if parameter.grad is not None}
    assert touched == {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    assert {"lora_A", "lora_B", "score"} == {
        part for name in touched for part in ("lora_A", "lora_B", "score") if part in name
    }
    assert all("lora_" in name or "score.modules_to_save" in name for name in touched)


# ---- data ----
def test_both_answers_end_with_eos_and_the_score_sees_it(tiny_base, pairs, tmp_path):
    trainer, tokenizer, rows, eval_rows = make_trainer(tiny_base, pairs, tmp_path)
    for row in rows + eval_rows:
        assert row["chosen_ids"][-1] == row["rejected_ids"][-1] == tokenizer.eos_token_id
    ids = rows[0]["query_ids"] + rows[0]["chosen_ids"]
    trainer.model.eval()
    assert plain_score(trainer.model, ids) != plain_score(trainer.model, ids[:-1])


def test_subsets_and_a_split_by_prompt_are_made(tiny_base, tmp_path):
    doubled = [{"prompt": f"问题{i // 2}", "chosen": f"好{i}！", "rejected": f"坏{i}。"} for i in range(40)]
    data = write_lines(tmp_path / "pairs.jsonl", doubled)
    tokenizer = load_tokenizer(tiny_base)
    args = arguments(tiny_base, data, tmp_path, eval_size=0.5, train_subset=10, eval_subset=6)
    rows, eval_rows, about = reward_modeling.load_data(args, text_format(tokenizer))
    assert (len(rows), len(eval_rows)) == (10, 6)
    assert not {row["prompt"] for row in rows} & {row["prompt"] for row in eval_rows}
    assert about["funnel"]["dropped"] == {"beyond the subset": 24}
    everything = arguments(tiny_base, data, tmp_path, eval_size=0.5, train_subset=-1, eval_subset=-1)
    rows, eval_rows, _ = reward_modeling.load_data(everything, text_format(tokenizer))
    assert len(rows) + len(eval_rows) == 40


def test_batches_of_like_length_hold_less_padding_and_every_row_once(tiny_base, tmp_path):
    data = write_pairs(tmp_path / "pairs.jsonl", 200)
    trainer, _, rows, _ = make_trainer(tiny_base, data, tmp_path)
    masks = [batch["attention_mask"] for batch in trainer.get_train_dataloader()]
    in_file_order = [trainer.data_collator(rows[i : i + 8])["attention_mask"] for i in range(0, len(rows), 8)]
    assert sum(mask.sum() for mask in masks) == sum(mask.sum() for mask in in_file_order)
    padding = [sum((~mask.bool()).sum().item() for mask in found) for found in (masks, in_file_order)]
    assert padding[0] < 0.8 * padding[1]


# ---- what comes out ----
@pytest.mark.parametrize("base_name", ["tiny_base", "tiny_llama"])
def test_plain_peft_gives_the_same_scores_after_a_reload(base_name, request, pairs, tmp_path):
    base = request.getfixturevalue(base_name)
    args = arguments(base, pairs, tmp_path / "out", max_steps=3, learning_rate=1e-2)
    kept = {}
    original = reward_modeling.adapters.check_saved
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            reward_modeling.adapters, "check_saved", lambda model, d: (kept.update(model=model), original(model, d))
        )
        reward_modeling.main(args)
    tokenizer = load_tokenizer(base)
    rows, _, _ = reward_modeling.load_data(args, text_format(tokenizer))
    batch = PairCollator(tokenizer.pad_token_id)(rows[:6])
    plain = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, dtype="float32")
    plain.config.pad_token_id = tokenizer.pad_token_id
    plain = PeftModel.from_pretrained(plain, tmp_path / "out").eval()
    sft = random_adapter(base, tmp_path / "sft")
    roles = load_roles(base, sft, tmp_path / "out", dtype=torch.float32, device="cpu")
    roles.train(False)
    with torch.no_grad():
        trained = kept["model"].eval()(**batch).logits
        torch.testing.assert_close(plain(**batch).logits[:, 0], trained, atol=1e-6, rtol=0)
        # The reward model of PPO: the same function on the same weights.
        found = roles.scores(batch["input_ids"], batch["attention_mask"])
    torch.testing.assert_close(found, trained, atol=1e-6, rtol=0)
    assert trained.std() > 0


def test_the_run_says_what_it_did_and_learnt(trained):
    run_file, metrics = load_run(trained), read_metrics(trained)
    assert run_file["stage"] == "reward" and run_file["data"]["funnel"]["read"] == 60
    evaluations = [record for record in metrics if "eval_loss" in record]
    assert [record["step"] for record in evaluations] == [4, 8]
    last = {name: value for name, value in evaluations[-1].items() if name != "step"}
    assert {name: run_file["metrics"][name] for name in last} == last
    assert {"audit_pass", "audit/empty", "audit/cut"} <= set(run_file["metrics"])
    assert (trained / "audit.md").is_file() and (trained / "audit.png").is_file()
    assert run_file["metrics"]["eval_accuracy"] == 1.0 and run_file["metrics"]["eval_margin"] > 0
    steps = [record for record in metrics if "loss" in record]
    assert [record["step"] for record in steps] == list(range(1, 9))
    assert {"loss", "lr", "grad_norm", "tokens/s", "samples/s", "time/step"} <= steps[0].keys()
    config = json.loads((trained / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["task_type"] == "SEQ_CLS" and "score" in config["modules_to_save"]


def test_a_file_without_the_score_head_is_noticed(tiny_base, trained, tmp_path):
    shutil.copytree(trained, tmp_path / "copy")
    model = AutoModelForSequenceClassification.from_pretrained(tiny_base, num_labels=1, dtype="float32")
    model = PeftModel.from_pretrained(model, trained)
    reward_modeling.adapters.check_saved(model, str(tmp_path / "copy"))
    file = tmp_path / "copy" / "adapter_model.safetensors"
    whole = load_file(file)
    save_file({name: tensor for name, tensor in whole.items() if "score" not in name}, file)
    with pytest.raises(ValueError, match="without the score head"):
        reward_modeling.adapters.check_saved(model, str(tmp_path / "copy"))
    save_file({name: tensor + 1 for name, tensor in whole.items()}, file)
    with pytest.raises(ValueError, match="as it was trained"):
        reward_modeling.adapters.check_saved(model, str(tmp_path / "copy"))


def test_eval_first_step_evaluates_after_the_first_step(tiny_base, pairs, tmp_path):
    folder = run(tiny_base, pairs, tmp_path / "out", max_steps=2, eval_first_step=True, eval_steps=0)
    assert [record["step"] for record in read_metrics(folder) if "eval_loss" in record] == [1, 2]


# ---- going on, and how it is run ----
def test_a_resumed_run_ends_with_the_same_bytes(tiny_base, pairs, trained, tmp_path):
    folder = tmp_path / "cut"
    folder.mkdir()
    shutil.copytree(trained / "checkpoint-6", folder / "checkpoint-6")
    shutil.copy(trained / "metrics.jsonl", folder)
    run(tiny_base, pairs, folder, save_steps=6, eval_steps=4, resume_from_checkpoint=True)
    assert adapter_bytes(folder) == adapter_bytes(trained)
    assert load_run(folder)["metrics"] == load_run(trained)["metrics"]
    assert len(read_metrics(folder)) == len(read_metrics(trained))


def test_evaluating_and_saving_more_often_trains_the_same(tiny_base, pairs, trained, tmp_path):
    folder = run(tiny_base, pairs, tmp_path / "out", save_steps=0, eval_steps=1)
    assert adapter_bytes(folder) == adapter_bytes(trained)


def test_gradient_checkpointing_trains_the_same(tiny_base, pairs, tmp_path):
    found = [
        adapter(run(tiny_base, pairs, tmp_path / str(on), max_steps=3, gradient_checkpointing=on))
        for on in (False, True)
    ]
    for name, tensor in found[0].items():
        torch.testing.assert_close(found[1][name], tensor, atol=1e-6, rtol=0)
    assert any(tensor.abs().max() > 0 for name, tensor in found[1].items() if "lora_B" in name)


# ---- the command line ----
def test_the_tutorials_command_parses_word_for_word():
    args = reward_modeling.parse_args(shlex.split(TUTORIAL))
    assert (args.model_name, args.lora_target_models, args.num_train_epochs) == (
        "baichuan-inc/baichuan-7B",
        "W_pack",
        2,
    )
    assert (args.eval_steps, args.save_steps, args.max_length) == (200, 50, 1000)
    assert (args.per_device_train_batch_size, args.per_device_eval_batch_size) == (10, 16)
    assert (args.train_subset, args.eval_subset) == (-1, -1)


def test_the_tutorials_command_runs_with_paths_and_sizes_replaced(tiny_base, pairs, tmp_path):
    replaced = {"model_name": tiny_base, "dataset_name": pairs, "output_dir": tmp_path / "out", "max_steps": 2}
    reward_modeling.main(reward_modeling.parse_args(shlex.split(TUTORIAL) + words(replaced)))
    assert "eval_accuracy" in load_run(tmp_path / "out")["metrics"]


def test_the_defaults_are_the_tutorials():
    args = reward_modeling.parse_args([])
    assert (args.per_device_train_batch_size, args.per_device_eval_batch_size) == (4, 1)
    assert (args.learning_rate, args.weight_decay, args.num_train_epochs) == (2e-5, 0.001, 1)
    assert (args.eval_steps, args.save_steps, args.train_subset, args.eval_subset) == (500, 500, 100000, 50000)
    assert (args.lora_rank, args.lora_alpha, args.lora_dropout) == (4, 32, 0.1)
    assert (args.max_length, args.lr_scheduler_type, args.bf16) == (512, "linear", True)
    assert (args.output_dir, args.eval_first_step) == ("runs/reward", False)


def test_every_flag_of_the_tutorial_parses():
    old = """--local_rank -1 --resume_from_checkpoint False --deepspeed ds.json --per_device_train_batch_size 2
      --per_device_eval_batch_size 2 --gradient_accumulation_steps 3 --learning_rate 1e-5 --weight_decay 0.01
      --model_name M --lora_target_models q_proj|v_proj --tokenizer_name T --bf16 False --num_train_epochs 3
      --eval_steps 5 --save_steps 6 --train_subset 7 --eval_subset 8 --gradient_checkpointing True --optim adamw_hf
      --lr_scheduler_type cosine --max_length 9 --eval_first_step True"""
    args = reward_modeling.parse_args(shlex.split(old))
    assert (args.optim, args.resume_from_checkpoint, args.bf16) == ("adamw_torch", None, False)
    assert (args.tokenizer_name, args.deepspeed, args.lora_target_models) == ("T", "ds.json", "q_proj|v_proj")


# ---- refusals ----
def test_an_unknown_target_module_is_named(tiny_base, pairs, tmp_path):
    with pytest.raises(ValueError, match="query_key_value"):
        run(tiny_base, pairs, tmp_path / "out", lora_target_models="query_key_value")


def test_an_sft_directory_is_not_taken_for_a_finished_reward_run(tiny_base, pairs, tmp_path):
    folder = random_adapter(tiny_base, tmp_path / "sft")
    with pytest.raises(ValueError, match="stage sft"):
        run(tiny_base, pairs, folder, resume_from_checkpoint=True)


def test_a_gradient_that_is_not_finite_stops_the_run_without_an_adapter(tiny_base, pairs, tmp_path):
    with pytest.raises(FloatingPointError, match="is not finite"):
        run_broken(tiny_base, pairs, tmp_path / "out", eval_size=0)
    assert not (tmp_path / "out" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize("wrong", ["--eval_subset -2", "--lora_rank 0", "--gradient_accumulation_steps 0"])
def test_wrong_flags_end_with_usage(wrong, capsys):
    with pytest.raises(SystemExit) as stopped:
        reward_modeling.parse_args(wrong.split())
    assert stopped.value.code == 2
    assert wrong.split()[0] in capsys.readouterr().err
