"""Stage 2: a reward model, the base with LoRA and a score head, from (prompt, chosen, rejected) rows.

In:  a base model, preference rows.
Out: <output_dir>: the reward adapter with its score head, tokenizer files, run.json, metrics.jsonl, the audit (.json,
     .md, .png); checkpoint-<n>/.

    minimise  mean over pairs of -logsigmoid(score(query, chosen) - score(query, rejected))

    python reward_modeling.py --model_name baichuan-inc/baichuan-7B --lora_target_models W_pack \\
        --output_dir runs/reward
"""

from dataclasses import dataclass

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.nn.functional import logsigmoid
from transformers import EvalPrediction, PrinterCallback, Trainer, TrainerCallback, TrainingArguments, set_seed

from rlhf.arguments import CommonArguments, DataArguments, LoraArguments, TrainerFlags
from rlhf.artefacts.adapters import check_saved, save_adapter
from rlhf.artefacts.output_dir import claim_output_dir
from rlhf.artefacts.resume import finished_run
from rlhf.artefacts.run_json import base_fingerprint, write_run
from rlhf.cost.plan import plan_trainer
from rlhf.data.batches import LengthGroupedSampler
from rlhf.data.encoding import inspect_rows, load_tokenizer, preference_rows
from rlhf.data.funnel import one_half, subset
from rlhf.data.reading import data_fingerprint, load_splits
from rlhf.flags import flag, parse
from rlhf.models.forward import backbone_of, enable_packing, forked_rng
from rlhf.models.loading import load_base, lora_targets, pick_dtype, resolve_model
from rlhf.reward.audit_report import audit_adapter, audit_model
from rlhf.reward.degenerate import degenerate_pairs, kinds_of
from rlhf.reward.pairs import (
    PairCollator,
    SharedPromptCollator,
    blank_pair,
    check_shareable,
    pair_length,
    score_by_mask,
    shared_length,
)
from rlhf.run.launch import rank_and_size, require_optional, run_script, say
from rlhf.run.log import read_metrics
from rlhf.run.stopping import explain_out_of_memory
from rlhf.trainer.log import StageLog, announce_batches, open_log
from rlhf.trainer.stage_trainer import (
    gathered,
    is_zero3,
    save_checkpoint,
    training_arguments,
    writing_checkpoint,
)
from rlhf.trainer.training import bad_rows_file, end, final_evaluation, resume_point, train


@dataclass(kw_only=True)
class ScriptArguments(CommonArguments, LoraArguments, DataArguments, TrainerFlags):
    """Flags of reward_modeling.py, with the tutorial's defaults."""

    # ---- artefacts ----
    model_name: str = flag(
        "baichuan-inc/baichuan-7B",
        help="base: directory or hub id",
        group="artefacts",
        aliases=["--base_model_name", "--model_path", "--model_name_or_path"],
    )
    output_dir: str = flag("runs/reward", help="where the adapter, run.json and metrics.jsonl go", group="artefacts")
    # ---- adapter ----
    lora_rank: int = flag(4, help="rank r of the adapter", group="adapter", aliases=["--lora_r"])
    # ---- data ----
    train_subset: int = flag(100000, help="training pairs to use, drawn by the seed; -1: all", group="data")
    eval_subset: int = flag(50000, help="evaluation pairs to use, drawn by the seed; -1: all", group="data")
    max_length: int = flag(
        512, help="tokens of query and answer; pairs with a longer side are dropped and counted", group="data"
    )
    split_half: int | None = flag(
        None, help="0 or 1: train on one half of the prompts only, so that another model can judge", group="data"
    )
    margin_field: str | None = flag(
        None, help="column with how much better the chosen answer is: the loss asks for that margin", group="data"
    )
    degenerate_frac: float = flag(
        0.0,
        help="hardening: further training pairs against degenerate answers, as a share of the data's",
        group="data",
    )
    degenerate_kinds: str = flag("all", help="of them, as 'eos_only|cut|...' (rlhf/degenerate.py)", group="data")
    # ---- audit ----
    audit: bool = flag(True, help="attack the trained model on held-out prompts: audit.json, .md, .png", group="audit")
    audit_prompts: int = flag(200, help="held-out prompts that are attacked, at most", group="audit")
    audit_only: bool = flag(False, help="train nothing: audit --reward_model_lora_path and write there", group="audit")
    reward_model_lora_path: str | None = flag(None, help="reward adapter, for --audit_only", group="audit")
    # ---- loss ----
    label_smoothing: float = flag(0.0, help="share of pairs taken to be the wrong way round", group="loss")
    center_rewards_coefficient: float = flag(
        0.0, help="weight of the squared sum of a pair's scores, which keeps scores round 0", group="loss"
    )
    # ---- training ----
    share_prompt: bool = flag(
        False, help="one sequence a pair, its prompt computed once: pays where prompts are long", group="training"
    )
    per_device_train_batch_size: int = flag(4, help="pairs of a forward pass on each device", group="training")
    learning_rate: float = flag(2e-5, help="peak learning rate", group="training")
    weight_decay: float = flag(0.001, help="decoupled weight decay", group="training")
    # ---- evaluation ----
    per_device_eval_batch_size: int = flag(1, help="pairs of a forward pass in evaluation", group="evaluation")
    eval_first_step: bool = flag(False, help="evaluate after the first step too", group="evaluation")

    def __post_init__(self):
        for part in (CommonArguments, LoraArguments, DataArguments, TrainerFlags):
            part.__post_init__(self)
        if self.split_half not in (None, 0, 1):
            raise ValueError(f"--split_half {self.split_half} must be 0 or 1, or be left out")
        kinds_of(self.degenerate_kinds)
        if self.degenerate_frac < 0:
            raise ValueError(f"--degenerate_frac {self.degenerate_frac} must not be negative")
        if self.audit_only != bool(self.reward_model_lora_path):
            raise ValueError("--audit_only True and --reward_model_lora_path belong together: give both or neither")
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(f"--label_smoothing {self.label_smoothing} must be in [0, 0.5)")
        if self.center_rewards_coefficient < 0:
            raise ValueError(f"--center_rewards_coefficient {self.center_rewards_coefficient} must not be negative")


