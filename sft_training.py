"""Stage 1: supervised fine-tuning of a base model on (prompt, answer) rows with LoRA.

In:  a base model, rows of prompts and answers.
Out: <output_dir>: the SFT adapter, tokenizer files, run.json, metrics.jsonl; checkpoint-<n>/ by --save_steps.

    minimise  mean over answer tokens and their EOS of -log p(token | query, tokens before it)

    python sft_training.py --model_name baichuan-inc/baichuan-7B --lora_target_models W_pack \\
        --output_dir runs/sft
"""

from dataclasses import dataclass
from pathlib import Path

from rlhf.arguments import CommonArguments, LoraArguments, TrainerFlags
from rlhf.data.arguments import SFT_DATASET, DataArguments
from rlhf.flags import flag, parse
from rlhf.run import startup

SAMPLES = 3


@dataclass(kw_only=True)
class ScriptArguments(CommonArguments, LoraArguments, DataArguments, TrainerFlags):
    """Flags of sft_training.py."""

    # ---- artefacts ----
    output_dir: str = flag(
        "runs/sft", help="directory for the adapter, run.json and metrics.jsonl", group="artefacts", resume="free"
    )
    previous_lora_weights: str | None = flag(
        None, help="SFT or PPO adapter to go on training; its own rank and modules count", group="artefacts"
    )
    # ---- data ----
    dataset_name: str = flag(
        SFT_DATASET, help="(prompt, answer) rows: hub id, save_to_disk directory or file", group="data", resume="path"
    )
    # ---- evaluation ----
    sample_max_new_tokens: int = flag(
        64,
        help="tokens of each sample answer in the log, before and after; 0: no samples",
        group="evaluation",
        resume="free",
        expert=True,
    )

    def __post_init__(self):
        super().__post_init__()
        if self.sample_max_new_tokens < 0:
            raise ValueError(f"--sample_max_new_tokens {self.sample_max_new_tokens} must not be negative")


def parse_args(argv: list[str] | None = None) -> ScriptArguments:
    """Parse and check the command line; a wrong one ends the program with exit code 2."""
    return parse(ScriptArguments, argv, __doc__)


# A wrong flag, --help and Ctrl-C end here: the libraries below take seconds to load.
if __name__ == "__main__":
    given = startup.begin(parse_args)

import torch
from datasets import disable_progress_bars
from peft import PeftModel
from transformers import EvalPrediction, PrinterCallback, set_seed
from trl import SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from rlhf.artefacts import adapters, fingerprints, output_dir, run_json
from rlhf.cost import plan
from rlhf.data import encoding, reading
from rlhf.data.batches import LengthGroupedSampler, blank_answer
from rlhf.data.cache import Prepared
from rlhf.data.choose_format import choose_format
from rlhf.data.funnel import subset
from rlhf.data.prompt_format import PromptFormat
from rlhf.data.rows import Rows, written
from rlhf.endings import say_end
from rlhf.models import loading, lora, untrained
from rlhf.page import report
from rlhf.run import launch
from rlhf.run.log import MetricsLog
from rlhf.trainer import best, samples, stage_trainer, training
from rlhf.trainer.log import StageLog, announce_batches, open_log


# ---- data ----
def prepare(args: ScriptArguments, prompt_format: PromptFormat, bad_rows_file: Path | None) -> Prepared:
    """Read, draw and encode the rows; "shown": a few evaluation rows as text."""
    texts, eval_texts, funnel = reading.load_splits(args, "sft", args.seed, bad_rows_file)
    texts = subset(texts, args.train_subset, args.seed, funnel)
    eval_texts = subset(eval_texts, args.eval_subset, args.seed, funnel)
    rows = encoding.sft_rows(prompt_format, texts, args.max_length, funnel)
    eval_rows = encoding.sft_rows(prompt_format, eval_texts, args.max_length, funnel)
    # Their order changes no result, and rows of like length share a batch.
    eval_rows = eval_rows.select(eval_rows.lengths("input_ids").argsort(kind="stable"))

    named = {"train": rows, "evaluation": eval_rows, "shown": written(eval_texts[:SAMPLES])}
    return Prepared(named, funnel, reading.fingerprints(texts, eval_texts))


