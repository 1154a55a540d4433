"""Stage 1: supervised fine-tuning of a base model on (prompt, answer) rows with LoRA.

In:  a base model, rows of prompts and answers.
Out: <output_dir>: the SFT adapter, tokenizer files, run.json, metrics.jsonl; checkpoint-<n>/ by --save_steps.

    minimise  mean over answer tokens and their EOS of -log p(token | query, tokens before it)

    python sft_training.py --model_name baichuan-inc/baichuan-7B --lora_target_models W_pack \\
        --output_dir runs/sft
"""

from dataclasses import dataclass

import torch
from datasets import Dataset, disable_progress_bars
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import EvalPrediction, PrinterCallback, set_seed
from trl import SFTConfig, SFTTrainer

from rlhf.arguments import SFT_DATASET, CommonArguments, DataArguments, LoraArguments, TrainerFlags
from rlhf.artefacts.adapters import check_adapter, save_adapter
from rlhf.artefacts.output_dir import claim_output_dir
from rlhf.artefacts.resume import finished_run
from rlhf.artefacts.run_json import base_fingerprint, write_run
from rlhf.cost.plan import plan_trainer
from rlhf.data.batches import LengthGroupedSampler, blank_answer, collate_prompts
from rlhf.data.encoding import encode, inspect_rows, load_tokenizer, sft_rows
from rlhf.data.funnel import subset
from rlhf.data.reading import data_fingerprint, load_splits
from rlhf.data.template import render
from rlhf.flags import flag, parse
from rlhf.models.forward import forked_rng
from rlhf.models.generation import Sampling, generate
from rlhf.models.loading import continue_adapter, load_base, lora_targets, pick_dtype, resolve_model
from rlhf.run.launch import rank_and_size, require_optional, run_script, say
from rlhf.run.log import MetricsLog, read_metrics
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

SAMPLES = 3


@dataclass(kw_only=True)
class ScriptArguments(CommonArguments, LoraArguments, DataArguments, TrainerFlags):
    """Flags of sft_training.py."""

    # ---- artefacts ----
    model_name: str = flag(
        "baichuan-inc/baichuan-7B",
        help="base: directory or hub id",
        group="artefacts",
        aliases=["--model_path", "--base_model_name", "--model_name_or_path"],
    )
    output_dir: str = flag("runs/sft", help="where the adapter, run.json and metrics.jsonl go", group="artefacts")
    previous_lora_weights: str | None = flag(
        None, help="an SFT or PPO adapter to go on training; its own rank and modules count", group="artefacts"
    )
    # ---- data ----
    dataset_name: str = flag(
        SFT_DATASET, help="(prompt, answer) rows: hub id, save_to_disk directory or file", group="data"
    )
    # ---- evaluation ----
    sample_max_new_tokens: int = flag(
        64, help="tokens of each sample answer in the log, before and after; 0: no samples", group="evaluation"
    )

    def __post_init__(self):
        for part in (CommonArguments, LoraArguments, DataArguments, TrainerFlags):
            part.__post_init__(self)
        if self.sample_max_new_tokens < 0:
            raise ValueError(f"--sample_max_new_tokens {self.sample_max_new_tokens} must not be negative")


def parse_args(argv: list[str] | None = None) -> ScriptArguments:
    """The command line, checked; a wrong one ends the program with exit code 2."""
    return parse(ScriptArguments, argv, __doc__)


# ---- data ----
def load_data(args: ScriptArguments, tokenizer) -> tuple[list[dict], list[dict], list[str], dict]:
    """Encoded training and evaluation rows, a few evaluation prompts, and what run.json says of the data."""
    texts, eval_texts, funnel = load_splits(args, "sft", args.seed, bad_rows_file(args))
    texts = subset(texts, args.train_subset, args.seed, funnel)
    eval_texts = subset(eval_texts, args.eval_subset, args.seed, funnel)
    rows = sft_rows(tokenizer, texts, args.prompt_template, args.max_length, funnel)
    eval_rows = sft_rows(tokenizer, eval_texts, args.prompt_template, args.max_length, funnel)
    # Their order changes no result, and rows of like length share a batch.
    eval_rows.sort(key=lambda row: len(row["input_ids"]))
    if args.inspect_data:
        inspect_rows(tokenizer, rows, funnel)
    else:
        say(funnel.table())
    if not rows:
        raise ValueError(f"{args.dataset_name} leaves no row to train on: {funnel.summary()}")
    about = {"fingerprint": data_fingerprint(texts), "rows": len(rows), "eval_rows": len(eval_rows)}
    return rows, eval_rows, [row["prompt"] for row in eval_texts[:SAMPLES]], about | {"funnel": funnel.as_dict()}