def parse_args(argv: list[str] | None = None) -> ScriptArguments:
    """The command line, checked; a wrong one ends the program with exit code 2."""
    return parse(ScriptArguments, argv, __doc__)


# ---- data ----
def load_data(args: ScriptArguments, tokenizer) -> tuple[list[dict], list[dict], dict]:
    """Encoded training and evaluation pairs, both answers ending with EOS, and what run.json says of the data."""
    texts, eval_texts, funnel = load_splits(args, "preference", args.seed, bad_rows_file(args))
    if args.split_half is not None:
        texts = one_half(texts, args.split_half, funnel)
    texts = subset(texts, args.train_subset, args.seed, funnel)
    eval_texts = subset(eval_texts, args.eval_subset, args.seed, funnel)
    rows = preference_rows(tokenizer, texts, args.prompt_template, args.max_length, funnel)
    eval_rows = preference_rows(tokenizer, eval_texts, args.prompt_template, args.max_length, funnel)
    rows += degenerate_pairs(
        rows, args.degenerate_frac, kinds_of(args.degenerate_kinds), tokenizer, args.prompt_template,
        args.max_length, args.seed, funnel,
    )  # fmt: skip
    # Their order changes no result, and pairs of like length share a batch.
    eval_rows.sort(key=pair_length)
    if args.inspect_data:
        inspect_rows(tokenizer, rows, funnel)
    else:
        say(funnel.table())
    if not rows:
        raise ValueError(f"{args.dataset_name} leaves no pair to train on: {funnel.summary()}")
    about = {"fingerprint": data_fingerprint(texts), "rows": len(rows), "eval_rows": len(eval_rows)}
    return rows, eval_rows, about | {"funnel": funnel.as_dict()}


# ---- model ----
def build_model(args: ScriptArguments, model_dir: str) -> PeftModel:
    """The base with a score head [hidden] -> [1] and an adapter; both are trained, and saved together."""
    set_seed(args.seed)
    model = load_base(model_dir, pick_dtype(args.bf16), head="score", four_bit=args.load_in_4bit)
    if not isinstance(getattr(model, "score", None), torch.nn.Linear):
        raise ValueError(f"{type(model).__name__} has no linear layer called score: this architecture cannot be used")
    model.score.float()
    score_by_mask(model)
    if not args.share_prompt:
        enable_packing(backbone_of(model))
    config = LoraConfig(
        # peft puts the score head among `modules_to_save` for this task type.
        task_type="SEQ_CLS",
        r=args.lora_rank,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        target_modules=lora_targets(model, args.lora_target_models),
    )
    return get_peft_model(model, config)


