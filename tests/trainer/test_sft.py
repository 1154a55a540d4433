"""Stage 1: where the loss is, what it equals, that the model learns to stop, that a run can be cut and resumed."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from stages import words, write_answers, write_lines
from transformers import AutoModelForCausalLM

import sft_training
from rlhf.artefacts.run_json import load_run
from rlhf.data.batches import LengthGroupedSampler
from rlhf.data.choose_format import text_format
from rlhf.data.control_tokens import encode
from rlhf.data.encoding import load_tokenizer, sft_rows
from rlhf.data.funnel import Funnel
from rlhf.data.template import render
from rlhf.models.generation import greedy_answers
from rlhf.run.log import read_metrics

LESSONS = [("我是谁？", "你是老师。"), ("你好。", "你好！"), ("晴天？", "今天晴天。")]


def arguments(base, data, output_dir, **changed):
    flags = {
        "model_name": base, "dataset_name": data, "output_dir": output_dir, "num_train_epochs": 2,
        "learning_rate": 1e-3, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 2, "save_steps": 0,
        "sample_max_new_tokens": 0,
    } | changed  # fmt: skip
    return sft_training.parse_args(words(flags))


def run(base, data, output_dir, **changed):
    sft_training.main(arguments(base, data, output_dir, **changed))
    return Path(output_dir)


def run_broken(base, data, output_dir, **changed):
    """A run whose updates break the weights at once: no command line may ask for such a learning rate."""
    args = arguments(base, data, output_dir, max_grad_norm=0, **changed)
    args.learning_rate = 1e30
    sft_training.main(args)
    return Path(output_dir)


def adapter(folder):
    return load_file(Path(folder) / "adapter_model.safetensors")


def adapter_bytes(folder):
    return (Path(folder) / "adapter_model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    return write_answers(tmp_path_factory.mktemp("data") / "answers.jsonl")


@pytest.fixture(scope="module")
def trained(tiny_base, answers, tmp_path_factory):
    """Directory of a run of eight steps, evaluated in between and checkpointed in its second epoch."""
    return run(
        tiny_base,
        answers,
        tmp_path_factory.mktemp("runs") / "sft",
        save_steps=6,
        eval_steps=4,
        sample_max_new_tokens=4,
    )


def make_trainer(base, data, output_dir, **changed):
    args = arguments(base, data, output_dir, lora_dropout=0, **changed)
    tokenizer = load_tokenizer(base)
    prompt_format = text_format(tokenizer)
    rows, eval_rows, _, _ = sft_training.load_data(args, prompt_format)
    model = sft_training.build_model(args, base)
    for name, parameter in model.named_parameters():
        # A new adapter is zero; the loss is to depend on it.
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    sampler = LengthGroupedSampler(
        [len(row["input_ids"]) for row in rows], args.per_device_train_batch_size, args.seed
    )
    trainer = sft_training.build_trainer(args, model, prompt_format, {}, (rows, eval_rows), sampler, fresh=False)
    return trainer, tokenizer, rows, eval_rows


@torch.no_grad()
def plain_loss(model, rows) -> float:
    """Mean of -log p over answer tokens, row by row and token by token."""
    total, count = 0.0, 0
    for row in rows:
        logprobs = model(input_ids=torch.tensor([row["input_ids"]])).logits[0].double().log_softmax(-1)
        for t, (token, kept) in enumerate(zip(row["input_ids"], row["completion_mask"], strict=True)):
            if kept:
                total, count = total - logprobs[t - 1, token].item(), count + 1
    return total / count


# ---- the loss ----
def test_labels_are_the_answer_and_its_eos_and_nothing_else(tiny_base, answers, tmp_path):
    trainer, tokenizer, rows, _ = make_trainer(tiny_base, answers, tmp_path)
    batch = next(iter(trainer.get_train_dataloader()))
    by_ids = {tuple(row["input_ids"]): row["completion_mask"] for row in rows}
    for ids, mask, labels in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True):
        real = ids[mask.bool()].tolist()
        completion = by_ids[tuple(real)]
        expected = [token if kept else -100 for token, kept in zip(real, completion, strict=True)]
        assert labels.tolist() == expected + [-100] * (len(ids) - len(real))
        assert real[-1] == tokenizer.eos_token_id and expected[-1] == tokenizer.eos_token_id
        assert real[: completion.index(1)] == encode(tokenizer, tokenizer.decode(real[: completion.index(1)]))


def test_training_loss_equals_two_plain_loops(tiny_base, answers, tmp_path):
    trainer, _, rows, _ = make_trainer(tiny_base, answers, tmp_path)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(8)])
    expected = plain_loss(trainer.model.eval(), rows[:8])
    assert trainer.compute_loss(trainer.model.train(), batch).item() == pytest.approx(expected, abs=1e-5)


def test_query_tokens_get_no_gradient_from_the_loss(tiny_base, answers, tmp_path):
    trainer, _, rows, _ = make_trainer(tiny_base, answers, tmp_path)
    batch = trainer.data_collator([trainer.train_dataset[0]])
    states = []

    def keep(module, inputs, output):
        output.last_hidden_state.retain_grad()
        states.append(output.last_hidden_state)

    trainer.model.get_base_model().model.register_forward_hook(keep)
    trainer.compute_loss(trainer.model, batch).backward()
    pulled = states[0].grad[0].abs().sum(-1) > 0
    # The state before each answer token predicts it; the last state, after EOS, predicts nothing.
    assert pulled.tolist() == [bool(kept) for kept in rows[0]["completion_mask"][1:]] + [False]


@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_eval_loss_is_the_mean_over_tokens_for_any_batch_size(tiny_base, answers, tmp_path, batch_size):
    trainer, _, _, eval_rows = make_trainer(
        tiny_base, answers, tmp_path, per_device_eval_batch_size=batch_size, eval_size=5
    )
    expected = plain_loss(trainer.model.eval(), eval_rows)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, abs=1e-5)


# ---- what comes out ----
def test_a_tiny_model_learns_to_answer_and_to_stop(tiny_base, tmp_path):
    rows = [{"prompt": prompt, "answer": answer} for prompt, answer in LESSONS]
    data = write_lines(tmp_path / "lessons.jsonl", rows)
    folder = run(
        tiny_base, data, tmp_path / "out", max_steps=120, learning_rate=2e-2, per_device_train_batch_size=3,
        gradient_accumulation_steps=1, lora_rank=16, lora_dropout=0, eval_size=0,
        lora_target_models="W_pack|o_proj|gate_proj|up_proj|down_proj",
    )  # fmt: skip
    tokenizer = load_tokenizer(tiny_base)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_base, dtype="float32"), folder)
    prompt_format = text_format(tokenizer)
    queries = [prompt_format.query_ids([("user", prompt)]) for prompt, _ in LESSONS]
    base = model.eval().get_base_model()
    # " ..." marks an answer that had to be cut.
    assert greedy_answers(base, prompt_format, queries, 24) == [answer for _, answer in LESSONS]
    with model.disable_adapter():
        assert any(answer.endswith(" ...") for answer in greedy_answers(base, prompt_format, queries, 24))


def test_plain_peft_loads_the_adapter(tiny_base, trained):
    base = AutoModelForCausalLM.from_pretrained(tiny_base, dtype="float32")
    ids = torch.tensor([[5, 6, 7, 8]])
    before = base(input_ids=ids).logits
    model = PeftModel.from_pretrained(base, trained)
    assert not torch.equal(model(input_ids=ids).logits, before)
    config = json.loads((trained / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["task_type"] == "CAUSAL_LM" and config["target_modules"] == ["W_pack"]
    assert load_tokenizer(str(trained)).eos_token_id == load_tokenizer(tiny_base).eos_token_id


def test_the_run_says_what_it_did(trained):
    run_file, metrics = load_run(trained), read_metrics(trained)
    assert run_file["stage"] == "sft" and run_file["data"]["funnel"]["read"] == 60
    evaluations = [record for record in metrics if "eval_loss" in record]
    assert [record["step"] for record in evaluations] == [0, 4, 8]
    assert run_file["metrics"] == {
        "eval_loss_before": evaluations[0]["eval_loss"],
        "eval_loss_after": evaluations[-1]["eval_loss"],
        "best_step": 8,
    }
    assert run_file["metrics"]["eval_loss_after"] < run_file["metrics"]["eval_loss_before"]
    steps = [record for record in metrics if "loss" in record]
    assert [record["step"] for record in steps] == list(range(1, 9))
    assert {"loss", "lr", "grad_norm", "tokens/s", "samples/s", "time/step"} <= steps[0].keys()
    samples = [json.loads(line) for line in (trained / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [sample["step"] for sample in samples] == [0, 0, 0, 8, 8, 8]


def test_no_pickle_is_left_beside_the_adapter(trained):
    kept = {path.name for path in trained.rglob("*") if path.suffix in (".bin", ".pkl")}
    assert kept == set()


def test_a_stock_llama_is_trained_too(tiny_llama, answers, tmp_path):
    folder = run(tiny_llama, answers, tmp_path / "out", max_steps=2)
    assert {name.split(".")[-3] for name in adapter(folder)} == {
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    }


# ---- going on ----
def test_previous_lora_weights_go_on_where_they_ended(tiny_base, answers, trained, tmp_path):
    folder = run(tiny_base, answers, tmp_path / "out", max_steps=1, previous_lora_weights=trained)
    after, then = load_run(trained)["metrics"], load_run(folder)
    assert then["metrics"]["eval_loss_before"] == pytest.approx(after["eval_loss_after"], abs=1e-6)
    assert then["parents"]["previous"]["path"] == str(trained)


def test_previous_weights_of_another_base_or_template_are_refused(tiny_llama, tiny_base, answers, trained, tmp_path):
    with pytest.raises(ValueError, match="another base model_type"):
        run(tiny_llama, answers, tmp_path / "a", previous_lora_weights=trained)
    with pytest.raises(ValueError, match="another prompt_template"):
        run(tiny_base, answers, tmp_path / "b", previous_lora_weights=trained, prompt_template="{prompt}->")


def test_a_resumed_run_ends_with_the_same_bytes(tiny_base, answers, trained, tmp_path):
    folder = tmp_path / "cut"
    folder.mkdir()
    shutil.copytree(trained / "checkpoint-6", folder / "checkpoint-6")
    shutil.copy(trained / "metrics.jsonl", folder)
    again = {"save_steps": 6, "eval_steps": 4, "sample_max_new_tokens": 4, "resume_from_checkpoint": True}
    run(tiny_base, answers, folder, **again)
    assert adapter_bytes(folder) == adapter_bytes(trained)
    timeless = [
        [
            {k: v for k, v in record.items() if k not in ("tokens/s", "samples/s", "time/step")}
            for record in read_metrics(path)
        ]
        for path in (folder, trained)
    ]
    assert timeless[0] == timeless[1]


def test_a_damaged_checkpoint_is_passed_over(tiny_base, answers, trained, tmp_path, capsys):
    folder = tmp_path / "cut"
    folder.mkdir()
    shutil.copytree(trained / "checkpoint-6", folder / "checkpoint-6")
    (folder / "checkpoint-6" / "optimizer.pt").write_bytes(b"")
    run(tiny_base, answers, folder, save_steps=6, eval_steps=4, resume_from_checkpoint=True)
    assert "optimizer.pt is not what the manifest lists" in capsys.readouterr().out
    assert adapter_bytes(folder) == adapter_bytes(trained)


def test_a_checkpoint_of_the_last_step_needs_no_more_steps(tiny_base, answers, trained, tmp_path):
    folder = tmp_path / "cut"
    shutil.copytree(trained, folder)
    (folder / "run.json").unlink()
    run(tiny_base, answers, folder, save_steps=6, eval_steps=4, resume_from_checkpoint=True)
    assert adapter_bytes(folder) == adapter_bytes(trained)
    assert load_run(folder)["metrics"] == load_run(trained)["metrics"]


def test_a_finished_run_is_left_alone_and_another_one_refused(tiny_base, answers, trained):
    before = {path: path.stat().st_mtime_ns for path in trained.rglob("*")}
    same = {"save_steps": 6, "eval_steps": 4, "sample_max_new_tokens": 4, "resume_from_checkpoint": True}
    run(tiny_base, answers, trained, **same)
    with pytest.raises(ValueError, match="different: --learning_rate"):
        run(tiny_base, answers, trained, **same, learning_rate=1e-5)
    with pytest.raises(FileExistsError, match="is not empty"):
        run(tiny_base, answers, trained)
    assert {path: path.stat().st_mtime_ns for path in trained.rglob("*")} == before


# ---- how it is run changes nothing ----
def test_evaluating_and_saving_more_often_trains_the_same(tiny_base, answers, trained, tmp_path):
    folder = run(tiny_base, answers, tmp_path / "out", save_steps=0, eval_steps=1)
    assert adapter_bytes(folder) == adapter_bytes(trained)


def test_gradient_checkpointing_trains_the_same(tiny_base, answers, tmp_path):
    found = [
        adapter(run(tiny_base, answers, tmp_path / str(on), max_steps=3, gradient_checkpointing=on))
        for on in (False, True)
    ]
    assert found[0].keys() == found[1].keys()
    for name, tensor in found[0].items():
        torch.testing.assert_close(found[1][name], tensor, atol=1e-6, rtol=0)
    assert any(tensor.abs().max() > 0 for name, tensor in found[1].items() if "lora_B" in name)


# ---- refusals ----
def test_a_gradient_that_is_not_finite_can_be_left_out_and_is_counted(tiny_base, answers, tmp_path):
    out = run_broken(tiny_base, answers, tmp_path / "out", eval_size=0, on_non_finite="skip")
    assert read_metrics(out)[-1]["left_out"] > 0
    assert all(tensor.isfinite().all() for tensor in load_file(out / "adapter_model.safetensors").values())


def test_a_model_that_training_broke_is_not_handed_on(tiny_base, answers, tmp_path):
    with pytest.raises(FloatingPointError, match="evaluation loss is not finite"):
        run_broken(tiny_base, answers, tmp_path / "out", on_non_finite="skip")
    assert not (tmp_path / "out" / "adapter_model.safetensors").exists()


def test_a_gradient_that_is_not_finite_stops_the_run_without_an_adapter(tiny_base, answers, tmp_path):
    with pytest.raises(FloatingPointError, match="gradient of step 2 is not finite"):
        run_broken(tiny_base, answers, tmp_path / "out", eval_size=0)
    assert not (tmp_path / "out" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize(
    "wrong",
    [
        "--per_device_train_batch_size 0",
        "--learning_rate 0",
        "--optim sgdd",
        "--max_steps 0",
        "--lr_scheduler_type lineal",
        "--warmup_ratio 1.5",
        "--lora_dropout 1",
        "--train_subset 0",
        "--prompt_template x",
        "--sample_max_new_tokens -1",
        "--no_such_flag 1",
    ],
)
def test_wrong_flags_end_with_usage(wrong, capsys):
    with pytest.raises(SystemExit) as stopped:
        sft_training.parse_args(wrong.split())
    assert stopped.value.code == 2
    assert wrong.split()[0] in capsys.readouterr().err


def test_missing_and_empty_inputs_are_named_before_a_model_loads(tiny_base, answers, tmp_path, monkeypatch):
    monkeypatch.setattr(sft_training.loading, "load_base", None)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        run(tmp_path / "nowhere", answers, tmp_path / "a")
    with pytest.raises(FileNotFoundError, match=r"missing\.jsonl"):
        run(tiny_base, tmp_path / "missing.jsonl", tmp_path / "b")
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(ValueError, match="empty"):
        run(tiny_base, tmp_path / "empty.jsonl", tmp_path / "c")
    with pytest.raises(ValueError, match="no row to train on"):
        run(tiny_base, answers, tmp_path / "d", max_length=5)


def test_old_names_of_flags_parse():
    old = {"model_path": "B", "lora_rank": 4, "previous_lora_weights": "P", "optim": "adamw_hf"}
    args = sft_training.parse_args(words(old))
    assert (args.model_name, args.lora_rank, args.previous_lora_weights) == ("B", 4, "P")
    assert args.optim == "adamw_torch"


def test_inspect_data_prints_rows_and_trains_nothing(tiny_base, answers, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sft_training, "build_model", None)
    run(tiny_base, answers, tmp_path / "out", inspect_data=True)
    shown = capsys.readouterr().out
    assert "kept" in shown and "mask 0 0" in shown
    assert not (tmp_path / "out" / "metrics.jsonl").exists()


def test_rows_and_samples_use_one_template(tiny_base):
    tokenizer = load_tokenizer(tiny_base)
    row = sft_rows(
        text_format(tokenizer, "{prompt}|"), [{"prompt": "你好", "answer": "好。", "where": "x:1"}], 99, Funnel()
    )[0]
    query = encode(tokenizer, render("{prompt}|", "你好"))
    assert row["input_ids"][: len(query)] == query and row["completion_mask"][: len(query)] == [0] * len(query)
