"""Before the first step of a PPO run: what the policy starts from, its first evaluation, the checks and the gate."""

import warnings
from pathlib import Path

from rlhf.artefacts.adapters import check_adapter, check_merged
from rlhf.artefacts.checkpoint import numbered
from rlhf.artefacts.fingerprints import base_fingerprint
from rlhf.artefacts.output_dir import claim_output_dir
from rlhf.artefacts.resume import MERGED
from rlhf.artefacts.run_json import load_run
from rlhf.cost.fitting import choose_mini_batch, settle_mini_batch
from rlhf.data import encoding, reading
from rlhf.data.cache import Prepared
from rlhf.data.funnel import subset
from rlhf.data.prompt_format import PromptFormat
from rlhf.data.rows import Rows
from rlhf.data.template import CHAT
from rlhf.models.loading import read_config
from rlhf.models.untrained import warn_of_untrained
from rlhf.reward import length_file
from rlhf.rl import evaluation, rewards
from rlhf.rl.artefact_flags import OUTPUT_DIR
from rlhf.rl.check import check_start
from rlhf.rl.gate import quick_gate, read_gate, stored_audit
from rlhf.rl.loop import PPOLoop
from rlhf.rl.reward_functions import files_of, load_functions, record_of
from rlhf.run.launch import say

# The default of --output_dir until PPO had a directory of its own.
FORMER_OUTPUT_DIR = "runs/"

# KL penalty of a score in its own units, which for a sigmoid is the tutorial's, and in standard deviations.
TUTORIAL_KL_COEF = 0.5
STANDARDIZED_KL_COEF = 0.2
# Code cannot be gamed as a reward model can: what it is right about may be followed farther.
FUNCTIONS_KL_COEF = 0.05

# The tutorial's learning rate is for a 7B base, 4,096 wide. Adam moves every weight by about the learning rate, so the
# change of a layer's output grows with its width: the rate goes as 1 / width (Yang et al. 2022, arXiv:2203.03466).
TUTORIAL_RATE = 1.41e-5
TUTORIAL_WIDTH = 4096


# ---- flags that depend on the run ----
def settle(args) -> list[str]:
    """Replace `auto` and what was left out: by what a run to be resumed has, else by what suits command and machine.

    Returns: what was chosen, a sentence each.
    Raises: ValueError where the run to be resumed lies in the former default directory.
    """
    stored = _stored_arguments(args)
    if not stored and args.resume_from_checkpoint == "True" and args.output_dir == OUTPUT_DIR:
        _refuse_former_directory()

    chosen = []
    for name, choose in CHOICES.items():
        # What the command gives is never touched.
        if getattr(args, name) not in (None, "auto"):
            continue
        # A default that changed between two versions must not change a run that goes on.
        value, reason = (stored[name], "as the run began") if stored else choose(args)
        setattr(args, name, value)
        chosen.append(f"--{name} {value}: {reason}")
    return chosen + _settle_mini_batch(args, stored)


def _stored_arguments(args) -> dict:
    """The flags of the run that this command goes on with; {} for a fresh one."""
    if not args.resume_from_checkpoint:
        return {}
    folders = [Path(args.resume_from_checkpoint)]
    if args.resume_from_checkpoint == "True":
        # Looked through from the end: a finished run's own run.json first, then the newest checkpoint's.
        folders = [*numbered(args.output_dir, "step_"), Path(args.output_dir)]

    # All directories of a run have the same flags; whether a checkpoint is whole is asked later.
    runs = [load_run(folder) for folder in reversed(folders)]
    return next((run["arguments"] for run in runs if run and run.get("stage") == "ppo"), {})


def _refuse_former_directory() -> None:
    runs = [load_run(folder) for folder in (FORMER_OUTPUT_DIR, *numbered(FORMER_OUTPUT_DIR, "step_"))]
    if any(run and run.get("stage") == "ppo" for run in runs):
        raise ValueError(
            f"{FORMER_OUTPUT_DIR} holds a PPO run: --output_dir was that by default and is {OUTPUT_DIR} now; give "
            f"--output_dir {FORMER_OUTPUT_DIR} to go on with it"
        )


def _transform(args) -> tuple[str, str]:
    if not args.reward_model_lora_path:
        return "raw", "there is no reward model, and --function_transforms is for functions"
    # The tutorial's command keeps what it did; nobody else merges an SFT model for PPO.
    if args.merged_sft_model_path:
        return "sigmoid", "as in the tutorial's command, which has --merged_sft_model_path"
    return "standardize", "a sigmoid of a good reward model hardly varies"


def _kl_coef(args) -> tuple[float, str]:
    if not args.reward_model_lora_path:
        return FUNCTIONS_KL_COEF, "of a function's score, which says what is right"
    if args.reward_transform == "standardize":
        return STANDARDIZED_KL_COEF, "of a standard deviation of the score"
    return TUTORIAL_KL_COEF, "the tutorial's, for a score as it is"


def _learning_rate(args) -> tuple[float, str]:
    width = read_config(args.base_model_name).get_text_config().hidden_size
    # A rule of thumb has no more digits.
    rate = float(f"{TUTORIAL_RATE * TUTORIAL_WIDTH / width:.2e}")
    return rate, f"{TUTORIAL_RATE:g} at a hidden size of {TUTORIAL_WIDTH}, and here it is {width}"