def load_data(args: ScriptArguments, prompt_format: PromptFormat) -> tuple[Rows, Rows, list[dict], dict]:
    """Encoded training and evaluation rows, a few evaluation rows as text, and what run.json says of the data."""
    dataset = training.load_prepared(args, prompt_format, prepare, "row")
    return dataset.rows["train"], dataset.rows["evaluation"], list(dataset.rows["shown"]), dataset.about


# ---- model ----
def build_model(args: ScriptArguments, model_dir: str) -> PeftModel:
    """The base with a new adapter, or with --previous_lora_weights to be trained further."""
    set_seed(args.seed)
    model = loading.base_as_asked(args, model_dir)
    if args.previous_lora_weights:
        return lora.continue_adapter(model, args.previous_lora_weights)
    return lora.new_adapter(args, model, "CAUSAL_LM")


# ---- training ----
class SupervisedTrainer(stage_trainer.StageTrainer, SFTTrainer):
    """TRL's SFTTrainer in our order of rows, its eval_loss a mean over tokens whatever the batch size."""

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """[B, 2]: nats and answer tokens of each row, for `token_mean` to add up."""
        with torch.no_grad(), self.compute_loss_context_manager():
            # TRL's own forward: log-probabilities [B, L - 1], 0 where there is no loss, and never all the logits.
            output = model(**self._prepare_inputs(inputs), fused_lm_head=True)
        tokens = output.label_mask.sum(1)
        # The Trainer computes metrics only where there are labels: these are not read.
        return None, torch.stack([-output.log_probs.sum(1), tokens], dim=1), tokens

    def create_model_card(self, *args, **kwargs):
        """Write no card: run.json says what was trained on what."""

    def _send_telemetry(self):
        """Report to nobody: a run needs no network."""


def token_mean(prediction: EvalPrediction) -> dict[str, float]:
    """eval_loss: nats per answer token over all rows."""
    nats, tokens = prediction.predictions.astype("float64").sum(0)
    return {"loss": nats / tokens}


