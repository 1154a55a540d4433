"""Stage 3: PPO on the SFT adapter, scored by the reward adapter, priced by its distance from the frozen SFT policy.

In:  a base model, an SFT adapter, a reward adapter, prompts.
Out: <output_dir>: the policy's adapter and value head, run.json, metrics.jsonl, samples.jsonl; step_<n>/ likewise.

    maximise  E[score(query, response)] - kl_coef * KL(policy || SFT),  by the clipped surrogate of PPO (rlhf/ppo.py)

    python rl_training.py --base_model_name baichuan-inc/baichuan-7B --sft_model_lora_path runs/sft \\
        --reward_model_lora_path runs/reward --dataset_name prompts.jsonl --output_dir runs/ppo --save_freq 10
"""

import time
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from transformers import Adafactor

from rlhf import ppo
from rlhf.arguments import CommonArguments, flag, parse
from rlhf.artefacts import (
    base_fingerprint,
    check_adapter,
    claim_output_dir,
    resolve_model,
    save_adapter,
    write_run,
)
from rlhf.check import check_run
from rlhf.checkpoint import load_state, publish, save_state, to_resume
from rlhf.data import (
    DataArguments,
    Funnel,
    data_fingerprint,
    inspect_rows,
    load_rows,
    load_splits,
    load_tokenizer,
    prompt_rows,
    subset,
)
from rlhf.experience import (
    Loop,
    next_prompts,
    record_logprobs,
    sample_responses,
    score_responses,
    set_advantages,
    transform_scores,
)
from rlhf.guard import Collapse, CollapseGuard
from rlhf.launch import run_script
from rlhf.metrics import describe, describe_samples, global_moments, in_words, refuse_non_finite, step_line, timings
from rlhf.report import Eta, MetricsLog
from rlhf.roles import load_roles, pick_dtype, save_value_head
from rlhf.rollout import Sampling
from rlhf.update import restore, snapshot, update

# Answers of the SFT model that --reward_transform standardize takes its mean and deviation from.
STATISTICS_SAMPLES = 128
# Fields of the Loop that a checkpoint keeps as they are.
KEPT = ("reward_stats", "best", "rollbacks")


