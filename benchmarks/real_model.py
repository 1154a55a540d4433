"""A real chat model through all stages in its own format, beside TRL's RewardTrainer on the same pairs.

    python -m benchmarks.real_model --model DIR --data pairs.json more.json | tee benchmarks/results/real_model.log

The pairs are split by prompt: one half trains the reward model, the other half a judge that PPO never trains against;
both are evaluated on the same held-out pairs. Then TRL's RewardTrainer on the rows of the first half, with the same
seed, adapter and hyper-parameters; PPO from the bare chat model, without SFT; a merge, and greedy answers of the
merged model by plain transformers against those of compare.py. Any chat model and any pairs will do, on a GPU too; the
defaults are for 135 million parameters on two cores.
"""

import csv
import json
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from trl import RewardConfig, RewardTrainer

import compare
import merge_lora
import reward_modeling
import rl_training
from benchmarks.common import machine
from rlhf.artefacts.files import read_object
from rlhf.compare import tables
from rlhf.data.choose_format import choose_format
from rlhf.data.encoding import load_tokenizer
from rlhf.data.template import turns_of
from rlhf.flags import REQUIRED, flag, parse
from rlhf.models.lora import lora_config
from rlhf.reward.statistics import wilson
from rlhf.run.launch import silence_libraries
from rlhf.run.log import read_metrics


@dataclass(kw_only=True)
class Arguments:
    """Flags of benchmarks/real_model.py."""

    model: str = flag(REQUIRED, help="directory of a chat model")
    data: list[str] = flag(REQUIRED, help="files of preference pairs")
    output_dir: str = flag("runs/real_model", help="directory for what the stages leave; must not exist")
    max_length: int = flag(384, help="tokens of query and answer; longer pairs are left out")
    epochs: float = flag(1.0, help="passes over the pairs of a half")
    pairs_at_once: int = flag(4, help="pairs a step of the reward models")
    ppo_steps: int = flag(20, help="steps of PPO")
    batch_size: int = flag(8, help="responses a step of PPO")
    answer_tokens: int = flag(48, help="tokens of a response at most")
    peer: bool = flag(True, help="train TRL's RewardTrainer too")


# ---- in words ----
def say(title: str, **figures) -> None:
    """One line of the log."""
    shown = []
    for name, value in figures.items():
        shown.append(f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}")
    print(f"{title:<28} {', '.join(shown)}", flush=True)


def accuracy_in_words(accuracy: float, pairs: int) -> str:
    """An accuracy with its 95 % interval."""
    low, high = wilson(accuracy, pairs)
    return f"{accuracy:.3f} [{low:.3f}, {high:.3f}] of {pairs} pairs"


