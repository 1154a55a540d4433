"""This project's PPO: rl_training.train_step on what rl_training.make_loop makes, without the checks before the start.

One base, on it the SFT adapter twice (policy, reference) and the reward adapter; log-probabilities and values are kept
from sampling. rollout: sampling. score: rewards, reference log-probabilities, advantages. update: the epochs. total:
all of a step as rl_training.train has it, the snapshot to roll back to included, metrics.jsonl and its like left out.
"""

import time

import torch
import transformers
from accelerate import Accelerator

import rl_training
from benchmarks.peers.worker import Movement, read_workload, report, say, steps_in_turn
from rlhf.data.choose_format import text_format
from rlhf.data.encoding import load_tokenizer
from rlhf.rl import evaluation
from rlhf.rl.state import snapshot
from rlhf.run.launch import silence_libraries


def arguments(workload: dict, folder) -> rl_training.ScriptArguments:
    """The workload as a command line."""
    flags = {
        "base_model_name": folder / "base", "sft_model_lora_path": folder / "sft",
        "output_dir": folder / "out",
        "batch_size": workload["batch_size"], "mini_batch_size": workload["mini_batch_size"],
        "gradient_accumulation_steps": workload["accumulation"], "ppo_epochs": workload["ppo_epochs"],
        "learning_rate": workload["learning_rate"], "output_max_length": workload["max_new_tokens"],
        "init_kl_coef": workload["kl_coef"],
        # Passes without gradient stay within the caches of a CPU.
        "forward_batch_size": 8,
        "steps": workload["steps"] * workload["batch_size"], "suppress_empty": False, "reward_transform": "raw",
    }  # fmt: skip
    words = []
    for name, value in flags.items():
        words += [f"--{name}", str(value)]
    # Of several reward models, the first has the name of an only one.
    more = [str(folder / f"reward_{number}") for number in range(2, workload.get("members", 1) + 1)]
    return rl_training.parse_args([*words, "--reward_model_lora_path", str(folder / "reward"), *more])


def main() -> None:
    """Compute the steps in turn, report."""
    workload, folder = read_workload()
    silence_libraries()
    args = arguments(workload, folder)
    # The prompts are encoded already; without evaluation prompts nothing is evaluated.
    rows = [{"prompt": "", "query_ids": ids} for ids in workload["prompts"]]
    prompt_format = text_format(load_tokenizer(args.base_model_name))
    loop = rl_training.make_loop(args, Accelerator(cpu=True), prompt_format, (rows, []), None)
    # Several reward models are compared in standard deviations of the SFT model's answers.
    if workload.get("members", 1) > 1:
        loop.reward_stats = evaluation.measure_sft_scores(loop)
    movement = Movement(loop.roles.adapter("policy").values())

    clock = time.process_time if workload.get("cpu_seconds") else time.perf_counter
    for step in steps_in_turn(workload["steps"]):
        # A run takes a snapshot before each step, so its time counts here.
        start = clock()
        kept = snapshot(loop)
        metrics, _ = rl_training.train_step(loop, step, clock)
        seconds = {name: metrics[f"time/{name}"] for name in ("rollout", "score", "update")}
        tokens = metrics["len/mean"] * args.batch_size
        say(**seconds, total=clock() - start, tokens=tokens)
        del kept

    report({"torch": torch.__version__, "transformers": transformers.__version__}, movement.largest())


if __name__ == "__main__":
    main()