# ---- loss and metrics ----
def pairwise_loss(
    chosen: torch.Tensor,
    rejected: torch.Tensor,
    margin: torch.Tensor | float = 0.0,
    label_smoothing: float = 0.0,
    center_rewards_coefficient: float = 0.0,
    mask: torch.Tensor | None = None,
    n_pairs: torch.Tensor | None = None,
) -> torch.Tensor:
    """Mean over pairs of how unlikely the preference is, and of how far a pair's scores are from 0.

        d = chosen - rejected - margin
        loss = mean(-(1 - e) * logsigmoid(d) - e * logsigmoid(-d) + c * (chosen + rejected)^2)

    Args:
        chosen, rejected: [P] float32 scores. margin: [P], what d has to reach before the loss is small.
        label_smoothing: e, the share of pairs that are the wrong way round. center_rewards_coefficient: c.
        mask: [P] bool, True on real pairs; without it all are. n_pairs: replaces their number as denominator.
    Source: Bradley and Terry 1952; Ouyang et al. 2022, arXiv:2203.02155, equation 1; margin: Touvron et al. 2023,
        arXiv:2307.09288, equation 2; centring: Eisenstein et al. 2023, arXiv:2312.09244.
    """
    d = chosen - rejected - margin
    loss = -(1 - label_smoothing) * logsigmoid(d) - label_smoothing * logsigmoid(-d)
    loss = loss + center_rewards_coefficient * (chosen + rejected).square()
    if mask is not None:
        loss = loss[mask]
    return loss.sum() / (len(loss) if n_pairs is None else n_pairs)


