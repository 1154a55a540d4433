"""Stage 2: a reward model, the base with LoRA and a score head, from (prompt, chosen, rejected) rows.

In:  a base model, preference rows.
Out: <output_dir>: the reward adapter with its score head, tokenizer files, run.json, metrics.jsonl, the audit (.json,
     .md, .png); checkpoint-<n>/.

    minimise  mean over pairs of -logsigmoid(score(query, chosen) - score(query, rejected))

    python reward_modeling.py --model_name baichuan-inc/baichuan-7B --lora_target_models W_pack \\
        --output_dir runs/reward
"""

from dataclasses import dataclass
from pathlib import Path

from rlhf.arguments import CommonArguments, LoraArguments, TrainerFlags
from rlhf.data.arguments import DataArguments
from rlhf.flags import flag, parse
from rlhf.reward.arguments import AuditFlags, LossFlags, PairFlags
from rlhf.reward.best_of_flags import BestOfFlags
from rlhf.run import startup


@dataclass(kw_only=True)
class ScriptArguments(
    CommonArguments, LoraArguments, DataArguments, TrainerFlags, PairFlags, AuditFlags, BestOfFlags, LossFlags
):
    """Flags of reward_modeling.py, with the tutorial's defaults."""

    # ---- artefacts ----
    output_dir: str = flag(
        "runs/reward", help="directory for the adapter, run.json and metrics.jsonl", group="artefacts", resume="free"
    )
    # ---- adapter ----
    lora_rank: int = flag(4, help="rank r of the adapter", group="adapter", aliases=["--lora_r"])
    # ---- data ----
    train_subset: int = flag(
        100000, help="training pairs to use, drawn by the seed; -1: all", group="data", expert=True
    )
    eval_subset: int = flag(
        50000, help="evaluation pairs to use, drawn by the seed; -1: all", group="data", expert=True
    )
    max_length: int = flag(
        512, help="tokens of query and answer; pairs with a longer side are dropped and counted", group="data"
    )
    # ---- training ----
    per_device_train_batch_size: int = flag(4, help="pairs per forward pass on each device", group="training")
    learning_rate: float = flag(2e-5, help="peak learning rate", group="training")
    weight_decay: float = flag(0.001, help="decoupled weight decay", group="training", expert=True)
    # ---- evaluation ----
    per_device_eval_batch_size: int = flag(
        1, help="pairs per forward pass in evaluation", group="evaluation", resume="free", expert=True
    )
    eval_first_step: bool = flag(False, help="evaluate after the first step too", group="evaluation", expert=True)


def parse_args(argv: list[str] | None = None) -> ScriptArguments:
    """Parse and check the command line; a wrong one ends the program with exit code 2."""
    return parse(ScriptArguments, argv, __doc__)


# A wrong flag, --help and Ctrl-C end here: the libraries below take seconds to load.
if __name__ == "__main__":
    given = startup.begin(parse_args)

import numpy as np
import torch
from peft import PeftModel
from torch.nn.functional import logsigmoid
from transformers import EvalPrediction, PrinterCallback, Trainer, TrainerCallback, TrainingArguments, set_seed

from rlhf.artefacts import adapters, fingerprints, output_dir, run_json
from rlhf.cost import plan
from rlhf.data import encoding, reading
from rlhf.data.batches import LengthGroupedSampler
from rlhf.data.cache import Prepared
from rlhf.data.choose_format import choose_format
from rlhf.data.funnel import one_fold, one_half, subset
from rlhf.data.prompt_format import PromptFormat
from rlhf.data.rows import Rows
from rlhf.models import forward, loading, lora
from rlhf.page import report
from rlhf.reward import audit_only, audit_report, bad_answers, benchmark, closing, degenerate, pairs
from rlhf.run import launch
from rlhf.trainer import best, stage_trainer, training
from rlhf.trainer.log import StageLog, announce_batches, open_log