def main_of(script, **flags) -> None:
    """Run a script of this project in this process."""
    words = []
    for name, value in flags.items():
        words += [f"--{name}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    script.main(script.parse_args(words))


# ---- reward models ----
def pair_flags(args: Arguments, data: Path, half: int, folder: Path) -> dict:
    """Flags of a reward model on one half of the prompts."""
    return {
        "model_name": args.model, "dataset_name": data, "output_dir": folder, "split_half": half, "eval_size": 0.3,
        "num_train_epochs": args.epochs, "per_device_train_batch_size": args.pairs_at_once,
        "per_device_eval_batch_size": args.pairs_at_once, "max_length": args.max_length, "lora_rank": 8,
        "lora_alpha": 16, "learning_rate": 2e-4, "lora_dropout": 0, "degenerate_frac": 0, "save_steps": 0,
        "eval_steps": 0, "audit_prompts": 12,
    }  # fmt: skip


def train_reward(args: Arguments, data: Path, half: int, folder: Path) -> None:
    """One of our reward models, its accuracy and what its audit says."""
    start = time.perf_counter()
    main_of(reward_modeling, **pair_flags(args, data, half, folder))
    seconds = time.perf_counter() - start
    run = read_object(folder / "run.json")
    records = [record for record in read_metrics(folder) if "tokens/s" in record]
    # The first step warms up.
    speed = sum(record["tokens/s"] for record in records[1:]) / max(1, len(records) - 1)
    accuracy = accuracy_in_words(run["metrics"]["eval_accuracy"], run["data"]["eval_rows"])
    verdict = read_object(folder / "audit.json")["verdict"]
    say(f"ours, half {half}", accuracy=accuracy, **{"tokens/s": speed, "seconds": seconds}, pairs=run["data"]["rows"])
    won = ", ".join(f"{kind} {share:.0%}" for kind, share in verdict["winning"].items()) or "none"
    say("  audit", verdict=verdict["verdict"], attacks_that_win=won)


def train_peer(args: Arguments, data: Path, folder: Path) -> None:
    """TRL's RewardTrainer on the very rows of the first half."""
    flags = {name: value for name, value in pair_flags(args, data, 0, folder).items()}
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    ours = reward_modeling.parse_args(words)
    prompt_format = choose_format(ours, load_tokenizer(args.model), args.model)
    rows, eval_rows, _ = reward_modeling.load_data(ours, prompt_format)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForSequenceClassification.from_pretrained(args.model, num_labels=1, dtype=torch.float32)
    config = RewardConfig(
        str(folder), num_train_epochs=args.epochs, per_device_train_batch_size=args.pairs_at_once,
        per_device_eval_batch_size=args.pairs_at_once, learning_rate=2e-4, weight_decay=ours.weight_decay,
        lr_scheduler_type="linear", seed=0, max_length=None, bf16=False, gradient_checkpointing=False,
        report_to=[], save_strategy="no", logging_strategy="no", use_cpu=device == "cpu", disable_tqdm=True,
    )  # fmt: skip
    adapter = lora_config(ours, model, "SEQ_CLS")
    trainer = RewardTrainer(
        model.to(device), config, train_dataset=conversations(rows), eval_dataset=conversations(eval_rows),
        processing_class=AutoTokenizer.from_pretrained(args.model), peft_config=adapter,
    )  # fmt: skip
    start = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start
    tokens = sum(2 * len(row["query_ids"]) + len(row["chosen_ids"]) + len(row["rejected_ids"]) for row in rows)
    accuracy = accuracy_in_words(trainer.evaluate()["eval_accuracy"], len(eval_rows))
    speed = tokens * args.epochs / seconds
    say("TRL's RewardTrainer, half 0", accuracy=accuracy, **{"tokens/s": speed, "seconds": seconds}, pairs=len(rows))


def conversations(rows: list[dict]) -> Dataset:
    """Rows as TRL takes dialogues: the prompt's messages, and one message each for chosen and rejected."""
    made = []
    for row in rows:
        prompt = [{"role": role, "content": said} for role, said in turns_of(row)]
        sides = {side: [{"role": "assistant", "content": row[side]}] for side in ("chosen", "rejected")}
        made.append({"prompt": prompt, **sides})
    return Dataset.from_list(made)


# ---- PPO, merge and compare ----
def train_policy(args: Arguments, data: Path, root: Path) -> None:
    """PPO from the bare chat model; scores, judge, KL and length at the evaluations, answers before and after."""
    start = time.perf_counter()
    main_of(
        rl_training, base_model_name=args.model, reward_model_lora_path=root / "reward",
        judge_lora_path=root / "judge", dataset_name=data, output_dir=root / "ppo",
        steps=args.ppo_steps * args.batch_size, batch_size=args.batch_size, mini_batch_size=args.batch_size // 2,
        gradient_accumulation_steps=1, ppo_epochs=2, learning_rate=1e-4, output_max_length=args.answer_tokens,
        max_prompt_length=128, reward_transform="standardize", init_kl_coef=0.05,
        eval_freq=max(1, args.ppo_steps // 4), eval_prompts=24, lora_rank=8, lora_alpha=16, sample_freq=10,
    )  # fmt: skip
    records = read_metrics(root / "ppo")
    seconds = time.perf_counter() - start
    say("PPO, no SFT", seconds=seconds, steps=len(records), **{"time/step": records[-1]["time/step"]})
    names = {"score": "score/mean", "judge": "judge/mean", "KL": "kl/mean", "tokens": "len/mean"}

    for record in records:
        for place, step in (("eval_start", 0), ("eval", record["step"])):
            if f"{place}/score/mean" in record:
                figures = {label: float(record.get(f"{place}/{name}", float("nan"))) for label, name in names.items()}
                say(f"  held-out prompts, step {step}", **figures)


def show_answers(args: Arguments, data: Path, root: Path) -> None:
    """Answers of the bare model and of the policy, and whether a merged policy answers the same."""
    questions = [row["prompt"] for row in read_rows(data) if len(row["prompt"]) < 120][:4]
    main_of(
        compare, base_model_name=args.model, adapters=[f"ppo={root / 'ppo'}"], reward_model_lora_path=root / "reward",
        prompts=questions, do_sample=False, max_new_tokens=args.answer_tokens, output_dir=root / "compare",
    )  # fmt: skip
    merged = root / "merged"
    main_of(merge_lora, base_model_name=args.model, lora_path=root / "ppo", output_dir=merged, dtype="float32")

    with (root / "compare" / "comparison.csv").open(encoding="utf-8-sig", newline="") as file:
        table = list(csv.DictReader(file))
    for name, folder in (("base", args.model), ("ppo", merged)):
        answers = greedy(folder, questions, args.answer_tokens)
        equal = sum(tables.no_formula(answer) == row[name] for answer, row in zip(answers, table, strict=True))
        say(f"compare.py, column {name}", equal_to_plain_transformers=f"{equal} of {len(questions)} answers")


def greedy(folder, questions: list[str], tokens: int) -> list[str]:
    """Answers by transformers' own `generate` on the tokenizer's chat template."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    answers = []
    for question in questions:
        messages = [{"role": "user", "content": question}]
        settings = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True}
        ids = tokenizer.apply_chat_template(messages, **settings)
        row = model.generate(**ids, do_sample=False, max_new_tokens=tokens)[0, ids["input_ids"].shape[1] :]
        answers.append(tokenizer.decode(row, skip_special_tokens=True).strip())
    return answers


def read_rows(data: Path) -> list[dict]:
    """Prompts of the file, for the questions of the table."""
    rows = [json.loads(line) for line in data.read_text(encoding="utf-8").splitlines()]
    return [{"prompt": row["conversations"][0]["value"].strip()} for row in rows if len(row["conversations"]) == 1]


def main(args: Arguments) -> None:
    """Reward model, judge, peer, PPO, merge."""
    silence_libraries()
    root = Path(args.output_dir)
    root.mkdir(parents=True)
    # One file for all stages, whose split by prompt is then the same.
    data = root / "pairs.jsonl"
    rows = [row for name in args.data for row in json.loads(Path(name).read_text(encoding="utf-8"))]
    data.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")

    start = time.perf_counter()
    print(machine())
    train_reward(args, data, 0, root / "reward")
    train_reward(args, data, 1, root / "judge")
    if args.peer:
        train_peer(args, data, root / "trl")
    train_policy(args, data, root)
    show_answers(args, data, root)
    say("all", minutes=(time.perf_counter() - start) / 60)


if __name__ == "__main__":
    main(parse(Arguments, None, __doc__))