# ---- model ----
def build_model(args: ScriptArguments, model_dir: str) -> PeftModel:
    """The base with a new adapter, or with --previous_lora_weights to be trained further."""
    set_seed(args.seed)
    model = load_base(model_dir, pick_dtype(args.bf16), four_bit=args.load_in_4bit)
    if args.previous_lora_weights:
        return continue_adapter(model, args.previous_lora_weights)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=args.lora_rank,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        target_modules=lora_targets(model, args.lora_target_models),
    )
    return get_peft_model(model, config)


# ---- training ----
class SupervisedTrainer(SFTTrainer):
    """TRL's SFTTrainer in our order of rows, its eval_loss a mean over tokens whatever the batch size."""

    def __init__(self, *args, sampler: LengthGroupedSampler, about: dict, **kwargs):
        self.sampler, self.about = sampler, about
        super().__init__(*args, **kwargs)

    def training_step(self, model, inputs, *args, **kwargs):
        shape = inputs["input_ids"].shape
        with explain_out_of_memory("a training batch", shape, "--per_device_train_batch_size or --max_length"):
            return super().training_step(model, inputs, *args, **kwargs)

    def _get_train_sampler(self, train_dataset=None):
        return self.sampler

    def evaluate(self, *args, **kwargs):
        with forked_rng():
            return super().evaluate(*args, **kwargs)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """[B, 2]: nats and answer tokens of each row, for `token_mean` to add up."""
        with torch.no_grad(), self.compute_loss_context_manager():
            # TRL's own forward: log-probabilities [B, L - 1], 0 where there is no loss, and never all the logits.
            found = model(**self._prepare_inputs(inputs), fused_lm_head=True)
        tokens = found.label_mask.sum(1)
        # The Trainer computes metrics only where there are labels: these are not read.
        return None, torch.stack([-found.log_probs.sum(1), tokens], dim=1), tokens

    def _save_checkpoint(self, model, trial):
        with writing_checkpoint(self):
            super()._save_checkpoint(model, trial)

    def _save(self, output_dir=None, state_dict=None):
        save_checkpoint(self, output_dir, state_dict)

    def floating_point_ops(self, inputs):
        """0: nobody reads the count, and making it walks over all modules at every step."""
        return 0

    def create_model_card(self, *args, **kwargs):
        """Nothing: run.json says what was trained on what."""

    def _send_telemetry(self):
        """Nothing: a run needs no network and reports to nobody."""


def token_mean(prediction: EvalPrediction) -> dict[str, float]:
    """eval_loss: nats per answer token over all rows."""
    nats, tokens = prediction.predictions.astype("float64").sum(0)
    return {"loss": nats / tokens}


