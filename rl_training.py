"""Stage 3: PPO on the SFT adapter, scored by the reward adapter, priced by its distance from the frozen SFT policy.

In:  a base model, an SFT adapter, a reward adapter, prompts.
Out: <output_dir>: the policy's adapter and value head, run.json, metrics.jsonl, samples.jsonl; step_<n>/ likewise.

    maximise  E[score(query, response)] - kl_coef * KL(policy || SFT),  by the clipped surrogate of PPO (rlhf/ppo.py)

    python rl_training.py --base_model_name baichuan-inc/baichuan-7B --sft_model_lora_path runs/sft \\
        --reward_model_lora_path runs/reward --dataset_name prompts.jsonl --output_dir runs/ppo --save_freq 10
"""

import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from transformers import Adafactor

from rlhf import ppo
from rlhf.arguments import CommonArguments, DataArguments
from rlhf.artefacts.adapters import check_adapter, check_merged
from rlhf.artefacts.checkpoint import to_resume
from rlhf.artefacts.output_dir import claim_output_dir
from rlhf.artefacts.resume import finished_run, refuse_changes
from rlhf.artefacts.run_json import base_fingerprint
from rlhf.cost.flops import flop_counts
from rlhf.cost.plan import plan_ppo
from rlhf.data.encoding import inspect_rows, load_tokenizer, prompt_rows
from rlhf.data.funnel import Funnel, subset
from rlhf.data.reading import data_fingerprint, load_rows, load_splits
from rlhf.flags import flag, parse
from rlhf.models.generation import Sampling
from rlhf.models.loading import pick_dtype, resolve_model
from rlhf.rl.arguments import RewardFlags, SamplingFlags, UpdateFlags, WatchFlags
from rlhf.rl.charts import draw_run
from rlhf.rl.check import check_start
from rlhf.rl.evaluation import best_in_words, evaluate, is_best, measure_sft_scores
from rlhf.rl.experience import (
    recomputes,
    record_logprobs,
    sample_responses,
    score_responses,
    set_advantages,
    transform_scores,
)
from rlhf.rl.gate import quick_gate, read_gate, stored_audit
from rlhf.rl.guard import CollapseGuard, refuse_non_finite
from rlhf.rl.loop import PPOLoop, next_prompts
from rlhf.rl.metrics import batch_sizes, describe, log_step, sample_records, timings, utilisation
from rlhf.rl.roles import Roles, load_roles
from rlhf.rl.state import (
    Snapshot,
    last_good,
    loop_weights,
    restore,
    resume,
    roll_back,
    save_checkpoint,
    save_interrupted,
    save_stage,
    snapshot,
)
from rlhf.rl.update import update
from rlhf.run.launch import require_optional, run_script
from rlhf.run.log import Eta, MetricsLog
from rlhf.run.stopping import Interrupted


@dataclass(kw_only=True)
class ScriptArguments(CommonArguments, DataArguments, SamplingFlags, RewardFlags, UpdateFlags, WatchFlags):
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

    def __post_init__(self):
        for part in (CommonArguments, DataArguments, SamplingFlags, RewardFlags, UpdateFlags, WatchFlags):
            part.__post_init__(self)
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
def train_step(loop: PPOLoop, step: int) -> tuple[dict, list[dict]]:
    """One PPO step. Returns its metrics, the same on every rank, and this rank's rows in words."""
    args, clock = loop.args, [time.perf_counter()]
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
    loop.set_learning_rate(step)
    moved = update(
        loop.roles,
        loop.optimizer,
        rollout,
        loop.sampling,
        args,
        loop.accelerator,
        loop.generator(step, "update"),
        critic_only=step < args.critic_warmup_steps,
    )
    clock.append(time.perf_counter())
    columns = {"score": scores, "raw_score": raw_scores, "kl": kl.sum(1), "reward": rewards.sum(1)}
    samples = sample_records(loop.tokenizer, rollout, columns, loop.sampling.eos_token_id)
    metrics = {"step": step + 1, **describe(loop.accelerator, rollout, samples), **moved}
    metrics |= {
        "kl_coef": loop.kl_controller.value,
        "left_out": loop.left_out,
        "lr": loop.optimizer.param_groups[0]["lr"],
    }
    metrics |= timings(loop.accelerator, rollout, clock)
    metrics |= utilisation(
        loop.accelerator,
        rollout,
        flop_counts(loop.roles.model, loop.roles.model.config),
        metrics["time/step"],
        passes=2 + recomputes(loop) + loop.roles.value_adapter,
        epochs=moved["epochs"],
        checkpointing=args.gradient_checkpointing,
    )
    loop.kl_controller.update(metrics["kl/mean"], args.batch_size * loop.processes)
    return metrics, samples


