"""Stage 3: PPO on the SFT adapter, scored by the reward adapter, with a KL penalty to the frozen SFT policy.

In:  a base model, an SFT adapter, a reward adapter, prompts.
Out: <output_dir>: the policy's adapter and value head, run.json, metrics.jsonl, samples.jsonl; the same in step_<n>/.

    maximise  E[score(query, response)] - kl_coef * KL(policy || SFT),  by the clipped surrogate of PPO (rlhf/ppo.py)

    python rl_training.py --base_model_name baichuan-inc/baichuan-7B --sft_model_lora_path runs/sft \\
        --reward_model_lora_path runs/reward --dataset_name prompts.jsonl --output_dir runs/ppo --save_freq 10
"""

import time
from dataclasses import asdict, dataclass
from pathlib import Path

from rlhf.arguments import CommonArguments, LoraArguments
from rlhf.data.arguments import DataArguments
from rlhf.flags import parse
from rlhf.rl.arguments import RewardFlags, SamplingFlags, WatchFlags
from rlhf.rl.artefact_flags import ArtefactFlags
from rlhf.rl.ensemble_flags import EnsembleFlags
from rlhf.rl.function_flags import FunctionFlags
from rlhf.rl.update_flags import UpdateFlags
from rlhf.run import startup
from rlhf.run.sharing import DecodeFlags


@dataclass(kw_only=True)
class ScriptArguments(
    ArtefactFlags, CommonArguments, LoraArguments, DataArguments, SamplingFlags, DecodeFlags, RewardFlags,
    EnsembleFlags, FunctionFlags, UpdateFlags, WatchFlags,
):  # fmt: skip
    """Flags of rl_training.py; every flag the tutorial had still parses."""


def parse_args(argv: list[str] | None = None) -> ScriptArguments:
    """Parse and check a command line (values and combinations; `main` checks the paths)."""
    return parse(ScriptArguments, argv, __doc__)


# A wrong flag, --help and Ctrl-C end here: the libraries below take seconds to load.
if __name__ == "__main__":
    given = startup.begin(parse_args)

import torch
from accelerate import Accelerator

from rlhf import ppo
from rlhf.artefacts import checkpoint, output_dir, resume
from rlhf.cost import flops, plan
from rlhf.data import encoding, inspection, reading
from rlhf.data.cache import prepared
from rlhf.data.choose_format import choose_format
from rlhf.data.funnel import Funnel
from rlhf.data.prompt_format import PromptFormat
from rlhf.data.rows import Rows
from rlhf.models import generation, loading, shards, tensor_parallel
from rlhf.page import report
from rlhf.reward import length_file
from rlhf.rl import charts, evaluation, experience, groups, guard, metrics, rewards, roles, starting, state, update
from rlhf.rl.loop import PPOLoop, next_prompts
from rlhf.rl.reward_functions import load_functions
from rlhf.run import launch, pictures, stopping
from rlhf.run.log import Eta, MetricsLog


# ---- data ----
def load_prompts(
    args: ScriptArguments, prompt_format: PromptFormat, bad_rows_file: Path | None
) -> tuple[Rows, Rows, Funnel]:
    """Training prompts, held-out prompts and the funnel."""
    dataset = prepared(args, prompt_format, starting.prepare, bad_rows_file)
    if not dataset.rows["train"]:
        raise ValueError(f"no prompt of {args.dataset_name} fits into --max_prompt_length {args.max_prompt_length}")
    return dataset.rows["train"], dataset.rows["evaluation"], dataset.funnel