@dataclass(kw_only=True)
class ScriptArguments(CommonArguments, DataArguments):
    """Flags of rl_training.py; every flag the tutorial had still parses."""

    # ---- artefacts ----
    base_model_name: str = flag(help="base: directory or hub id", group="artefacts", aliases=["--model_name"])
    sft_model_lora_path: str = flag(help="SFT adapter: the policy starts from it", group="artefacts")
    reward_model_lora_path: str = flag(help="reward adapter with its score head", group="artefacts")
    merged_sft_model_path: str | None = flag(
        None, help="merged SFT model as reference; without it the SFT adapter on the same base", group="artefacts"
    )
    save_freq: int | None = flag(
        None, help="steps between checkpoints step_<n>; none: the end only", group="artefacts"
    )
    # ---- sampling ----
    max_prompt_length: int = flag(512, help="queries of more tokens are dropped, and counted", group="data")
    output_max_length: int = flag(128, help="response tokens at most", group="sampling")
    batched_gen: bool = flag(True, help="sample the whole batch at once; False: one query at a time", group="sampling")
    temperature: float = flag(1.0, help="divides the logits, of policy and reference alike", group="sampling")
    suppress_empty: bool = flag(True, help="forbid EOS as first token (begin_suppress_tokens)", group="sampling")
    min_new_tokens: int = flag(0, help="forbid EOS before this many tokens", group="sampling")
    top_k: int = flag(0, help="sample among the k likeliest; not matched in the KL, so better 0", group="sampling")
    top_p: float = flag(1.0, help="sample within this mass; not matched in the KL, so better 1", group="sampling")
    # ---- reward ----
    reward_transform: str = flag(
        "sigmoid",
        help="of the score; standardize: by mean and std of the SFT model's own answers, clipped at 5",
        group="reward",
        choices=["sigmoid", "raw", "standardize"],
    )
    reward_baseline: float = flag(0.0, help="subtracted from the transformed score", group="reward")
    missing_eos_penalty: float = flag(0.0, help="subtracted where a response hit the maximum length", group="reward")
    init_kl_coef: float = flag(0.5, help="price of one nat of KL to the reference", group="reward")
    adap_kl_ctrl: bool = flag(False, help="move the price so that the KL stays at its target", group="reward")
    adap_kl_target: float = flag(
        6.0, help="nats a response: target of --adap_kl_ctrl; the guard minds no KL under it", group="reward"
    )
    adap_kl_horizon: int = flag(10000, help="responses, for --adap_kl_ctrl", group="reward")
    # ---- update ----
    steps: int = flag(20000, help="responses in total, of all processes, rounded up to whole batches", group="update")
    batch_size: int = flag(32, help="responses a step and process", group="update")
    mini_batch_size: int = flag(1, help="responses a backward pass", group="update")
    gradient_accumulation_steps: int = flag(
        4, help="backward passes an optimizer step; a window may span epochs", group="update"
    )
    ppo_epochs: int = flag(4, help="passes over each batch", group="update")
    learning_rate: float = flag(1.41e-5, help="of adapter and value head", group="update")
    adafactor: bool = flag(False, help="Adafactor in place of Adam", group="update")
    max_grad_norm: float = flag(1.0, help="gradients are scaled down to this norm", group="update")
    early_stopping: bool = flag(False, help="leave out a batch's other epochs past 1.5 x target_kl", group="update")
    target_kl: float = flag(0.1, help="nats a token that one update may move, for --early_stopping", group="update")
    gamma: float = flag(1.0, help="discount", group="update")
    lam: float = flag(0.95, help="lambda of GAE", group="update")
    cliprange: float = flag(0.2, help="of the ratio", group="update")
    cliprange_value: float = flag(0.2, help="of the value", group="update")
    vf_coef: float = flag(0.1, help="weight of the value loss", group="update")
    old_logprobs: str = flag(
        "auto",
        help="as sampled, or recomputed before the update; auto: recomputed only in half precision",
        group="update",
        choices=["auto", "sampled", "recomputed"],
    )
    forward_batch_size: int = flag(32, help="rows at once in passes without gradient", group="machine")
    # ---- report ----
    judge_lora_path: str | None = flag(
        None, help="second reward adapter that PPO does not see: chooses best/ at evaluations", group="artefacts"
    )
    best_kl_budget: float = flag(10.0, help="without a judge best/ is the best score within this KL, nats a response")
    on_collapse: str = flag(
        "stop",
        help="when length, emptiness, KL or entropy tell of a collapse: stop (exit code 3), rollback, or off",
        choices=["stop", "rollback", "off"],
    )
    max_rollbacks: int = flag(3, help="rollbacks before the run stops")
    check: bool = flag(True, help="before the first step look for what makes PPO silently wrong, on one batch")
    eval_freq: int = flag(0, help="steps between evaluations on held-out prompts; 0: none")
    eval_prompts: int = flag(64, help="held-out prompts of an evaluation, at most")
    sample_freq: int = flag(10, help="steps between printed samples (all of that batch go to samples.jsonl)")

    def __post_init__(self):
        CommonArguments.__post_init__(self)
        DataArguments.__post_init__(self)
        if self.batch_size % self.mini_batch_size:
            raise ValueError(
                f"--batch_size {self.batch_size} must be a multiple of --mini_batch_size {self.mini_batch_size}"
            )
        for name in ("steps", "batch_size", "mini_batch_size", "ppo_epochs", "gradient_accumulation_steps",
                     "output_max_length", "forward_batch_size", "sample_freq"):  # fmt: skip
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} {getattr(self, name)} must be at least 1")
        if self.temperature <= 0:
            raise ValueError(
                f"--temperature {self.temperature} must be above 0: PPO needs a distribution to sample from"
            )
        if self.min_new_tokens >= self.output_max_length:
            raise ValueError("--min_new_tokens must be below --output_max_length")
        if self.save_freq is not None and self.save_freq < 1:
            raise ValueError(f"--save_freq {self.save_freq} must be at least 1, or be left out")