# ---- data ----
def prepare(args: ScriptArguments, prompt_format: PromptFormat, bad_rows_file: Path | None) -> Prepared:
    """Read, draw and encode the pairs, answers with their stop token."""
    texts, eval_texts, funnel = reading.load_splits(args, "preference", args.seed, bad_rows_file)

    # 1. Draw rows, before any is encoded.
    if args.split_half is not None:
        texts = one_half(texts, args.split_half, funnel)
    if args.fold is not None:
        texts = one_fold(texts, *args.fold_numbers, funnel)
    texts = subset(texts, args.train_subset, args.seed, funnel)
    eval_texts = subset(eval_texts, args.eval_subset, args.seed, funnel)

    # 2. Encode; hardening needs the ids of the real answers.
    rows = encoding.preference_rows(prompt_format, texts, args.max_length, funnel)
    eval_rows = encoding.preference_rows(prompt_format, eval_texts, args.max_length, funnel)
    kinds = degenerate.kinds_of(args.degenerate_kinds)
    rows = rows + degenerate.degenerate_pairs(
        rows, args.degenerate_frac, kinds, prompt_format, args.max_length, args.seed, funnel
    )
    # The order of evaluation pairs changes no result, and pairs of like length share a batch.
    eval_rows = eval_rows.select(pairs.pair_lengths(eval_rows).argsort(kind="stable"))
    return Prepared({"train": rows, "evaluation": eval_rows}, funnel, reading.fingerprints(texts, eval_texts))


def load_data(args: ScriptArguments, prompt_format: PromptFormat) -> tuple[Rows, Rows, dict]:
    """Encoded training and evaluation pairs, and what run.json says of the data."""
    dataset = training.load_prepared(args, prompt_format, prepare, "pair")
    return dataset.rows["train"], dataset.rows["evaluation"], dataset.about