def pair_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Metrics over all evaluation pairs, from their scores [N, 2] (chosen, rejected).

    Returns: loss, without any of the options of training; accuracy (a tie counts as wrong); margin (mean of chosen -
    rejected); mean and std of either side; score_std over both.
    """
    scores = prediction.predictions.astype("float64")
    margins = scores[:, 0] - scores[:, 1]
    return {
        "loss": np.logaddexp(0, -margins).mean(),
        "accuracy": (margins > 0).mean(),
        "margin": margins.mean(),
        "chosen_mean": scores[:, 0].mean(),
        "chosen_std": scores[:, 0].std(),
        "rejected_mean": scores[:, 1].mean(),
        "rejected_std": scores[:, 1].std(),
        "score_std": scores.std(),
    }


# ---- training ----
class RewardTrainer(Trainer):
    """transformers' Trainer with the pairwise loss; chosen and rejected answers go through one forward."""

    # The loss is divided by the pairs of all accumulated batches on all processes, so not once more by the Trainer.
    loss_is_scaled_for_ga = True

    def __init__(self, *args, sampler: LengthGroupedSampler, loss_options: dict[str, float], about: dict, **kwargs):
        self.sampler, self.loss_options, self.about = sampler, loss_options, about
        super().__init__(*args, **kwargs)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        # Either collator's batch gives the scores of the P chosen answers first, then those of the P rejected ones.
        margin, mask = inputs.pop("margin", 0.0), inputs.pop("mask", None)
        chosen, rejected = model(**inputs).logits.chunk(2)
        loss = pairwise_loss(chosen, rejected, margin, **self.loss_options, mask=mask, n_pairs=num_items_in_batch)
        if num_items_in_batch is not None:
            # DistributedDataParallel averages the gradients over the processes, whose sums these are.
            loss = loss * self.accelerator.num_processes
        return (loss, torch.stack([chosen, rejected], dim=1)) if return_outputs else loss

    def _get_num_items_in_batch(self, batch_samples, device):
        """[] long: real pairs of an optimizer step, over all its accumulated batches and all processes."""
        pairs = sum(len(batch["input_ids"]) // (1 if "segments" in batch else 2) for batch in batch_samples)
        blank = sum(int((~batch["mask"]).sum()) for batch in batch_samples if "mask" in batch)
        return self.accelerator.gather(torch.tensor(pairs - blank, device=device)).sum()

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Scores [P, 2] of each pair; `pair_metrics` makes the loss of them, so that no pair counts twice."""
        with torch.no_grad(), self.compute_loss_context_manager():
            _, scores = self.compute_loss(model, self._prepare_inputs(inputs), return_outputs=True)
        # The Trainer computes metrics only where there are labels: these are not read.
        return None, scores, scores[:, 0]

    def training_step(self, model, inputs, *args, **kwargs):
        shape = inputs["input_ids"].shape
        with explain_out_of_memory("a training batch", shape, "--per_device_train_batch_size or --max_length"):
            return super().training_step(model, inputs, *args, **kwargs)

    def _get_train_sampler(self, train_dataset=None):
        return self.sampler

    def evaluate(self, *args, **kwargs):
        with forked_rng():
            return super().evaluate(*args, **kwargs)

    def _save_checkpoint(self, model, trial):
        with writing_checkpoint(self):
            super()._save_checkpoint(model, trial)

    def _save(self, output_dir=None, state_dict=None):
        save_checkpoint(self, output_dir, state_dict)

    def floating_point_ops(self, inputs):
        """0: nobody reads the count, and making it walks over all modules at every step."""
        return 0


class EvaluateFirstStep(TrainerCallback):
    """--eval_first_step."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 1:
            control.should_evaluate = True


def build_trainer(args: ScriptArguments, model, about: dict, rows: list[dict], eval_rows: list[dict], log: StageLog):
    """RewardTrainer on encoded pairs, in batches of like length; `about` is what run.json says of the run."""
    tokenizer, callbacks = about["tokenizer"], [log]
    if args.eval_first_step and eval_rows:
        callbacks.append(EvaluateFirstStep())
    trainer = RewardTrainer(
        model,
        training_arguments(args, TrainingArguments, bool(eval_rows), remove_unused_columns=False),
        sampler=log.sampler,
        about=about,
        loss_options={name: getattr(args, name) for name in ("label_smoothing", "center_rewards_coefficient")},
        train_dataset=rows + [blank_pair(tokenizer.eos_token_id)] * bool(log.sampler.blanks),
        eval_dataset=eval_rows or None,
        data_collator=(SharedPromptCollator if args.share_prompt else PairCollator)(tokenizer.pad_token_id),
        processing_class=tokenizer,
        compute_metrics=pair_metrics,
        callbacks=callbacks,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def last_metrics(args: ScriptArguments) -> dict[str, float]:
    """The last evaluation in metrics.jsonl; empty without evaluation pairs."""
    found = [record for record in read_metrics(args.output_dir) if "eval_loss" in record]
    return {name: value for name, value in found[-1].items() if name != "step"} if found else {}


def main(args: ScriptArguments) -> None:
    """Data, model, training, evaluation, adapter with its score head, audit."""
    if args.plan:
        print(plan_trainer(args, "reward_modeling.py", sides=2))
        return
    require_optional(args)
    if not (args.inspect_data or args.audit_only) and finished_run(args, "reward"):
        say(f"{args.output_dir} is finished: --overwrite_output_dir True trains it again")
        return
    model_dir = resolve_model(args.model_name)
    tokenizer = load_tokenizer(args.tokenizer_name or model_dir)
    base = base_fingerprint(model_dir)
    if args.audit_only:
        audit_adapter(args, model_dir, tokenizer, base, load_data(args, tokenizer)[1])
        return
    if rank_and_size()[0] == 0 and not args.inspect_data:
        claim_output_dir(args.output_dir, bool(args.resume_from_checkpoint), args.overwrite_output_dir)
    rows, eval_rows, about_data = load_data(args, tokenizer)
    if args.inspect_data:
        return
    announce_batches(args, len(rows), "pairs")
    about = {
        "stage": "reward", "args": args, "base": base, "tokenizer": tokenizer, "template": args.prompt_template,
        "data": about_data,
    }  # fmt: skip
    resume_from = resume_point(args, about)
    model = build_model(args, model_dir)
    file = open_log(args, resume_from)
    lengths = [shared_length(row) if args.share_prompt else pair_length(row) for row in rows]
    processes = rank_and_size()[1]
    sampler = LengthGroupedSampler(
        lengths, args.per_device_train_batch_size * processes, args.seed, filled=processes > 1
    )
    log = StageLog(file, args, sampler, sequences=2)
    trainer = build_trainer(args, model, about, rows, eval_rows, log)
    if args.share_prompt:
        check_shareable(backbone_of(model.get_base_model()), max(rows, key=shared_length), tokenizer.pad_token_id)
    train(trainer, resume_from, log)
    if eval_rows:
        final_evaluation(trainer)
    with gathered(model):
        if file is not None:
            finish(args, model, about, eval_rows)
            file.close()
    end(trainer)


def finish(args: ScriptArguments, model: PeftModel, about: dict, eval_rows: list[dict]) -> None:
    """Tokenizer, adapter, audit, and last of all run.json, which says that the stage is done."""
    about["tokenizer"].save_pretrained(args.output_dir)
    save_adapter(model, args.output_dir)
    check_saved(model, args.output_dir)
    metrics = last_metrics(args)
    shown = ", ".join(f"{name} {value:.4f}" for name, value in metrics.items())
    if args.audit and is_zero3():
        say(f"no audit: under ZeRO-3 one process alone cannot make it; --audit_only True does, of {args.output_dir}")
    elif args.audit and eval_rows:
        inner = model.get_base_model()
        metrics |= audit_model(args, backbone_of(inner), inner.score, about["tokenizer"], eval_rows, args.output_dir)
    write_run(args.output_dir, **about, metrics=metrics)
    say(f"reward adapter in {args.output_dir}" + (f": {shown}" if shown else ""))


if __name__ == "__main__":
    run_script(main, parse_args)
