"""Flags of the two Trainer stages (SFT, reward), and the TrainingArguments they make."""

from dataclasses import dataclass

import torch
from transformers import SchedulerType
from transformers.training_args import OptimizerNames

from rlhf.arguments import flag
from rlhf.roles import pick_dtype


@dataclass(kw_only=True)
class TrainerFlags:
    """Flags of both Trainer stages, under the names TrainingArguments has for them; defaults are the SFT stage's."""

    # ---- training ----
    num_train_epochs: float = flag(1.0, help="passes over the training rows", group="training")
    max_steps: int = flag(-1, help="optimizer steps in total; above 0 it overrides num_train_epochs", group="training")
    per_device_train_batch_size: int = flag(4, help="rows of a forward pass on each device", group="training")
    gradient_accumulation_steps: int = flag(1, help="forward passes an optimizer step", group="training")
    learning_rate: float = flag(1e-4, help="peak learning rate", group="training")
    lr_scheduler_type: str = flag("linear", help="schedule: linear, cosine, constant, ...", group="training")
    warmup_ratio: float = flag(0.0, help="share of the steps in which the rate rises from 0", group="training")
    weight_decay: float = flag(0.0, help="decoupled weight decay", group="training")
    max_grad_norm: float = flag(1.0, help="gradients are scaled down to this norm; 0 leaves them", group="training")
    optim: str = flag("adamw_torch", help="optimizer; adamw_hf of old means adamw_torch", group="training")
    adam_beta1: float = flag(0.9, help="of AdamW", group="training")
    adam_beta2: float = flag(0.999, help="of AdamW", group="training")
    adam_epsilon: float = flag(1e-8, help="of AdamW", group="training")
    # ---- data ----
    max_length: int = flag(512, help="tokens of query and answer; longer rows are dropped and counted", group="data")
    train_subset: int = flag(-1, help="training rows to use, drawn by the seed; -1: all", group="data")
    eval_subset: int = flag(-1, help="evaluation rows to use, drawn by the seed; -1: all", group="data")
    # ---- evaluation, saving, log ----
    per_device_eval_batch_size: int = flag(8, help="rows of a forward pass in evaluation", group="evaluation")
    eval_steps: int = flag(500, help="steps between evaluations; 0: at the end only", group="evaluation")
    save_steps: int = flag(500, help="steps between checkpoints; 0: none", group="artefacts")
    logging_steps: int = flag(10, help="steps between printed lines (metrics.jsonl has every step)")
    deepspeed: str | None = flag(
        None, help="DeepSpeed configuration (scripts/deepspeed/zero2.json); needs deepspeed", group="machine"
    )

    def __post_init__(self):
        if self.optim == "adamw_hf":
            self.optim = "adamw_torch"
        for name, known in (("optim", OptimizerNames), ("lr_scheduler_type", SchedulerType)):
            if getattr(self, name) not in list(known):
                raise ValueError(f"--{name} {getattr(self, name)} is unknown: use one of {', '.join(known)}")
        for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps",
                     "max_length", "logging_steps"):  # fmt: skip
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} {getattr(self, name)} must be at least 1")
        for name in ("eval_steps", "save_steps", "weight_decay", "max_grad_norm"):
            if getattr(self, name) < 0:
                raise ValueError(f"--{name} {getattr(self, name)} must not be negative")
        if not 0 <= self.warmup_ratio < 1:
            raise ValueError(f"--warmup_ratio {self.warmup_ratio} must be in [0, 1)")
        if self.learning_rate <= 0:
            raise ValueError(f"--learning_rate {self.learning_rate} must be above 0")
        if self.max_steps == 0 or self.max_steps < -1:
            raise ValueError(f"--max_steps {self.max_steps} must be at least 1, or -1 to go by num_train_epochs")
        if self.max_steps == -1 and self.num_train_epochs <= 0:
            raise ValueError(f"--num_train_epochs {self.num_train_epochs} must be above 0")
        for name in ("train_subset", "eval_subset"):
            if getattr(self, name) == 0 or getattr(self, name) < -1:
                raise ValueError(f"--{name} {getattr(self, name)} must be a number of rows, or -1 for all")


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