# ---- one step ----
def train_step(loop: PPOLoop, step: int, clock=time.perf_counter) -> tuple[dict, list[dict]]:
    """One PPO step.

    Args:
        step: number of the step, from 0. clock: seconds now; read four times, between the phases.
    Returns: its metrics, the same on every rank, and this rank's rows as samples with text.
    """
    args = loop.args
    accelerator = loop.accelerator
    times = [clock()]

    # 1. Sample
    # Sampling refuses train mode, and dropout would make the recorded log-probabilities those of other models.
    loop.roles.train(False)
    prompts = next_prompts(loop, step)
    rollout = experience.sample_responses(loop, prompts, loop.generator(step, "rollout"))
    times.append(clock())

    # 2. Score under every role
    parts = rewards.raw_parts(loop, rollout, prompts)
    # Before reference and critic look at the batch: what is replaced would be computed for nothing.
    if args.drop_dead_groups:
        rollout, _, parts = groups.replace_dead_groups(loop, step, (rollout, prompts, parts))
    raw_scores = rewards.raw_score(loop, parts)
    experience.record_logprobs(loop, rollout)
    numbers = {"log-probability": rollout.logprobs, "value": rollout.values, "score": raw_scores}
    numbers |= {"reference log-probability": rollout.ref_logprobs}
    # Before any mean over the batch: whitening would carry one NaN into every advantage.
    guard.refuse_non_finite(accelerator, numbers)

    # 3. Rewards and advantages
    scores = rewards.total(loop, parts, rollout)
    token_rewards, kl = experience.set_advantages(loop, rollout, scores)
    times.append(clock())

    # 4. Update
    loop.set_learning_rate(step)
    order = loop.generator(step, "update")
    critic_only = step < args.critic_warmup_steps
    moved = update.update(loop.roles, loop.optimizer, rollout, loop.sampling, args, accelerator, order, critic_only)
    times.append(clock())

    # 5. What the log says
    columns = {"score": scores, "raw_score": raw_scores, "kl": kl.sum(1), "reward": token_rewards.sum(1)}
    columns |= rewards.part_columns(loop, parts)
    samples = metrics.sample_records(loop.tokenizer, rollout, columns, loop.sampling.stop_ids)
    record = {"step": step + 1, **metrics.describe(accelerator, rollout, samples), **moved}
    record |= rewards.describe_parts(loop, parts) | groups.describe_groups(loop, scores)
    lr = loop.optimizer.param_groups[0]["lr"]
    record |= {"kl_coef": loop.kl_controller.value, "left_out": loop.left_out, "lr": lr}
    record |= metrics.timings(accelerator, rollout, times)
    work = flops.flop_counts(loop.roles.model, loop.roles.model.config)
    scorers = max(1, len(args.reward_roles))
    passes = {"passes": 1 + scorers + experience.recomputes(loop) + loop.roles.value_adapter}
    passes |= {"epochs": moved["epochs"], "checkpointing": args.gradient_checkpointing}
    record |= metrics.utilisation(accelerator, rollout, work, record["time/step"], **passes)
    # The next step's KL penalty follows from this step's KL.
    loop.kl_controller.update(record["kl/mean"], args.batch_size * loop.processes)
    return record, samples


# ---- start ----
def make_roles(args: ScriptArguments, device: torch.device, start: Path | None) -> roles.Roles:
    """Base and adapters; policy and critic come from a checkpoint if there is one."""
    members = args.reward_roles
    # A critic is a head on the policy's own states, or an adapter that starts as the reward model.
    critic = None
    if args.advantage == "gae":
        critic = "adapter" if args.value_lora else "head"

    loaded = roles.load_roles(
        args.base_model_name,
        args.sft_model_lora_path,
        members.pop("reward", None),
        more_rewards=members,
        dtype=loading.pick_dtype(args.bf16),
        device=device,
        # The shape of a fresh policy, where there is no SFT adapter to go on from.
        new_adapter=args,
        merged_sft_dir=args.merged_sft_model_path,
        policy_dir=start,
        judge_dir=args.judge_lora_path,
        critic=critic,
        four_bit=args.load_in_4bit,
        mesh=shards.base_mesh(args.shard_base),
    )
    if args.gradient_checkpointing:
        loaded.enable_checkpointing()
    return loaded