def _settle_mini_batch(args, stored: dict) -> list[str]:
    if args.mini_batch_size:
        return []
    if not stored:
        choose_mini_batch(args)
        return [f"--mini_batch_size {args.mini_batch_size}: as many as fit within an optimizer step"]

    # The update of a resumed run rounds as it did; where its optimizer step is another one, the difference is named.
    rows = stored["mini_batch_size"]
    same = rows * stored["gradient_accumulation_steps"] == args.gradient_accumulation_steps
    settle_mini_batch(args, rows if same else 1)
    return [f"--mini_batch_size {args.mini_batch_size}: as the run began"]


# In this order: the KL penalty depends on the transform.
CHOICES = {"reward_transform": _transform, "init_kl_coef": _kl_coef, "learning_rate": _learning_rate}


# ---- start ----
def check_inputs(args, prompt_format: PromptFormat) -> dict:
    """Refuse what does not belong together, before any model is loaded; return what run.json says of the inputs."""
    base = base_fingerprint(args.base_model_name)
    wanted = {"base": base, "tokenizer": prompt_format.tokenizer, "prompt_format": prompt_format.record()}
    sft = args.sft_model_lora_path
    parents = ({"sft": sft} if sft else {}) | args.reward_roles
    if sft:
        check_adapter(sft, stage=("sft", "ppo"), flag="--sft_model_lora_path", **wanted)
    for reward in args.reward_roles.values():
        check_adapter(reward, stage="reward", flag="--reward_model_lora_path", **wanted)
    if args.merged_sft_model_path:
        check_merged(args.merged_sft_model_path, base=base, sft_dir=sft, flag="--merged_sft_model_path")
        parents[MERGED] = args.merged_sft_model_path
    for reward in args.reward_roles.values():
        read_gate(reward, args.reward_gate)

    if args.judge_lora_path:
        check_adapter(args.judge_lora_path, stage="reward", flag="--judge_lora_path", **wanted)
        parents["judge"] = args.judge_lora_path
    run = {"base": base, "prompt_format": wanted["prompt_format"], "parents": parents}
    if args.length_calibration:
        run["length_calibration"] = length_file.hashes(list(args.reward_roles.values()))
    return run | ({"functions": record_of(load_functions(args.reward_functions))} if args.reward_functions else {})


def claim(args) -> list[Path]:
    """Claim the output directory; returns what an earlier run left, for `clear` once every input has been read."""
    names = ("sft_model_lora_path", "judge_lora_path", "merged_sft_model_path")
    names += ("base_model_name", "dataset_name", "eval_dataset_name", "chat_template")
    inputs = {f"--{name}": getattr(args, name) for name in names} | files_of(args.reward_functions)
    # The key is what a refusal names the input by.
    for role, folder in args.reward_roles.items():
        inputs["--reward_model_lora_path" + ("" if role == "reward" else f" ({role})")] = folder
    return claim_output_dir(args.output_dir, bool(args.resume_from_checkpoint), args.overwrite_output_dir, inputs)


def say_start(loop: PPOLoop) -> None:
    """Say what the policy starts from, and warn of a base that has never learnt to answer or to stop."""
    args = loop.args
    if args.sft_model_lora_path:
        say(f"policy: goes on from {args.sft_model_lora_path}")
    else:
        say(f"policy: a fresh adapter of rank {args.lora_rank} on the base, which is the reference")
        # A base with a chat template is taken for a chat model, which has learnt both.
        if args.prompt_template != CHAT:
            warnings.warn(
                "no SFT adapter and no chat template: a base that was never taught to answer learns little from a "
                "reward; train one with sft_training.py, or take a chat model",
                stacklevel=2,
            )
    warn_of_untrained(loop.roles.model, loop.prompt_format)


def measure_start(loop: PPOLoop, fresh: bool) -> None:
    """Measure the SFT model's scores and evaluate it (once), and refuse to start on a silent defect."""
    args = loop.args
    wanted = [f"{rewards.prefix(name)}mean" for name in rewards.to_measure(loop)]
    if not loop.reward_stats.keys() >= set(wanted):
        if not fresh:
            raise ValueError("the checkpoint was made without a standardized score: go on as it began")
        loop.reward_stats = evaluation.measure_sft_scores(loop)

    # A resumed run has this from its checkpoint, and its policy is the SFT model no longer.
    if args.eval_freq and fresh:
        loop.baseline = evaluation.evaluate(loop)[0]
    if args.check:
        check_start(loop, fresh)
    untried = {role: folder for role, folder in args.reward_roles.items() if stored_audit(folder) is None}
    if fresh and untried:
        quick_gate(loop, untried)


def prepare(args, prompt_format: PromptFormat, bad_rows_file: Path | None) -> Prepared:
    """Read and encode the prompts; held-out ones only where --eval_freq asks for them."""
    held_out = Rows([])
    if args.eval_freq:
        rows, held_out, funnel = reading.load_splits(args, "prompt", args.seed, bad_rows_file)
    else:
        rows, funnel = reading.load_rows(
            args.dataset_name, "prompt", args.train_split, args=args, bad_rows_file=bad_rows_file
        )
    # Counted in the funnel like any other row that is left aside.
    held_out = subset(held_out, args.eval_prompts, args.seed, funnel)

    prompts = encoding.prompt_rows(prompt_format, rows, args.max_prompt_length, funnel)
    eval_prompts = encoding.prompt_rows(prompt_format, held_out, args.max_prompt_length, funnel)
    return Prepared({"train": prompts, "evaluation": eval_prompts}, funnel, {})
