"""Flags that several stages share: run, adapter, and the settings of transformers' Trainer."""

from dataclasses import dataclass

from rlhf.flags import Flags, flag
from rlhf.run.sharing import ShardFlags

# The names that transformers knows; written out, because importing them takes seconds that a wrong flag would wait.
SCHEDULES = (
    "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt",
    "reduce_lr_on_plateau", "cosine_with_min_lr", "cosine_warmup_with_min_lr", "warmup_stable_decay", "greedy",
)  # fmt: skip
OPTIMIZERS = (
    "adamw_torch", "adamw_torch_fused", "adamw_torch_xla", "adamw_torch_npu_fused", "adafactor", "adamw_anyprecision",
    "adamw_torch_4bit", "adamw_torch_8bit", "ademamix", "sgd", "adagrad", "adamw_bnb_8bit", "adamw_8bit",
    "ademamix_8bit", "lion_8bit", "lion_32bit", "paged_adamw_32bit", "paged_adamw_8bit", "paged_ademamix_32bit",
    "paged_ademamix_8bit", "paged_lion_32bit", "paged_lion_8bit", "rmsprop", "rmsprop_bnb", "rmsprop_bnb_8bit",
    "rmsprop_bnb_32bit", "galore_adamw", "galore_adamw_8bit", "galore_adafactor", "galore_adamw_layerwise",
    "galore_adamw_8bit_layerwise", "galore_adafactor_layerwise", "lomo", "adalomo", "grokadamw", "schedule_free_radam",
    "schedule_free_adamw", "schedule_free_sgd", "apollo_adamw", "apollo_adamw_layerwise", "stable_adamw",
)  # fmt: skip

# Each has its opener under the same name in rlhf/run/trackers.py, where all else is optional to install.
TRACKERS = ("wandb", "tensorboard", "swanlab")


@dataclass(kw_only=True)
class CommonArguments(ShardFlags):
    """Flags that mean the same in every training stage."""

    # ---- artefacts ----
    output_dir: str = flag(
        "runs/", help="directory for the adapter, run.json and metrics.jsonl", group="artefacts", resume="free"
    )
    overwrite_output_dir: bool = flag(
        False, help="clear what an earlier run left in output_dir", group="artefacts", resume="free"
    )
    # Text and no switch, because it takes a path as well: the spellings of a switch are sorted out below.
    resume_from_checkpoint: str | None = flag(
        None, help="True: go on from the newest complete checkpoint in output_dir, or start fresh; or the path of one",
        group="artefacts", resume="free",
    )  # fmt: skip
    allow_changes: bool = flag(
        False, help="resume although flags, data or processes differ; the rest of the run is then not exact",
        group="artefacts", resume="free", expert=True,
    )  # fmt: skip
    save_total_limit: int | None = flag(
        None, help="number of checkpoints to keep; none: all", group="artefacts", resume="free", expert=True
    )
    tokenizer_name: str | None = flag(
        None, help="tokenizer directory or hub id, if not the base's", group="artefacts", resume="path", expert=True
    )
    # ---- machine ----
    bf16: bool = flag(
        True, help="bfloat16 weights; fp16 on a card without it, float32 on a CPU", group="machine", expert=True
    )
    load_in_4bit: bool = flag(
        False, help="hold the base's matrices in 4 bits (NF4); needs bitsandbytes", group="machine"
    )
    gradient_checkpointing: bool = flag(False, help="recompute activations in backward: less memory", group="machine")
    # Free on a resume, for it only says who starts the processes: their number itself is in a checkpoint's manifest,
    # and is compared there.
    nproc: int = flag(
        0, help="processes to start; 0 means one for each visible GPU, one on a CPU", group="machine", resume="free"
    )
    # Older launchers append it to the command line, where argparse would refuse what it does not know.
    local_rank: int = flag(
        -1, help="set by launchers; LOCAL_RANK is what counts", group="machine", aliases=["--local-rank"],
        resume="free", expert=True,
    )  # fmt: skip
    # ---- run ----
    seed: int = flag(0, help="seed of everything random")
    log_with: str | None = flag(
        None, help="tracker beside metrics.jsonl: wandb, tensorboard or swanlab", resume="free"
    )
    on_non_finite: str = flag(
        "stop", help="when a loss, gradient or score is NaN or Inf: stop, or skip that step, unlearnt, and count it",
        choices=["stop", "skip"], expert=True,
    )  # fmt: skip
    inspect_data: bool = flag(False, help="print the data funnel and three rendered rows, then exit")
    plan: bool = flag(
        False,
        help="print memory, steps, hours and the cards that fit, from the configuration alone, then exit",
        resume="free",
    )
    device_flops: float = flag(
        0.0,
        help="your card's operations a second in half precision, in 1e12, for the hours of --plan; 0: by its name",
        group="machine",
        resume="free",
        expert=True,
    )

    link_gbps: float = flag(
        0.0,
        help="what a card receives from the others, in gigabits a second, for the seconds of --plan; 0: by its name",
        group="machine",
        resume="free",
        expert=True,
    )

    def __post_init__(self):
        # Spellings of no; the empty text is what a script makes of a variable that is not set.
        if self.resume_from_checkpoint in ("False", "false", "None", ""):
            self.resume_from_checkpoint = None

        # One spelling from here on: a resume asks for "True", and takes anything else for a path.
        if self.resume_from_checkpoint in ("true", "1"):
            self.resume_from_checkpoint = "True"

        if self.log_with in ("none", "None", ""):
            self.log_with = None

        # Here and not by `choices`, which would refuse "none".
        if self.log_with not in (None, *TRACKERS):
            raise ValueError(f"--log_with {self.log_with} is unknown: use {' or '.join(TRACKERS)}, or leave it out")

        if self.overwrite_output_dir and self.resume_from_checkpoint:
            raise ValueError("--overwrite_output_dir and --resume_from_checkpoint contradict each other: give one")

        if self.save_total_limit is not None and self.save_total_limit < 1:
            raise ValueError(f"--save_total_limit {self.save_total_limit} must be at least 1, or be left out")

        # numpy is seeded with it too, and takes 32 bits without a sign.
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"--seed {self.seed} must be from 0 to {2**32 - 1}")

        if self.device_flops < 0:
            raise ValueError(f"--device_flops {self.device_flops} must be 0, or what the card does in 1e12 a second")

        if self.link_gbps < 0:
            raise ValueError(f"--link_gbps {self.link_gbps} must be 0, or what a card receives in gigabits a second")

        if self.nproc < 0:
            raise ValueError(f"--nproc {self.nproc} is negative: give the number of processes, or 0 to have it found")

        # Each class checks its own flags and hands on: the last of the chain, `Flags`, looks at the numbers of all.
        super().__post_init__()