def measure_start(loop: PPOLoop, fresh: bool) -> None:
    """What is known before the first step: the SFT model's scores and evaluation (once), and that all is in order."""
    args = loop.args
    if args.reward_transform == "standardize" and not loop.reward_stats:
        if not fresh:
            raise ValueError("the checkpoint was made without --reward_transform standardize: go on as it began")
        loop.reward_stats = measure_sft_scores(loop)
    if args.eval_freq and fresh:
        loop.baseline = evaluate(loop)[0]
    if args.check:
        check_start(loop, fresh)
    if fresh and stored_audit(args.reward_model_lora_path) is None:
        quick_gate(loop)


def check_inputs(args: ScriptArguments, tokenizer) -> dict:
    """Refuse what does not belong together, before any model is loaded; returns what run.json says of the inputs."""
    base = base_fingerprint(args.base_model_name)
    wanted = {"base": base, "tokenizer": tokenizer, "template": args.prompt_template}
    sft, reward = args.sft_model_lora_path, args.reward_model_lora_path
    check_adapter(sft, stage=("sft", "ppo"), flag="--sft_model_lora_path", **wanted)
    check_adapter(reward, stage="reward", flag="--reward_model_lora_path", **wanted)
    if args.merged_sft_model_path:
        check_merged(args.merged_sft_model_path, base=base, sft_dir=sft, flag="--merged_sft_model_path")
    read_gate(reward, args.reward_gate)
    parents = {"sft": sft, "reward": reward}
    if args.judge_lora_path:
        check_adapter(args.judge_lora_path, stage="reward", flag="--judge_lora_path", **wanted)
        parents["judge"] = args.judge_lora_path
    return {"base": base, "template": args.prompt_template, "parents": parents}


def make_roles(args: ScriptArguments, device: torch.device, start: Path | None) -> Roles:
    """Base and adapters, policy and critic from a checkpoint if there is one."""
    critic = ("adapter" if args.value_lora else "head") if args.advantage == "gae" else None
    roles = load_roles(
        args.base_model_name,
        args.sft_model_lora_path,
        args.reward_model_lora_path,
        dtype=pick_dtype(args.bf16),
        device=device,
        merged_sft_dir=args.merged_sft_model_path,
        policy_dir=start,
        judge_dir=args.judge_lora_path,
        critic=critic,
        four_bit=args.load_in_4bit,
    )
    if args.gradient_checkpointing:
        roles.enable_checkpointing()
    return roles


def make_optimizer(args: ScriptArguments, roles: Roles) -> torch.optim.Optimizer:
    """Adam (or Adafactor) over policy adapter and critic."""
    trained = list(roles.trainable().values())
    if args.adafactor:
        return Adafactor(trained, lr=args.learning_rate, scale_parameter=False, relative_step=False, warmup_init=False)
    return torch.optim.Adam(trained, lr=args.learning_rate, eps=1e-5, fused=trained[0].device.type == "cuda")


def make_loop(
    args: ScriptArguments, accelerator: Accelerator, tokenizer, prompts: tuple, start: Path | None
) -> PPOLoop:
    """Everything the steps share: roles, what trains them, how they sample, what is watched."""
    roles = make_roles(args, accelerator.device, start)
    adaptive = ppo.AdaptiveKLController(args.init_kl_coef, args.adap_kl_target, args.adap_kl_horizon)
    return PPOLoop(
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
            cuda_graphs=args.cuda_graphs,
        ),
        optimizer=make_optimizer(args, roles),
        kl_controller=adaptive if args.adap_kl_ctrl else ppo.FixedKLController(args.init_kl_coef),
        guard=CollapseGuard(kl_budget=args.adap_kl_target),
    )


# ---- training ----
def train(loop: PPOLoop, done: int, run: dict) -> dict:
    """Steps `done` to the end, each reported and every save_freq-th saved; returns the last step's metrics."""
    args, total = loop.args, loop.total_steps
    log = MetricsLog(args.output_dir, args.log_with, asdict(args), done) if loop.accelerator.is_main_process else None
    eta, metrics = Eta(total, done), {"step": done} | (log.last if log else {})
    loop.last_good = loop.last_good or loop_weights(loop)
    try:
        for step in range(done, total):
            start = snapshot(loop)
            try:
                found, samples = train_step(loop, step)
                reason = evaluate_and_guard(loop, found, samples)
            except Interrupted as stop:
                raise Interrupted(stop.signum, save_interrupted(loop, start, run, metrics | {"step": step})) from None
            except FloatingPointError as error:
                skip_or_stop(loop, start, error)
                continue
            metrics = found
            if log:
                log_step(log, metrics, samples, total, eta, args.sample_freq)
            if reason is None:
                loop.last_good = last_good(loop, metrics, start.weights)
                save_what_is_due(loop, step, run, metrics)
            else:
                # What was measured belongs to weights that are given up: nothing of this step is saved.
                roll_back(loop, reason)
    finally:
        if log:
            log.close()
            draw_run(args.output_dir)
    return metrics