# ---- model ----
def build_model(args: ScriptArguments, model_dir: str) -> PeftModel:
    """The base with a score head [hidden] -> [1] and an adapter; both are trained, and saved together."""
    set_seed(args.seed)
    model = loading.base_as_asked(args, model_dir, head="score")
    if not isinstance(getattr(model, "score", None), torch.nn.Linear):
        raise ValueError(f"{type(model).__name__} has no linear layer called score: this architecture cannot be used")

    model.score.float()
    pairs.score_by_mask(model)
    if not args.share_prompt:
        forward.enable_packing(forward.backbone_of(model))

    # peft puts the score head among `modules_to_save` for this task type.
    return lora.new_adapter(args, model, "SEQ_CLS")


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
    # With e > 0 both directions count, so that no margin is worth growing without end.
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
class RewardTrainer(stage_trainer.StageTrainer, Trainer):
    """transformers' Trainer with the pairwise loss; chosen and rejected answers go through one forward."""

    # The loss is divided by the pairs of all accumulated batches on all processes, so not once more by the Trainer.
    loss_is_scaled_for_ga = True

    def __init__(self, *args, loss_options: dict[str, float], **kwargs):
        self.loss_options = loss_options
        super().__init__(*args, **kwargs)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        # Either collator's batch gives the scores of the P chosen answers first, then those of the P rejected ones.
        margin = inputs.pop("margin", 0.0)
        mask = inputs.pop("mask", None)
        chosen, rejected = model(**inputs).logits.chunk(2)
        loss = pairwise_loss(chosen, rejected, margin, **self.loss_options, mask=mask, n_pairs=num_items_in_batch)
        if num_items_in_batch is not None:
            # DistributedDataParallel averages the gradients over the processes, whose sums these are.
            loss = loss * self.accelerator.num_processes
        return (loss, torch.stack([chosen, rejected], dim=1)) if return_outputs else loss

    def _get_num_items_in_batch(self, batch_samples, device):
        """Real pairs of an optimizer step ([] long), over all its accumulated batches and all processes."""
        # With a shared prompt a pair is one row of the batch, else two.
        all_pairs = sum(len(batch["input_ids"]) // (1 if "segments" in batch else 2) for batch in batch_samples)
        blank = sum(int((~batch["mask"]).sum()) for batch in batch_samples if "mask" in batch)
        return self.accelerator.gather(torch.tensor(all_pairs - blank, device=device)).sum()

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Scores [P, 2] of each pair; `pair_metrics` makes the loss of them, so that no pair counts twice."""
        with torch.no_grad(), self.compute_loss_context_manager():
            _, scores = self.compute_loss(model, self._prepare_inputs(inputs), return_outputs=True)
        # The Trainer computes metrics only where there are labels: these are not read.
        return None, scores, scores[:, 0]


class EvaluateFirstStep(TrainerCallback):
    """Evaluate after the first step (--eval_first_step)."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 1:
            control.should_evaluate = True


def build_trainer(
    args: ScriptArguments,
    model: PeftModel,
    prompt_format: PromptFormat,
    about: dict,
    rows: Rows,
    eval_rows: Rows,
    order: LengthGroupedSampler,
) -> RewardTrainer:
    """RewardTrainer on encoded pairs in their `order`; `about` is what run.json says of the run."""
    collator = pairs.SharedPromptCollator if args.share_prompt else pairs.PairCollator

    # The sampler fills the last batch of several processes with blank pairs, which no loss counts.
    blank = [pairs.blank_pair(prompt_format.stop_ids[0])] if order.blanks else []

    trainer = RewardTrainer(
        model,
        stage_trainer.training_arguments(args, TrainingArguments, bool(eval_rows), remove_unused_columns=False),
        sampler=order,
        about=about,
        best=best.BestEvaluation(args),
        loss_options={name: getattr(args, name) for name in ("label_smoothing", "center_rewards_coefficient")},
        train_dataset=rows + blank,
        eval_dataset=eval_rows or None,
        data_collator=collator(prompt_format.pad_id),
        processing_class=prompt_format.tokenizer,
        compute_metrics=pair_metrics,
    )
    trainer.remove_callback(PrinterCallback)
    if args.eval_first_step and eval_rows:
        trainer.add_callback(EvaluateFirstStep())
    return trainer


def finish(
    args: ScriptArguments, trainer: RewardTrainer, tokenizer, about: dict, eval_rows: Rows, audited: dict | None
) -> None:
    """Write tokenizer, adapter and audit, and run.json, which says that the stage is done: all of them or none."""
    model = trainer.model
    metrics = trainer.best.record(args.output_dir)
    with output_dir.finished_together(args.output_dir) as folder:
        tokenizer.save_pretrained(folder)
        adapters.save_adapter(model, folder)
        adapters.check_saved(model, folder)
        if audited is not None:
            metrics |= audit_report.publish(audited, folder)
            launch.say(f"audit written to {args.output_dir}/audit.md")
        run_json.write_run(folder, **about, metrics=metrics)

    report.write_at_end(args.output_dir)
    closing.say_finished(args, metrics, len(eval_rows))


def main(args: ScriptArguments) -> None:
    """Data, model, training, evaluation, adapter with its score head, audit."""
    # 1. Questions that need no model.
    if args.plan:
        print(plan.plan_trainer(args, "reward_modeling.py", sides=2))
        return
    launch.require_optional(args)

    # 2. Base and tokenizer; the audit of a stored adapter needs no more.
    model_dir = loading.resolve_model(args.model_name)
    tokenizer = encoding.load_tokenizer(args.tokenizer_name or model_dir)
    prompt_format = choose_format(args, tokenizer, model_dir)
    if launch.already_finished(args, "reward"):
        return
    # Read again by the audit, at the end: a wrong file is refused before the training.
    bad_answers.read(args.bad_answers)
    loading.refuse_small_base(model_dir, tokenizer, args.max_length, f"--max_length {args.max_length}")
    base = fingerprints.base_fingerprint(model_dir)
    if args.audit_only:
        eval_rows = benchmark.load(args, prompt_format) or load_data(args, prompt_format)[1]
        audit_only.audit_adapter(args, model_dir, prompt_format, base, eval_rows)
        return

    # 3. Data; from here on the output directory is ours.
    old = training.claim(args)
    rows, eval_rows, about_data = load_data(args, prompt_format)
    if args.inspect_data:
        return
    announce_batches(args, len(rows), "pairs")
    identity = {"base": base, "tokenizer": tokenizer, "prompt_format": prompt_format.record()}
    about = {"stage": "reward", "args": args, **identity, "data": about_data}

    # 4. Model, log and trainer, from the start or from a checkpoint.
    if launch.already_finished(args, "reward", about):
        return
    resume_from = training.resume_point(args, about)
    model = build_model(args, model_dir)
    output_dir.clear(old)
    file = open_log(args, resume_from)
    lengths = pairs.shared_lengths(rows) if args.share_prompt else pairs.pair_lengths(rows)
    order = training.row_order(args, lengths)
    trainer = build_trainer(args, model, prompt_format, about, rows, eval_rows, order)
    log = StageLog(file, args, trainer, sequences=2)
    if args.share_prompt:
        pairs.check_shareable(
            forward.backbone_of(model.get_base_model()), rows[lengths.argmax()], prompt_format.pad_id
        )

    # 5. Train and evaluate.
    training.train(trainer, resume_from, log)
    if eval_rows:
        training.final_evaluation(trainer)

    # 6. The best evaluation's adapter, audit, and last of all run.json.
    with stage_trainer.gathered(model):
        if file is not None:
            trainer.best.restore(model, trainer.state.global_step)
        audited = training.audit_of(args, model, prompt_format, eval_rows)
        if file is not None:
            finish(args, trainer, tokenizer, about, eval_rows, audited)
            file.close()
    training.end(trainer)


if __name__ == "__main__":
    launch.run_main(main, given)