def parse_args(argv: list[str] | None = None) -> ScriptArguments:
    """Parse and check a command line (values and combinations; `main` checks the paths)."""
    return parse(ScriptArguments, argv, __doc__)


# ---- data ----
def load_prompts(
    args: ScriptArguments, tokenizer, bad_rows_file: Path | None
) -> tuple[list[dict], list[dict], Funnel]:
    """Training prompts, held-out prompts (only where --eval_freq asks for them) and the funnel."""
    if args.eval_freq:
        rows, held_out, funnel = load_splits(args, "prompt", args.seed, bad_rows_file)
    else:
        rows, funnel = load_rows(args.dataset_name, "prompt", args.train_split, args=args, bad_rows_file=bad_rows_file)
        held_out = []
    held_out = subset(held_out, args.eval_prompts, args.seed, funnel)
    encoded = [
        prompt_rows(tokenizer, part, args.prompt_template, args.max_prompt_length, funnel) for part in (rows, held_out)
    ]
    if not encoded[0]:
        raise ValueError(f"no prompt of {args.dataset_name} fits into --max_prompt_length {args.max_prompt_length}")
    return *encoded, funnel


# ---- one step ----
def train_step(loop: Loop, step: int) -> tuple[dict, list[dict]]:
    """One PPO step. Returns its metrics, the same on every rank, and this rank's rows in words."""
    clock = [time.perf_counter()]
    loop.roles.train(False)
    rollout = sample_responses(loop, next_prompts(loop, step), loop.generator(step, "rollout"))
    clock.append(time.perf_counter())
    raw_scores = score_responses(loop, rollout)
    record_logprobs(loop, rollout)
    numbers = {"log-probability": rollout.logprobs, "value": rollout.values, "score": raw_scores}
    refuse_non_finite(loop.accelerator, numbers | {"reference log-probability": rollout.ref_logprobs})
    scores = transform_scores(loop, raw_scores, rollout)
    rewards, kl = set_advantages(loop, rollout, scores)
    clock.append(time.perf_counter())
    moved = update(
        loop.roles,
        loop.optimizer,
        rollout,
        loop.sampling,
        loop.args,
        loop.accelerator,
        loop.generator(step, "update"),
    )
    clock.append(time.perf_counter())
    columns = {"score": scores, "raw_score": raw_scores, "kl": kl.sum(1), "reward": rewards.sum(1)}
    samples = in_words(loop.tokenizer, rollout, columns, loop.sampling.eos_token_id)
    metrics = {"step": step + 1, **describe(loop.accelerator, rollout, samples), **moved}
    metrics |= {"kl_coef": loop.kl_controller.value, "lr": loop.optimizer.param_groups[0]["lr"]}
    metrics |= timings(loop.accelerator, rollout, clock)
    loop.kl_controller.update(metrics["kl/mean"], loop.args.batch_size * loop.accelerator.num_processes)
    return metrics, samples