def skip_or_stop(loop: PPOLoop, start: Snapshot, error: FloatingPointError) -> None:
    """A number that is not finite: the run as before the step, which is left out or ends the run (--on_non_finite)."""
    restore(loop, start)
    if loop.args.on_non_finite == "stop":
        raise error
    loop.left_out += 1
    if loop.accelerator.is_main_process:
        print(f"left out, step {loop.left_out} of this kind: {error}", flush=True)


def evaluate_and_guard(loop: PPOLoop, metrics: dict, samples: list[dict]) -> str | None:
    """Evaluate where it is due (into `metrics` and `samples`); the guard's reason to give this step up, or None."""
    args, step = loop.args, metrics["step"]
    if step == 1:
        metrics |= {f"eval_start/{name.removeprefix('eval/')}": value for name, value in loop.baseline.items()}
    reason = None if args.on_collapse == "off" else loop.guard.check_step(metrics)
    if reason is None and args.eval_freq and step % args.eval_freq == 0:
        found, answers = evaluate(loop)
        metrics |= found
        samples += [{"evaluation": True, **row} for row in answers]
        reason = None if args.on_collapse == "off" else loop.guard.check_evaluation(metrics, loop.baseline)
    if reason is not None:
        metrics["guard"] = reason
    return reason


def save_what_is_due(loop: PPOLoop, step: int, run: dict, metrics: dict) -> None:
    """best/ after the best evaluation so far, step_<n>/ every save_freq steps."""
    if "eval/score/mean" in metrics and is_best(loop, metrics, step + 1):
        save_checkpoint(loop, "best", run, metrics)
    if loop.args.save_freq and (step + 1) % loop.args.save_freq == 0:
        save_checkpoint(loop, f"step_{step + 1}", run, metrics)


def closing_words(loop: PPOLoop) -> str:
    """Where the result is, and which evaluation was the best."""
    words = f"policy adapter saved in {loop.args.output_dir}, chart in {loop.args.output_dir}/chart.png"
    return f"{words}\n{best_in_words(loop)}" if loop.best else words


def main(args: ScriptArguments) -> None:
    """Check, load, train, save."""
    if args.plan:
        print(plan_ppo(args, "rl_training.py"))
        return
    require_optional(args)
    if not args.inspect_data and finished_run(args, "ppo"):
        print(f"{args.output_dir} is finished: --overwrite_output_dir True trains it again", flush=True)
        return
    args.base_model_name = resolve_model(args.base_model_name, "--base_model_name")
    if args.merged_sft_model_path:
        args.merged_sft_model_path = resolve_model(args.merged_sft_model_path, "--merged_sft_model_path")
    tokenizer = load_tokenizer(args.tokenizer_name or args.base_model_name)
    run = check_inputs(args, tokenizer)
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    writes = accelerator.is_main_process and not args.inspect_data
    if writes:
        claim_output_dir(args.output_dir, bool(args.resume_from_checkpoint), args.overwrite_output_dir)
    accelerator.wait_for_everyone()
    bad_rows_file = Path(args.output_dir) / "bad_rows.jsonl" if writes else None
    prompts, eval_prompts, funnel = load_prompts(args, tokenizer, bad_rows_file)
    if args.inspect_data:
        inspect_rows(tokenizer, prompts, funnel)
        return
    if args.eval_freq and len(eval_prompts) < accelerator.num_processes:
        raise ValueError(f"{len(eval_prompts)} held-out prompts for {accelerator.num_processes} processes are too few")
    run["data"] = {"fingerprint": data_fingerprint(prompts), **funnel.as_dict()}
    start = to_resume(args.resume_from_checkpoint, args.output_dir)
    if start:
        refuse_changes(start, args, run, accelerator.num_processes)
    loop = make_loop(args, accelerator, tokenizer, (prompts, eval_prompts), start)
    if accelerator.is_main_process:
        print(f"{funnel.table()}\n{batch_sizes(loop)}", flush=True)
    done = resume(loop, start) if start else 0
    measure_start(loop, fresh=start is None)
    summary = train(loop, done, run)
    if accelerator.is_main_process:
        save_stage(loop, Path(args.output_dir), run, {"steps": loop.total_steps, **summary, "best": loop.best})
        print(closing_words(loop), flush=True)
    accelerator.end_training()


if __name__ == "__main__":
    run_script(main, parse_args)