def build_trainer(
    args: ScriptArguments,
    model: PeftModel,
    prompt_format: PromptFormat,
    about: dict,
    data: tuple[Rows, Rows],
    order: LengthGroupedSampler,
    fresh: bool,
) -> SupervisedTrainer:
    """SFTTrainer on rows that are encoded already.

    TRL recognises them by `input_ids`. `completion_only_loss` has to be given: for such rows TRL would otherwise put a
    loss on the query as well. No row is too long by now, so TRL cuts nothing (`max_length=None`).

    Args:
        about: what run.json says of the run. data: training and evaluation rows. order: of the training rows. fresh:
            this run is not resumed.
    """
    disable_progress_bars()
    rows, eval_rows = data
    # The loss before training is measured within training: an evaluation ahead of it would silently leave the model
    # out of DDP.
    starts_with_evaluation = bool(eval_rows) and fresh
    # No load-balancing loss for mixtures: its router outputs do not fit rows that TRL computes in pieces.
    settings = {"completion_only_loss": True, "max_length": None, "packing": False, "router_aux_loss_coef": 0.0}
    config = stage_trainer.training_arguments(
        args, SFTConfig, bool(eval_rows), eval_on_start=starts_with_evaluation, **settings
    )

    blank = [blank_answer(prompt_format.stop_ids[0])] if order.blanks else []
    columns = ("input_ids", "completion_mask")
    trainer = SupervisedTrainer(
        model,
        config,
        sampler=order,
        about=about,
        best=best.BestEvaluation(args),
        train_dataset=(rows + blank).dataset(*columns),
        eval_dataset=eval_rows.dataset(*columns) if eval_rows else None,
        # TRL's own, made here: for a tokenizer without a pad token TRL would name one, and change the tokenizer by it.
        data_collator=DataCollatorForLanguageModeling(prompt_format.pad_id),
        processing_class=prompt_format.tokenizer,
        compute_metrics=token_mean,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def finish(args: ScriptArguments, trainer: SupervisedTrainer, about: dict, log: MetricsLog) -> None:
    """Write the adapter and all that belongs to it, and say what the evaluation loss was before and after."""
    metrics = trainer.best.before_and_after(args.output_dir)
    with output_dir.finished_together(args.output_dir) as folder:
        about["tokenizer"].save_pretrained(folder)
        adapters.save_adapter(trainer.model, folder)
        run_json.write_run(folder, **about, metrics=metrics)
    log.close()
    report.write_at_end(args.output_dir)
    quality = None
    if metrics:
        before, after = (metrics[f"eval_loss_{when}"] for when in ("before", "after"))
        quality = f"loss on held-out answers {before:.3f} before, {after:.3f} after"
    more = {"model_name": args.model_name, "dataset_name": "pairs.jsonl"}
    say_end(f"SFT adapter in {args.output_dir}", quality, args, "reward_modeling.py", **more)


def main(args: ScriptArguments) -> None:
    """Data, model, evaluation and samples, training, evaluation and samples again, adapter."""
    # 1. Questions that need no model.
    if args.plan:
        print(plan.plan_trainer(args, "sft_training.py", sides=1))
        return
    launch.require_optional(args)

    # 2. Base, tokenizer and a previous adapter have to belong together.
    model_dir = loading.resolve_model(args.model_name)
    tokenizer = encoding.load_tokenizer(args.tokenizer_name or model_dir)
    prompt_format = choose_format(args, tokenizer, model_dir)
    if launch.already_finished(args, "sft"):
        return
    loading.refuse_small_base(model_dir, tokenizer, args.max_length, f"--max_length {args.max_length}")
    base = fingerprints.base_fingerprint(model_dir)
    identity = {"base": base, "tokenizer": tokenizer, "prompt_format": prompt_format.record()}
    previous = args.previous_lora_weights
    if previous:
        adapters.check_adapter(previous, stage=("sft", "ppo"), flag="--previous_lora_weights", **identity)

    # 3. Data; from here on the output directory is ours.
    old = training.claim(args)
    rows, eval_rows, shown, about_data = load_data(args, prompt_format)
    if args.inspect_data:
        return
    announce_batches(args, len(rows), "rows")
    parents = {"previous": previous} if previous else {}
    about = {"stage": "sft", "args": args, **identity, "data": about_data, "parents": parents}

    # 4. Model, log and trainer, from the start or from a checkpoint.
    if launch.already_finished(args, "sft", about):
        return
    resume_from = training.resume_point(args, about)
    model = build_model(args, model_dir)
    output_dir.clear(old)
    untrained.warn_of_untrained(model.get_base_model(), prompt_format)
    file = open_log(args, resume_from)
    order = training.row_order(args, rows.lengths("input_ids"))
    trainer = build_trainer(args, model, prompt_format, about, (rows, eval_rows), order, fresh=resume_from is None)
    log = StageLog(file, args, trainer, extra=("mean_token_accuracy", "entropy"))

    # 5. Train, with answers to the same prompts before and after.
    if resume_from is None:
        samples.show(args, trainer, prompt_format, shown, file)
    training.train(trainer, resume_from, log)
    if eval_rows:
        training.final_evaluation(trainer)

    # 6. The best evaluation's adapter, answers of it, and last of all run.json.
    with stage_trainer.gathered(model):
        if file is not None:
            trainer.best.restore(model, trainer.state.global_step)
        samples.show(args, trainer, prompt_format, shown, file)
        if file is not None:
            finish(args, trainer, about, file)
    training.end(trainer)


if __name__ == "__main__":
    launch.run_main(main, given)