def build_trainer(args: ScriptArguments, model, about: dict, rows: list[dict], eval_rows: list[dict], log: StageLog):
    """SFTTrainer on rows we encoded; `about` is what run.json says of the run.

    TRL recognises them by `input_ids`; `completion_only_loss` must be said, because for such rows it would otherwise
    put a loss on the query as well. Rows are short enough already, so it cuts nothing (`max_length=None`).
    """
    disable_progress_bars()
    blank = blank_answer(about["tokenizer"].eos_token_id)
    config = training_arguments(
        args, SFTConfig, bool(eval_rows), completion_only_loss=True, max_length=None, packing=False
    )
    trainer = SupervisedTrainer(
        model,
        config,
        sampler=log.sampler,
        about=about,
        train_dataset=Dataset.from_list(rows + [blank] * bool(log.sampler.blanks)),
        eval_dataset=Dataset.from_list(eval_rows) if eval_rows else None,
        processing_class=about["tokenizer"],
        compute_metrics=token_mean,
        callbacks=[log],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


@torch.no_grad()
def sample_answers(args: ScriptArguments, model: PeftModel, tokenizer, prompts: list[str]) -> list[str]:
    """Greedy answers, an empty one allowed: whether the model stops by itself is part of what is to be seen."""
    model.eval()
    device = next(model.parameters()).device
    queries = [encode(tokenizer, render(args.prompt_template, prompt)) for prompt in prompts]
    batch = {name: t.to(device) for name, t in collate_prompts(queries, tokenizer.pad_token_id).items()}
    sampling = Sampling(
        tokenizer.eos_token_id, tokenizer.pad_token_id, args.sample_max_new_tokens, suppress_empty=False
    )
    found = generate(
        model.get_base_model(),
        lambda hidden: torch.zeros(len(hidden), device=hidden.device),
        batch["input_ids"],
        batch["attention_mask"],
        sampling,
    )
    answers = []
    for ids, mask in zip(found.response_ids, found.mask, strict=True):
        stopped = tokenizer.eos_token_id in ids[mask]
        answers.append(tokenizer.decode(ids[mask], skip_special_tokens=True) + ("" if stopped else " ..."))
    return answers


def show_samples(args: ScriptArguments, trainer, prompts: list[str], log: MetricsLog | None) -> None:
    """Print a few answers and keep them in samples.jsonl; " ..." ends one that did not stop by itself."""
    if log is None or not prompts or not args.sample_max_new_tokens:
        return
    if is_zero3():
        say("no sample answers: under ZeRO-3 one process alone cannot write them")
        return
    step, answers = trainer.state.global_step, sample_answers(args, trainer.model, trainer.processing_class, prompts)
    for prompt, answer in zip(prompts, answers, strict=True):
        print(f"  step {step} | {prompt!r} -> {answer!r}", flush=True)
    pairs = zip(prompts, answers, strict=True)
    log.write_samples([{"step": step, "query": prompt, "response": answer} for prompt, answer in pairs], shown=0)


def before_and_after(args: ScriptArguments) -> dict[str, float]:
    """First and last eval_loss of metrics.jsonl, which a resumed run has kept; empty without evaluation rows."""
    found = [record["eval_loss"] for record in read_metrics(args.output_dir) if "eval_loss" in record]
    return {"eval_loss_before": found[0], "eval_loss_after": found[-1]} if found else {}


def main(args: ScriptArguments) -> None:
    """Data, model, evaluation and samples, training, evaluation and samples again, adapter."""
    if args.plan:
        print(plan_trainer(args, "sft_training.py", sides=1))
        return
    require_optional(args)
    if not args.inspect_data and finished_run(args, "sft"):
        say(f"{args.output_dir} is finished: --overwrite_output_dir True trains it again")
        return
    model_dir = resolve_model(args.model_name)
    tokenizer = load_tokenizer(args.tokenizer_name or model_dir)
    base = base_fingerprint(model_dir)
    if args.previous_lora_weights:
        check_adapter(
            args.previous_lora_weights,
            stage=("sft", "ppo"),
            base=base,
            tokenizer=tokenizer,
            template=args.prompt_template,
            flag="--previous_lora_weights",
        )
    if rank_and_size()[0] == 0 and not args.inspect_data:
        claim_output_dir(args.output_dir, bool(args.resume_from_checkpoint), args.overwrite_output_dir)
    rows, eval_rows, prompts, about_data = load_data(args, tokenizer)
    if args.inspect_data:
        return
    announce_batches(args, len(rows), "rows")
    about = {
        "stage": "sft", "args": args, "base": base, "tokenizer": tokenizer, "template": args.prompt_template,
        "data": about_data, "parents": {"previous": args.previous_lora_weights} if args.previous_lora_weights else {},
    }  # fmt: skip
    resume_from = resume_point(args, about)
    model = build_model(args, model_dir)
    file = open_log(args, resume_from)
    lengths = [len(row["input_ids"]) for row in rows]
    processes = rank_and_size()[1]
    sampler = LengthGroupedSampler(
        lengths, args.per_device_train_batch_size * processes, args.seed, filled=processes > 1
    )
    log = StageLog(file, args, sampler, extra=("mean_token_accuracy", "entropy"))
    trainer = build_trainer(args, model, about, rows, eval_rows, log)
    if resume_from is None:
        show_samples(args, trainer, prompts, file)
    # The loss before is part of training: an evaluation ahead of it would leave the model out of DDP, without a word.
    trainer.args.eval_on_start = bool(eval_rows) and resume_from is None
    train(trainer, resume_from, log)
    if eval_rows:
        final_evaluation(trainer)
    show_samples(args, trainer, prompts, file)
    with gathered(model):
        if file is not None:
            tokenizer.save_pretrained(args.output_dir)
            save_adapter(model, args.output_dir)
    if file is not None:
        write_run(args.output_dir, **about, metrics=before_and_after(args))
        file.close()
        shown = ", ".join(f"{name} {value:.4f}" for name, value in before_and_after(args).items())
        say(f"SFT adapter in {args.output_dir}" + (f": {shown}" if shown else ""))
    end(trainer)


if __name__ == "__main__":
    run_script(main, parse_args)