def evaluate(loop: Loop) -> dict[str, float]:
    """The policy on the held-out prompts, with the same random draws each time; metrics under eval/."""
    rank, ranks = loop.accelerator.process_index, loop.accelerator.num_processes
    # As many on every rank, so that they gather; the few left over are not asked.
    prompts = loop.eval_prompts[rank : len(loop.eval_prompts) // ranks * ranks : ranks]
    loop.roles.train(False)
    rollout = sample_responses(loop, prompts, loop.generator(0, "evaluation"))
    raw_scores = score_responses(loop, rollout)
    record_logprobs(loop, rollout)
    kl = (rollout.logprobs - rollout.ref_logprobs).sum(1)
    scores = transform_scores(loop, raw_scores, rollout)
    rewards = scores - loop.kl_controller.value * kl
    columns = {"score": scores, "raw_score": raw_scores, "kl": kl, "reward": rewards}
    samples = in_words(loop.tokenizer, rollout, columns, loop.sampling.eos_token_id)
    found = describe_samples(loop.accelerator, rollout, samples)
    if loop.args.judge_lora_path:
        found["judge/mean"] = loop.accelerator.gather(score_responses(loop, rollout, "judge")).mean().item()
    return {f"eval/{name}": value for name, value in found.items() if name != "env/reward_mean"}


def is_best(loop: Loop, metrics: dict) -> bool:
    """Whether this evaluation is the best so far, by the judge or by the score within the KL budget; remembers it."""
    value = metrics.get("eval/judge/mean", metrics["eval/score/mean"])
    if not loop.args.judge_lora_path and metrics["eval/kl/mean"] > loop.args.best_kl_budget:
        return False
    if loop.best and value <= loop.best["value"]:
        return False
    loop.best = {"step": metrics["step"], "value": value}
    return True


# ---- start, checkpoint, end ----
def measure_sft_scores(loop: Loop) -> dict[str, float]:
    """Mean and standard deviation of the raw scores of the SFT model's own answers: what `standardize` stands on."""
    batches = max(1, round(STATISTICS_SAMPLES / (loop.args.batch_size * loop.accelerator.num_processes)))
    loop.roles.train(False)
    rollouts = [sample_responses(loop, next_prompts(loop, n), loop.generator(n, "statistics")) for n in range(batches)]
    scores = torch.cat([score_responses(loop, rollout) for rollout in rollouts])
    mean, variance = global_moments(loop.accelerator, scores, torch.ones_like(scores, dtype=torch.bool))
    if variance == 0:
        raise ValueError("the reward model gives all answers of the SFT model one score: it cannot teach anything")
    return {"mean": mean.item(), "std": variance.sqrt().item()}


def save_stage(loop: Loop, folder: Path, run: dict, metrics: dict) -> None:
    """The policy's adapter, value head, tokenizer and run.json: all that later stages and other tools need."""
    save_adapter(loop.roles.peft_model, folder, "policy")
    save_value_head(loop.roles.value_head, folder)
    loop.tokenizer.save_pretrained(folder)
    write_run(folder, stage="ppo", args=loop.args, tokenizer=loop.tokenizer, metrics=metrics, **run)


def save_checkpoint(loop: Loop, name: str, run: dict, metrics: dict) -> None:
    """step_<n>/ or best/: the stage's files and what a restart needs, complete or not there at all."""

    def write(folder: Path) -> None:
        save_stage(loop, folder, run, metrics)
        state = {name: getattr(loop, name) for name in KEPT} | {"step": metrics["step"]}
        state |= {"kl_coef": loop.kl_controller.value, "guard": loop.guard.state_dict()}
        save_state(folder, loop.optimizer, state | {"processes": loop.accelerator.num_processes})

    if loop.accelerator.is_main_process:
        publish(Path(loop.args.output_dir), name, write)
    loop.accelerator.wait_for_everyone()


def resume(loop: Loop, folder: Path) -> int:
    """Put back the state of a checkpoint (its weights are loaded already); returns the steps that are done."""
    state = load_state(folder, loop.optimizer)
    if state["processes"] != loop.accelerator.num_processes:
        raise ValueError(
            f"{folder} was written by {state['processes']} processes, this run has {loop.accelerator.num_processes}: "
            "the same number is needed to go on exactly"
        )
    for name in KEPT:
        setattr(loop, name, state[name])
    loop.kl_controller.value = state["kl_coef"]
    loop.guard.load_state_dict(state["guard"])
    return state["step"]


def check_start(loop: Loop, fresh: bool) -> None:
    """Refuse to start on a defect that would make PPO silently wrong; a few seconds on a few answers."""
    prompts = next_prompts(loop, 0)[:8]
    loop.roles.train(False)
    rollout = sample_responses(loop, prompts, loop.generator(0, "check"))
    for warning in check_run(loop.roles, loop.tokenizer, rollout, loop.sampling, fresh):
        warnings.warn(warning, stacklevel=2)
    if loop.accelerator.is_main_process:
        print("check: log-probabilities, scores, reference and stop token are as they should be", flush=True)


def check_inputs(args: ScriptArguments, tokenizer) -> dict:
    """Refuse what does not belong together, before any model is loaded; returns what run.json says of the inputs."""
    base = base_fingerprint(args.base_model_name)
    wanted = {"base": base, "tokenizer": tokenizer, "template": args.prompt_template}
    sft, reward = args.sft_model_lora_path, args.reward_model_lora_path
    check_adapter(sft, stage=("sft", "ppo"), flag="--sft_model_lora_path", **wanted)
    check_adapter(reward, stage="reward", flag="--reward_model_lora_path", **wanted)
    parents = {"sft": sft, "reward": reward}
    if args.judge_lora_path:
        check_adapter(args.judge_lora_path, stage="reward", flag="--judge_lora_path", **wanted)
        parents["judge"] = args.judge_lora_path
    return {"base": base, "template": args.prompt_template, "parents": parents}


def make_loop(args: ScriptArguments, accelerator: Accelerator, tokenizer, prompts: tuple, start: Path | None) -> Loop:
    """Load the roles (from a checkpoint, if there is one) and build the optimizer round what they train."""
    roles = load_roles(
        args.base_model_name,
        args.sft_model_lora_path,
        args.reward_model_lora_path,
        dtype=pick_dtype(args.bf16),
        device=accelerator.device,
        merged_sft_dir=args.merged_sft_model_path,
        policy_dir=start,
        judge_dir=args.judge_lora_path,
    )
    if args.gradient_checkpointing:
        roles.model.gradient_checkpointing_enable({"use_reentrant": False})
    trained = list(roles.trainable().values())
    if args.adafactor:
        optimizer = Adafactor(
            trained, lr=args.learning_rate, scale_parameter=False, relative_step=False, warmup_init=False
        )
    else:
        optimizer = torch.optim.Adam(trained, lr=args.learning_rate, eps=1e-5, fused=accelerator.device.type == "cuda")
    adaptive = ppo.AdaptiveKLController(args.init_kl_coef, args.adap_kl_target, args.adap_kl_horizon)
    return Loop(
        args=args,
        accelerator=accelerator,
        tokenizer=tokenizer,
        roles=roles,
        prompts=prompts[0],
        eval_prompts=prompts[1],
        sampling=Sampling(
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            max_new_tokens=args.output_max_length,
            temperature=args.temperature,
            min_new_tokens=args.min_new_tokens,
            suppress_empty=args.suppress_empty,
            top_k=args.top_k,
            top_p=args.top_p,
        ),
        optimizer=optimizer,
        kl_controller=adaptive if args.adap_kl_ctrl else ppo.FixedKLController(args.init_kl_coef),
        guard=CollapseGuard(kl_budget=args.adap_kl_target),
    )


def train(loop: Loop, done: int, run: dict) -> dict:
    """Steps `done` to the end, each reported and every save_freq-th saved; returns the summary for run.json."""
    args, main = loop.args, loop.accelerator.is_main_process
    per_step = args.batch_size * loop.accelerator.num_processes
    total = -(-args.steps // per_step)
    if main:
        print(
            f"{total} steps of {per_step} responses; {args.mini_batch_size} rows a backward pass, an optimizer step "
            f"each {args.mini_batch_size * args.gradient_accumulation_steps * loop.accelerator.num_processes}",
            flush=True,
        )
    log = MetricsLog(args.output_dir, args.log_with, asdict(args), done) if main else None
    eta, metrics = Eta(total, done), log.last if main else {}
    parameters = list(loop.roles.trainable().values())
    good = snapshot(parameters, loop.optimizer)
    for step in range(done, total):
        start = snapshot(parameters, loop.optimizer)
        metrics, samples = train_step(loop, step)
        reason = None if args.on_collapse == "off" else loop.guard.judge(metrics)
        if reason is None:
            # The answers that this step judged came from the weights it started with: those are known to be good.
            good = start
        else:
            metrics |= {"guard": reason}
        if reason is None and args.eval_freq and (step + 1) % args.eval_freq == 0:
            metrics |= evaluate(loop)
        if main:
            log.write(metrics)
            print(step_line(metrics, total, eta.left(step + 1)), flush=True)
            if step in (0, total - 1) or (step + 1) % args.sample_freq == 0:
                log.write_samples([{"step": step + 1, **row} for row in samples])
        if reason is not None:
            # What was measured belongs to weights that are given up: nothing of this step is saved.
            recover(loop, parameters, good, reason)
            continue
        if "eval/score/mean" in metrics and is_best(loop, metrics):
            save_checkpoint(loop, "best", run, metrics)
        if args.save_freq and (step + 1) % args.save_freq == 0:
            save_checkpoint(loop, f"step_{step + 1}", run, metrics)
    if main:
        log.close()
    return {"steps": total, **metrics}


def recover(loop: Loop, parameters: list, good: tuple, reason: str) -> None:
    """Go back to the last good weights at twice the price of KL, if --on_collapse says so; else stop the run.

    Data and random draws go on from here, so what led into the collapse is not played again.

    Raises: Collapse (exit code 3) with the reason.
    """
    if loop.args.on_collapse == "stop" or loop.rollbacks == loop.args.max_rollbacks:
        raise Collapse(
            f"stopped by the guard: {reason}; no final adapter was written, earlier step_<n> and best/ are in "
            f"{loop.args.output_dir}. The reward model is the first to look at (README, 'What to watch in PPO')"
        )
    restore(parameters, loop.optimizer, good)
    loop.rollbacks += 1
    loop.kl_controller.value *= 2
    if loop.accelerator.is_main_process:
        print(f"rollback {loop.rollbacks}: {reason}; KL price now {loop.kl_controller.value:.3g}", flush=True)


def main(args: ScriptArguments) -> None:
    """Check, load, train, save."""
    args.base_model_name = resolve_model(args.base_model_name, "--base_model_name")
    if args.merged_sft_model_path:
        args.merged_sft_model_path = resolve_model(args.merged_sft_model_path, "--merged_sft_model_path")
    tokenizer = load_tokenizer(args.tokenizer_name or args.base_model_name)
    run = check_inputs(args, tokenizer)
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    if accelerator.is_main_process and not args.inspect_data:
        claim_output_dir(args.output_dir, bool(args.resume_from_checkpoint), args.overwrite_output_dir)
    accelerator.wait_for_everyone()
    bad_rows_file = None if args.inspect_data else Path(args.output_dir) / "bad_rows.jsonl"
    prompts, eval_prompts, funnel = load_prompts(args, tokenizer, bad_rows_file)
    if args.inspect_data:
        inspect_rows(tokenizer, prompts, funnel)
        return
    if accelerator.is_main_process:
        print(funnel.table(), flush=True)
    run["data"] = {"fingerprint": data_fingerprint(prompts), **funnel.as_dict()}
    start = to_resume(args.resume_from_checkpoint, args.output_dir)
    loop = make_loop(args, accelerator, tokenizer, (prompts, eval_prompts), start)
    done = resume(loop, start) if start else 0
    if args.reward_transform == "standardize" and not loop.reward_stats:
        loop.reward_stats = measure_sft_scores(loop)
    if args.check:
        check_start(loop, fresh=start is None)
    summary = train(loop, done, run)
    if accelerator.is_main_process:
        save_stage(loop, Path(args.output_dir), run, summary)
        print(f"policy adapter and value head saved in {args.output_dir}", flush=True)
    accelerator.end_training()


if __name__ == "__main__":
    run_script(main, parse_args)
