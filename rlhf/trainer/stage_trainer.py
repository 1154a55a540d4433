"""Changes that stages 1 and 2 make to transformers' Trainer, and the TrainingArguments that the flags describe."""

import shutil
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from rlhf.artefacts.adapters import save_adapter
from rlhf.artefacts.checkpoint import complete_or_gone, why_incomplete
from rlhf.artefacts.damage import refuse_other_shapes, refused
from rlhf.artefacts.run_json import write_run
from rlhf.data.batches import LengthGroupedSampler
from rlhf.models.forward import forked_rng
from rlhf.models.loading import pick_dtype
from rlhf.models.shards import in_ddp, mesh_of
from rlhf.run.stopping import explain_out_of_memory
from rlhf.trainer.log import CHECKPOINT_PREFIX


def training_arguments(args, config_class, evaluates: bool, **extra):
    """Make transformers' TrainingArguments (or a subclass) from the flags.

    Args:
        args: the script's flags. config_class: TrainingArguments or SFTConfig.
        evaluates: whether there are evaluation rows. extra: fields of `config_class` on top.
    """
    # Flags that bear the name of the field they set.
    same_name = (
        "output_dir", "num_train_epochs", "max_steps", "per_device_train_batch_size", "per_device_eval_batch_size",
        "gradient_accumulation_steps", "learning_rate", "lr_scheduler_type", "weight_decay", "max_grad_norm", "optim",
        "adam_beta1", "adam_beta2", "adam_epsilon", "deepspeed", "seed",
    )  # fmt: skip
    dtype = pick_dtype(args.bf16)

    # What the flags say under other names, what the machine decides, and what is the same for every run.
    config = config_class(
        **{name: getattr(args, name) for name in same_name},
        # A number below 1 is a share of all steps.
        warmup_steps=args.warmup_ratio,
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        use_cpu=not torch.cuda.is_available(),
        activation_checkpointing=args.gradient_checkpointing,
        # With re-entrant checkpointing no gradient reaches adapters whose inputs, the frozen embeddings' outputs, need
        # none.
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
        # Trackers are fed by the log of the stage, under the names of metrics.jsonl.
        report_to=[],
        # The log prints a line a step instead, which a file can hold as well.
        disable_tqdm=True,
        log_level="error",
        dataloader_pin_memory=torch.cuda.is_available(),
        **extra,
    )

    # One process trains on one card: with --nproc 1 on a machine of several the Trainer would use DataParallel.
    config._n_gpu = min(1, config.n_gpu)
    return config


# What to do about a checkpoint that cannot be gone on from.
GO_BACK = "remove this checkpoint, and the run goes on from an earlier one"


# ---- the Trainer ----
class StageTrainer:
    """Mixin for the Trainer of a stage: our order of rows, complete checkpoints, out of memory in one sentence.

    Args:
        sampler: order of the training rows. about: what run.json says of the run (see `write_run`).
        best: a `BestEvaluation`, which decides what the final adapter is; the last step's without one.
    """

    def __init__(self, *args, sampler: LengthGroupedSampler, about: dict, best=None, **kwargs):
        self.sampler = sampler
        self.about = about
        self.best = best
        super().__init__(*args, callbacks=[best] if best else None, **kwargs)

    def training_step(self, model, inputs, *args, **kwargs):
        shape = inputs["input_ids"].shape
        with explain_out_of_memory("a training batch", shape, "--per_device_train_batch_size or --max_length"):
            return super().training_step(model, inputs, *args, **kwargs)

    def evaluate(self, *args, **kwargs):
        # An evaluation draws random numbers of its own: training goes on as if there had been none.
        with forked_rng():
            return super().evaluate(*args, **kwargs)

    def _move_model_to_device(self, model, device):
        # A base in shards was read to where it belongs.
        if mesh_of(model) is None:
            super()._move_model_to_device(model, device)

    def _wrap_model(self, model, training=True, dataloader=None):
        model = super()._wrap_model(model, training, dataloader)
        if not training or model is not self.model or mesh_of(model) is None or not self.accelerator.use_distributed:
            return model
        # accelerate wraps no base in shards: all that it does here is autocast.
        model = self.accelerator.prepare_model(model, evaluation_mode=True)
        return in_ddp(model, **self.accelerator.ddp_handler.to_kwargs())

    def floating_point_ops(self, inputs):
        """Return 0: nobody reads the count, and making it walks over all modules at every step."""
        return 0

    def _get_train_sampler(self, train_dataset=None):
        return self.sampler

    # The Trainer's own errors on a damaged checkpoint name no file.
    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        with refused(f"the adapter of {resume_from_checkpoint}"):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint):
        with refused(f"the optimizer state of {checkpoint}", GO_BACK):
            super()._load_optimizer_and_scheduler(checkpoint)
            if checkpoint is not None:
                refuse_other_shapes(self.optimizer)

    def _load_rng_state(self, checkpoint):
        with refused(f"the random state of {checkpoint}", GO_BACK):
            super()._load_rng_state(checkpoint)

    def _save_checkpoint(self, model, trial):
        """Let the Trainer write into an empty folder, which is removed if the writing fails."""
        folder = Path(self.args.output_dir) / f"{CHECKPOINT_PREFIX}{self.state.global_step}"
        if self.args.should_save and folder.is_dir() and why_incomplete(folder) is not None:
            # A killed run's leftovers would be listed as parts of this checkpoint.
            shutil.rmtree(folder)
        # The adapter and Adam's two moments of it.
        min_bytes = 3 * sum(p.nbytes for p in self.model.parameters() if p.requires_grad)
        with complete_or_gone(folder, min_bytes):
            super()._save_checkpoint(model, trial)
            if self.best is not None and self.args.should_save:
                self.best.save(folder)

    def _save(self, output_dir=None, state_dict=None):
        """Write adapter, tokenizer and run.json, but no pickled arguments beside them."""
        if self.args.should_save:
            folder = output_dir or self.args.output_dir
            # Under ZeRO-3 the model holds a piece of each weight here, and only `state_dict` has them whole.
            save_adapter(self.model, folder, state_dict=state_dict if is_zero3() else None)
            self.processing_class.save_pretrained(folder)
            write_run(folder, **self.about)


# ---- ZeRO-3 ----
def is_zero3() -> bool:
    """Return True if DeepSpeed spreads the weights over the processes: a forward then involves all of them."""
    return is_deepspeed_zero3_enabled()


@contextmanager
def gathered(model):
    """Let each process hold all trained weights within the block, which all processes have to enter."""
    if not is_zero3():
        yield
        return
    # Only installed where --deepspeed is used.
    import deepspeed

    with deepspeed.zero.GatheredParameters([p for p in model.parameters() if p.requires_grad]):
        yield