def make_loop(
    args: ScriptArguments, accelerator: Accelerator, prompt_format: PromptFormat, prompts: tuple, start: Path | None
) -> PPOLoop:
    """Everything the steps share: roles, what trains them, how they sample, what is watched."""
    loaded = make_roles(args, accelerator.device, start)
    kl_controller = ppo.FixedKLController(args.init_kl_coef)
    if args.adap_kl_ctrl:
        kl_controller = ppo.AdaptiveKLController(args.init_kl_coef, args.adap_kl_target, args.adap_kl_horizon)
    in_place = args.decode == "auto" and shards.mesh_of(loaded.model) is not None
    same_name = ("temperature", "min_new_tokens", "suppress_empty", "top_k", "top_p", "cuda_graphs")
    sampling = generation.Sampling(
        stop_ids=prompt_format.stop_ids,
        pad_token_id=prompt_format.pad_id,
        max_new_tokens=args.output_max_length,
        **{name: getattr(args, name) for name in same_name},
    )

    return PPOLoop(
        args=args,
        accelerator=accelerator,
        prompt_format=prompt_format,
        roles=loaded,
        prompts=prompts[0],
        eval_prompts=prompts[1],
        sampling=sampling,
        optimizer=update.make_optimizer(args, loaded),
        kl_controller=kl_controller,
        # No rise of the KL below the one that is aimed at counts as a collapse.
        guard=guard.CollapseGuard(kl_budget=args.adap_kl_target, spread_limit=args.ensemble_spread_limit),
        twin=tensor_parallel.sampler_of(loaded.model) if in_place else None,
        functions=load_functions(args.reward_functions),
        calibrations=length_file.calibrations(list(args.reward_roles.values())) if args.length_calibration else [],
    )


# ---- training ----
def train(loop: PPOLoop, done: int, run: dict) -> dict:
    """Run the steps from `done` to the end, log each, save every save_freq-th; return the last step's metrics."""
    args = loop.args
    total = loop.total_steps
    # Steps after the checkpoint are cut off here, because they are run once more.
    log = MetricsLog(args.output_dir, args.log_with, asdict(args), done) if loop.accelerator.is_main_process else None
    eta = Eta(total, done)
    last = {"step": done} | (log.last if log else {})
    # A resumed run brings them along in its checkpoint.
    loop.last_good = loop.last_good or state.loop_weights(loop)
    try:
        for step in range(done, total):
            # A step that is interrupted, not finite or a collapse is undone from here.
            start = state.snapshot(loop)
            try:
                record, samples = train_step(loop, step)
                reason = evaluate_and_guard(loop, record, samples)
            except stopping.Interrupted as stop:
                # The steps before this one are done, and this one is given up.
                raise stopping.Interrupted(
                    stop.signum, state.save_interrupted(loop, start, run, last | {"step": step})
                ) from None
            except FloatingPointError as error:
                skip_or_stop(loop, start, error)
                continue

            last = record
            if log:
                metrics.log_step(log, record, samples, total, eta, args.sample_freq)
                rewards.warn_of_dominating(loop, record)
            if reason is None:
                loop.last_good = state.last_good(loop, record, start.weights)
                save_what_is_due(loop, step, run, record)
            else:
                # What was measured belongs to weights that are given up: nothing of this step is saved.
                state.roll_back(loop, reason)
    finally:
        if log:
            log.close()
            # Also where an error ends the run: its curves are then the first to look at.
            pictures.attempt(charts.draw_run, args.output_dir)
            # A finished run has its report once its result is saved.
            if last["step"] < total or "guard" in last:
                report.write_at_end(args.output_dir)
    return last


def skip_or_stop(loop: PPOLoop, start: state.Snapshot, error: FloatingPointError) -> None:
    """Undo a step in which a number was NaN or Inf; leave it out, or end the run (--on_non_finite)."""
    state.restore(loop, start)
    if loop.args.on_non_finite == "stop":
        raise error
    loop.left_out += 1
    launch.say(f"left out, step {loop.left_out} of this kind: {error}")


