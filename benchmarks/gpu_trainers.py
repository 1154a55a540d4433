"""Supervised rows of benchmarks/gpu_7b.py: a step of SFT and of reward training, as the stages build and run them."""

import tempfile
from functools import partial
from importlib.util import find_spec

import torch
from torch.nn.functional import cross_entropy
from transformers import PrinterCallback, Trainer, TrainingArguments

import reward_modeling
from benchmarks.common import TRAINING
from benchmarks.gpu_measure import Bench, Meter, Row, Ticks
from benchmarks.gpu_workload import adapted, pair_rows, random_model, sft_rows
from benchmarks.model import PAD, tokenizer
from rlhf.arguments import LoraArguments, TrainerFlags
from rlhf.cost.flops import flop_counts, training_flops
from rlhf.cost.limits import Cost, Rows
from rlhf.data.batches import LengthGroupedSampler
from rlhf.models.forward import forward
from rlhf.reward.pairs import PairCollator, SharedPromptCollator


def trainer_settings(bench: Bench, config_class: type, folder: str, rows: Rows, **extra):
    """Arguments of any trainer here, of type `config_class`."""
    # Checkpointing is turned on at the model, by a name that all versions of transformers know.
    config = config_class(**TRAINING | {
        "output_dir": folder, "per_device_train_batch_size": rows.count, "use_cpu": bench.args.device == "cpu",
        "bf16": bench.dtype == torch.bfloat16, "fp16": bench.dtype == torch.float16, "gradient_checkpointing": False,
    }, **extra)  # fmt: skip
    # One process trains on one card: on a machine of several the Trainer would use DataParallel.
    config._n_gpu = min(1, config.n_gpu)
    return config


def timed_training(bench: Bench, trainer: Trainer) -> tuple[float, float]:
    """Seconds of a step and peak memory of a trainer's own loop."""
    meter = Meter(bench.args.device)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Ticks(meter))
    trainer.train()
    # One reading a step: a step lasts from one reading to the next.
    return meter.spans(0, 1, 1)


# ---- SFT ----
def supervised(bench: Bench, checkpointing: bool) -> list[Row]:
    """A step of SFT; its output layer counts at the places of answer tokens."""
    rows = bench.shape.sft
    torch.manual_seed(0)
    base = random_model(bench.shape.config(), "causal", bench.args.device, bench.dtype)
    model = adapted(base, LoraArguments.lora_rank, dropout=TrainerFlags.lora_dropout)
    if checkpointing:
        base.activation_checkpointing_enable({"use_reentrant": False})

    # The stage's trainer is one of trl's; on a machine without trl the row says that it was not measured with it.
    ours = find_spec("trl") is not None and find_spec("datasets") is not None
    encoded = sft_rows(rows, bench.all_steps * rows.count, base.config.vocab_size)
    train = supervised_by_trainer if ours else supervised_by_hand
    seconds, peak = train(bench, model, encoded)

    lengths = [rows.query + rows.answer] * rows.count
    work = flop_counts(model, base.config)
    flops = training_flops(work, lengths, rows.count * rows.answer, checkpointing)
    name = f"SFT {rows.count} x {lengths[0]}"
    if checkpointing:
        name += ", checkpointing"
    if not ours:
        name += " (no trl)"
    return [Row(name, seconds, rows.count, sum(lengths), peak, Cost.of(flops))]


def supervised_by_trainer(bench: Bench, model, encoded: list[dict]) -> tuple[float, float]:
    """Seconds of a step and peak memory of SupervisedTrainer, set up as sft_training.build_trainer does it."""
    # Optional packages, and a stage that imports them.
    from datasets import Dataset, disable_progress_bars
    from trl import SFTConfig

    import sft_training

    disable_progress_bars()
    rows = bench.shape.sft
    lengths = [rows.query + rows.answer] * len(encoded)
    with tempfile.TemporaryDirectory() as folder:
        trainer = sft_training.SupervisedTrainer(
            model,
            trainer_settings(bench, SFTConfig, folder, rows, completion_only_loss=True, max_length=None),
            sampler=LengthGroupedSampler(lengths, rows.count, 0),
            about={},
            train_dataset=Dataset.from_list(encoded),
            processing_class=tokenizer(),
        )
        return timed_training(bench, trainer)


def supervised_by_hand(bench: Bench, model, encoded: list[dict]) -> tuple[float, float]:
    """Seconds of a step and peak memory without trl: cross-entropy, autocast and AdamW as the Trainer has them."""
    rows = bench.shape.sft
    device = bench.args.device
    meter = Meter(device)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=TRAINING["learning_rate"], fused=device == "cuda")
    autocast = partial(torch.autocast, device, bench.dtype, enabled=bench.dtype != torch.float32)
    model.train()
    meter.read()

    # The logits at a place are of the token after it: those of the answer begin one place before it.
    places = (slice(None), slice(rows.query - 1, -1))
    for start in range(0, len(encoded), rows.count):
        batch = encoded[start : start + rows.count]
        ids = torch.tensor([row["input_ids"] for row in batch], device=device)
        with autocast():
            logits, _ = forward(model.get_base_model(), places, ids, use_cache=False)
            loss = cross_entropy(logits.flatten(0, 1).float(), ids[:, rows.query :].flatten())

        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        meter.read()
    return meter.spans(0, 1, 1)


# ---- reward model ----
def reward(bench: Bench, share_prompt: bool) -> list[Row]:
    """A step of reward training, as reward_modeling builds and runs it."""
    rows = bench.shape.reward
    args = reward_modeling.parse_args([])
    with bench.base():
        model = reward_modeling.build_model(args, "random")

    # With a shared prompt the query of a pair goes through the model once, so lengths and batches are others.
    pairs = pair_rows(rows, bench.all_steps * rows.count, model.config.vocab_size)
    length = reward_modeling.pairs.shared_length if share_prompt else reward_modeling.pairs.pair_length
    collator = SharedPromptCollator if share_prompt else PairCollator
    lengths = [length(pair) for pair in pairs]

    with tempfile.TemporaryDirectory() as folder:
        trainer = reward_modeling.RewardTrainer(
            model,
            trainer_settings(bench, TrainingArguments, folder, rows, remove_unused_columns=False),
            sampler=LengthGroupedSampler(lengths, rows.count, 0),
            loss_options={},
            about={},
            train_dataset=pairs,
            data_collator=collator(PAD),
        )
        seconds, peak = timed_training(bench, trainer)

    # Only what is computed counts as work: a shared query is computed once.
    whole = rows.query + rows.answer
    work = flop_counts(model, model.config)
    flops = training_flops(work, [whole] * (2 * rows.count), 0, checkpointing=False)
    tokens = rows.count * 2 * whole
    name = f"reward {rows.count} x 2 x {whole}"
    if share_prompt:
        flops -= training_flops(work, [rows.query] * rows.count, 0, checkpointing=False)
        tokens -= rows.count * rows.query
        name += ", shared prompt"
    return [Row(name, seconds, rows.count, tokens, peak, Cost.of(flops), bench.target(rate=15))]