@dataclass(kw_only=True)
class LoraArguments(Flags):
    """Shape of a new adapter. The defaults are those of the SFT stage; the reward stage overrides them."""

    lora_rank: int = flag(8, help="rank r of the adapter", group="adapter", aliases=["--lora_r"])
    # The scale alpha / r is 4 at the defaults: whoever raises the rank alone lowers it, unless --use_rslora is on.
    lora_alpha: float = flag(32, help="alpha: the update is scaled by alpha / r", group="adapter")
    lora_target_models: str | None = flag(
        None,
        help="modules that get an adapter, as 'a|b', a regular expression, or all-linear for all linear layers of the "
        "decoder blocks; by default W_pack on Baichuan and all-linear elsewhere",
        group="adapter",
        aliases=["--lora_target_modules"],
    )
    # Kalajdzievski 2023, arXiv:2312.03732: under alpha / r the gradients of high ranks shrink as the rank grows.
    use_rslora: bool = flag(
        False, help="scale the update by alpha / sqrt(r), which keeps high ranks stable", group="adapter", expert=True
    )

    def __post_init__(self):
        if self.lora_rank < 1:
            raise ValueError(f"--lora_rank {self.lora_rank} must be at least 1")
        super().__post_init__()


@dataclass(kw_only=True)
class TrainerFlags(Flags):
    """Flags of both Trainer stages, under the names TrainingArguments has for them; defaults are the SFT stage's."""

    # ---- artefacts ----
    model_name: str = flag(
        "baichuan-inc/baichuan-7B", help="base: directory or hub id", group="artefacts",
        aliases=["--base_model_name", "--model_path", "--model_name_or_path"], resume="path",
    )  # fmt: skip
    # ---- adapter ----
    # Not among the flags of `LoraArguments`, which PPO has too: there a dropout would give the sampled tokens other
    # log-probabilities in the update, and the ratio would not start at 1.
    lora_dropout: float = flag(0.1, help="dropout on the adapter's input while training", group="adapter", expert=True)
    # ---- training ----
    # A resumed run may be longer only under a constant schedule: any other would have had other learning rates from
    # the first step on.
    num_train_epochs: float = flag(1.0, help="passes over the training rows", group="training", resume="longer")
    max_steps: int = flag(
        -1, help="optimizer steps in total; above 0 it overrides num_train_epochs", group="training", resume="longer"
    )
    per_device_train_batch_size: int = flag(4, help="rows per forward pass on each device", group="training")
    gradient_accumulation_steps: int = flag(1, help="forward passes per optimizer step", group="training")
    learning_rate: float = flag(1e-4, help="peak learning rate", group="training")
    lr_scheduler_type: str = flag(
        "linear", help="schedule: linear, cosine, constant, ...", group="training", expert=True
    )
    warmup_ratio: float = flag(
        0.0, help="share of the steps in which the learning rate rises from 0", group="training", expert=True
    )
    weight_decay: float = flag(0.0, help="decoupled weight decay", group="training", expert=True)
    max_grad_norm: float = flag(
        1.0, help="gradients are scaled down to this norm; 0 leaves them unscaled", group="training", expert=True
    )
    optim: str = flag(
        "adamw_torch", help="name of the optimizer; adamw_hf means adamw_torch", group="training", expert=True
    )
    adam_beta1: float = flag(0.9, help="AdamW's decay of the mean gradient", group="training", expert=True)
    adam_beta2: float = flag(0.999, help="AdamW's decay of the mean squared gradient", group="training", expert=True)
    adam_epsilon: float = flag(1e-8, help="AdamW's epsilon", group="training", expert=True)
    # ---- data ----
    max_length: int = flag(512, help="tokens of query and answer; longer rows are dropped and counted", group="data")
    train_subset: int = flag(-1, help="training rows to use, drawn by the seed; -1: all", group="data", expert=True)
    eval_subset: int = flag(-1, help="evaluation rows to use, drawn by the seed; -1: all", group="data", expert=True)
    # ---- evaluation, saving, log ----
    per_device_eval_batch_size: int = flag(
        8, help="rows per forward pass in evaluation", group="evaluation", resume="free", expert=True
    )
    # Which evaluations there are decides which of them is the best: a resumed run has to make the same ones.
    eval_steps: int = flag(500, help="steps between evaluations; 0: at the end only", group="evaluation")
    load_best: bool = flag(
        True, help="end with the adapter of the evaluation with the lowest loss, not the last one", group="evaluation"
    )
    early_stopping_patience: int = flag(
        0,
        help="end training after so many evaluations in a row without a lower loss; 0: never",
        group="evaluation",
        expert=True,
    )
    save_steps: int = flag(500, help="steps between checkpoints; 0: none", group="artefacts", resume="free")
    logging_steps: int = flag(
        10, help="steps between printed lines (metrics.jsonl has every step)", resume="free", expert=True
    )
    deepspeed: str | None = flag(
        None, help="DeepSpeed configuration (scripts/deepspeed/zero2.json); needs deepspeed",
        group="machine", resume="path", expert=True,
    )  # fmt: skip

    def __post_init__(self):
        # A name that transformers has dropped since the tutorial.
        if self.optim == "adamw_hf":
            self.optim = "adamw_torch"

        # Here and not by `choices`, for --help would then list some fifty names.
        for name, known in (("optim", OPTIMIZERS), ("lr_scheduler_type", SCHEDULES)):
            if getattr(self, name) not in known:
                raise ValueError(f"--{name} {getattr(self, name)} is unknown: use one of {', '.join(known)}")

        for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps",
                     "max_length", "logging_steps"):  # fmt: skip
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} {getattr(self, name)} must be at least 1")

        for name in ("eval_steps", "save_steps", "weight_decay", "max_grad_norm", "early_stopping_patience"):
            if getattr(self, name) < 0:
                raise ValueError(f"--{name} {getattr(self, name)} must not be negative")

        if self.early_stopping_patience and not self.load_best:
            raise ValueError("--early_stopping_patience waits for a better evaluation: it needs --load_best True")

        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"--lora_dropout {self.lora_dropout} must be in [0, 1)")

        # Handed on as `warmup_steps`, which transformers takes for a share below 1 and for a number of steps from
        # there on.
        if not 0 <= self.warmup_ratio < 1:
            raise ValueError(f"--warmup_ratio {self.warmup_ratio} must be in [0, 1)")

        # A rate above 1 is a slip of the hand, such as 1e5 for 1e-5.
        if not 0 < self.learning_rate <= 1:
            raise ValueError(f"--learning_rate {self.learning_rate} must be above 0 and at most 1")

        # -1 is transformers' own word for no limit.
        if self.max_steps == 0 or self.max_steps < -1:
            raise ValueError(f"--max_steps {self.max_steps} must be at least 1, or -1 to go by num_train_epochs")

        # With --max_steps the epochs count for nothing, whatever they are.
        if self.max_steps == -1 and self.num_train_epochs <= 0:
            raise ValueError(f"--num_train_epochs {self.num_train_epochs} must be above 0")

        for name in ("train_subset", "eval_subset"):
            if getattr(self, name) == 0 or getattr(self, name) < -1:
                raise ValueError(f"--{name} {getattr(self, name)} must be a number of rows, or -1 for all")

        super().__post_init__()