def evaluate_and_guard(loop: PPOLoop, record: dict, samples: list[dict]) -> str | None:
    """Evaluate where it is due (into `record` and `samples`); return why the guard gives this step up, or None."""
    args = loop.args
    step = record["step"]
    if step == 1:
        # Beside the first step, so that one file holds what later evaluations are compared with.
        record |= {f"eval_start/{name.removeprefix('eval/')}": value for name, value in loop.baseline.items()}

    guarded = args.on_collapse != "off"
    reason = loop.guard.check_step(record) if guarded else None
    # A step that is given up is not worth an evaluation.
    if reason is None and args.eval_freq and step % args.eval_freq == 0:
        evaluated, answers = evaluation.evaluate(loop)
        record |= evaluated
        samples += [{"evaluation": True, **row} for row in answers]
        reason = loop.guard.check_evaluation(record, loop.baseline) if guarded else None
    if reason is not None:
        record["guard"] = reason
    return reason


def save_what_is_due(loop: PPOLoop, step: int, run: dict, record: dict) -> None:
    """Save best/ after the best evaluation so far, and step_<n>/ every save_freq steps."""
    if "eval/score/mean" in record and evaluation.is_best(loop, record, step + 1):
        state.save_checkpoint(loop, "best", run, record)
    if loop.args.save_freq and (step + 1) % loop.args.save_freq == 0:
        state.save_checkpoint(loop, f"step_{step + 1}", run, record)


def main(args: ScriptArguments) -> None:
    """Check, load, train, save."""
    # 1. Questions that need no model.
    if args.plan:
        print(plan.plan_ppo(args, "rl_training.py"))
        return
    launch.require_optional(args)

    # 2. Base, tokenizer and adapters have to belong together.
    args.base_model_name = loading.resolve_model(args.base_model_name, "--base_model_name")
    if args.merged_sft_model_path:
        args.merged_sft_model_path = loading.resolve_model(args.merged_sft_model_path, "--merged_sft_model_path")
    tokenizer = encoding.load_tokenizer(args.tokenizer_name or args.base_model_name)
    prompt_format = choose_format(args, tokenizer, args.base_model_name)
    chosen = starting.settle(args)
    if launch.already_finished(args, "ppo"):
        return
    longest = args.max_prompt_length + args.output_max_length
    loading.refuse_small_base(args.base_model_name, tokenizer, longest, "--max_prompt_length, --output_max_length")
    run = starting.check_inputs(args, prompt_format)

    # 3. Data; from here on the output directory is ours.
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    # A look at the data claims nothing: the directory may be another run's.
    writes = accelerator.is_main_process and not args.inspect_data
    old = starting.claim(args) if writes else []
    # The other ranks read on once the directory is this run's.
    accelerator.wait_for_everyone()
    bad_rows = Path(args.output_dir) / "bad_rows.jsonl"
    prompts, eval_prompts, funnel = load_prompts(args, prompt_format, bad_rows if writes else None)
    if args.inspect_data:
        return inspection.inspect_rows(prompt_format, prompts, funnel)
    if args.eval_freq and len(eval_prompts) < accelerator.num_processes:
        raise ValueError(f"{len(eval_prompts)} held-out prompts for {accelerator.num_processes} processes are too few")
    run["data"] = reading.fingerprints(prompts, eval_prompts) | funnel.as_dict()
    # Asked again: a path that is spelled otherwise can only be told by what it holds.
    if launch.already_finished(args, "ppo", run):
        return

    # 4. Models, from the start or from a checkpoint.
    start = checkpoint.to_resume(args.resume_from_checkpoint, args.output_dir)
    resume.refuse_changes(start, args, run, accelerator.num_processes)
    loop = make_loop(args, accelerator, prompt_format, (prompts, eval_prompts), start)
    # Only here, when all inputs are read and the models are in memory: a start that fails leaves the earlier run
    # whole.
    output_dir.clear(old)
    launch.say(prompt_format.describe(), funnel.table(), *chosen, metrics.batch_sizes(loop))

    # 5. Train, then save the policy.
    starting.say_start(loop)
    done = state.resume(loop, start) if start else 0
    starting.measure_start(loop, fresh=start is None)
    summary = train(loop, done, run)
    if accelerator.is_main_process:
        state.save_finished(loop, run, {"steps": loop.total_steps, **summary, "best": loop.best})
        report.write_at_end(args.output_dir)
        evaluation.say_finished(loop)
    accelerator.end_training()


if __name__ == "__main__":
    launch.run_main(main, given)
