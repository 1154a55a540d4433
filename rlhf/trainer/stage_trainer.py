"""Changes that stages 1 and 2 make to transformers' Trainer, and the TrainingArguments that the flags describe."""

import shutil
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from rlhf.artefacts.adapters import save_adapter
from rlhf.artefacts.checkpoint import complete_or_gone, why_incomplete
from rlhf.artefacts.run_json import write_run
from rlhf.models.loading import pick_dtype
from rlhf.trainer.log import CHECKPOINT_PREFIX


def training_arguments(args, config_class, evaluates: bool, **extra):
    """transformers' TrainingArguments (or a subclass) as our flags say.

    Args:
        args: the script's flags. config_class: TrainingArguments or SFTConfig.
        evaluates: whether there are evaluation rows. extra: fields of `config_class` on top.
    """
    dtype = pick_dtype(args.bf16)
    same_name = (
        "output_dir", "num_train_epochs", "max_steps", "per_device_train_batch_size", "per_device_eval_batch_size",
        "gradient_accumulation_steps", "learning_rate", "lr_scheduler_type", "weight_decay", "max_grad_norm", "optim",
        "adam_beta1", "adam_beta2", "adam_epsilon", "deepspeed", "seed",
    )  # fmt: skip
    config = config_class(
        **{name: getattr(args, name) for name in same_name},
        warmup_steps=args.warmup_ratio,
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        use_cpu=not torch.cuda.is_available(),
        activation_checkpointing=args.gradient_checkpointing,
        activation_checkpointing_kwargs={"use_reentrant": False},
        # Every adapter weight takes part in every step, so DDP need not search the graph for unused ones.
        ddp_find_unused_parameters=False,
        eval_strategy="steps" if evaluates and args.eval_steps else "no",
        eval_steps=args.eval_steps or None,
        save_strategy="steps" if args.save_steps else "no",
        save_steps=args.save_steps or 500,
        # One record a step; StageLog prints every --logging_steps of them and feeds the tracker.
        logging_steps=1,
        # A NaN must be seen: the Trainer would otherwise log the mean of the losses before it.
        logging_nan_inf_filter=False,
        include_num_input_tokens_seen="non_padding",
        report_to=[],
        disable_tqdm=True,
        log_level="error",
        dataloader_pin_memory=torch.cuda.is_available(),
        **extra,
    )
    # One process trains on one card: with --nproc 1 on a machine of several the Trainer would use DataParallel.
    config._n_gpu = min(1, config.n_gpu)
    return config


# ---- weights in pieces ----
def is_zero3() -> bool:
    """Whether DeepSpeed spreads the weights over the processes (ZeRO-3): a forward is then a matter of all of them."""
    return is_deepspeed_zero3_enabled()


@contextmanager
def gathered(model):
    """Within the block, which all processes have to enter, each of them holds all of what is trained."""
    if not is_zero3():
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters([p for p in model.parameters() if p.requires_grad]):
        yield


# ---- while training ----
def save_checkpoint(trainer, output_dir: str | None, state_dict: dict | None) -> None:
    """What a Trainer stage writes of its model: adapter, tokenizer and run.json, no pickled arguments beside them."""
    if trainer.args.should_save:
        folder = output_dir or trainer.args.output_dir
        save_adapter(trainer.model, folder, state_dict=state_dict if is_zero3() else None)
        trainer.processing_class.save_pretrained(folder)
        write_run(folder, **trainer.about)


@contextmanager
def writing_checkpoint(trainer):
    """Where the Trainer writes its next checkpoint in place: the folder is empty before, and gone after a failure."""
    folder = Path(trainer.args.output_dir) / f"{CHECKPOINT_PREFIX}{trainer.state.global_step}"
    if trainer.args.should_save and folder.is_dir() and why_incomplete(folder) is not None:
        # A killed run's leftovers would be listed as parts of this checkpoint.
        shutil.rmtree(folder)
    # The adapter and Adam's two moments of it.
    min_bytes = 3 * sum(p.nbytes for p in trainer.model.parameters() if p.requires_grad)
    with complete_or_gone(folder, min_bytes):
        yield
