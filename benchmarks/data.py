"""Preparing preference pairs against TRL's RewardTrainer: seconds from the file to encoded rows, memory, second start.

Workload: --pairs pairs made of the real ones in --source, each with a number in front of its first message, in a file
of lines; the tokenizer and the chat template of --model. TRL encodes in --num_proc processes and keeps its rows in the
cache of datasets; ours encodes in one process with the tokenizer's threads. Every run is a process of its own with an
empty cache, but for the second start. Memory is that of the process and its children that no file backs, at its
highest, less that of the same run on 10 pairs.

    python -m benchmarks.data --model MODEL --source pairs.json --pairs 10000 | tee benchmarks/results/data.log
"""

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks.common import machine
from rlhf.flags import flag, parse

CONTENDERS = ("ours", "ours, second start", "TRL")
# Long enough for nearly every pair.
MAX_LENGTH = 4096


@dataclass(kw_only=True)
class Arguments:
    """Flags of benchmarks/data.py."""

    model: str = flag(help="chat model whose tokenizer is used")
    source: str = flag(help="file of real pairs (conversations, chosen, rejected) that the workload is made of")
    pairs: int = flag(100_000, help="pairs of the workload")
    num_proc: int = flag(2, help="processes of TRL")
    only: str = flag("all", help="ours or TRL alone", choices=["all", "ours", "TRL"])
    work: str | None = flag(None, help="for the runs themselves: the workload, as a file")
    contender: str | None = flag(None, help="for the runs themselves: who is measured", choices=CONTENDERS)


def write_workload(source: str, path: Path, count: int) -> None:
    """A file of pairs that both read: messages under prompt, chosen and rejected."""
    names = {"human": "user", "gpt": "assistant", "system": "system"}

    def message(old: dict) -> dict:
        return {"role": names[old["from"]], "content": old["value"]}

    rows = json.loads(Path(source).read_text(encoding="utf-8"))
    with path.open("w", encoding="utf-8") as out:
        for number in range(count):
            row = rows[number % len(rows)]
            prompt = [message(old) for old in row["conversations"]]
            prompt[0]["content"] = f"{number}. {prompt[0]['content']}"
            sides = {side: [message(row[side])] for side in ("chosen", "rejected")}
            out.write(json.dumps({"prompt": prompt, **sides}, ensure_ascii=False) + "\n")


# ---- one run ----
class Memory(threading.Thread):
    """The highest sum of anonymous memory of this process and those it started, in MB."""

    def __init__(self):
        super().__init__(daemon=True)
        self.peak = 0

    def run(self):
        while True:
            self.peak = max(self.peak, anonymous(os.getpid()))
            time.sleep(0.1)


def anonymous(process: int) -> int:
    """MB of a process and its descendants that no file backs."""
    try:
        status = dict(line.split(":", 1) for line in Path(f"/proc/{process}/status").read_text().splitlines())
        children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    # It may end between two looks.
    except OSError:
        return 0
    return int(status.get("RssAnon", "0").split()[0]) // 1024 + sum(anonymous(int(child)) for child in children)


def run_ours(args: Arguments) -> None:
    """Prepare or map the pairs as reward_modeling.py does."""
    import reward_modeling
    from rlhf.data.choose_format import choose_format
    from rlhf.data.encoding import load_tokenizer

    words = ["--model_name", args.model, "--dataset_name", args.work, "--max_length", str(MAX_LENGTH)]
    words += ["--train_subset", "-1", "--eval_size", "0", "--output_dir", tempfile.mkdtemp()]
    flags = reward_modeling.parse_args(words)
    prompt_format = choose_format(flags, load_tokenizer(args.model), args.model)

    start = time.perf_counter()
    rows, _, _ = reward_modeling.load_data(flags, prompt_format)
    say_result(start, len(rows))


def run_trl(args: Arguments) -> None:
    """Let TRL's RewardTrainer read and encode the pairs; its model is as small as one can be."""
    import datasets
    from transformers import AutoTokenizer, LlamaConfig, LlamaForSequenceClassification
    from trl import RewardConfig, RewardTrainer

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = LlamaForSequenceClassification(
        LlamaConfig(vocab_size=len(tokenizer), num_labels=1, pad_token_id=tokenizer.pad_token_id, **sizes)
    )
    config = RewardConfig(
        tempfile.mkdtemp(), max_length=MAX_LENGTH, dataset_num_proc=args.num_proc, report_to=[], use_cpu=True,
        bf16=False, disable_tqdm=True,
    )  # fmt: skip

    start = time.perf_counter()
    rows = datasets.load_dataset("json", data_files=args.work, split="train")
    trainer = RewardTrainer(model, config, train_dataset=rows, processing_class=tokenizer)
    say_result(start, len(trainer.train_dataset))


def say_result(start: float, rows: int) -> None:
    seconds = time.perf_counter() - start
    used = os.times()
    cpu = used.user + used.system + used.children_user + used.children_system
    print(json.dumps({"seconds": seconds, "cpu": cpu, "rows": rows}), flush=True)


# ---- all runs ----
def measure(args: Arguments, contender: str, work: Path, cache: Path) -> dict:
    """One run in a process of its own: seconds, CPU seconds with imports, rows, MB at the highest."""
    words = ["--model", args.model, "--source", args.source, "--num_proc", str(args.num_proc)]
    words += ["--work", str(work), "--contender", contender]
    environment = os.environ | {"HF_DATASETS_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.data", *words], env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    return json.loads(lines[0]) | json.loads(lines[1])


def main(args: Arguments) -> None:
    """Measure each contender on the workload and on 10 pairs, and print the table."""
    if args.contender:
        memory = Memory()
        memory.start()
        (run_trl if args.contender == "TRL" else run_ours)(args)
        print(json.dumps({"memory": memory.peak}), flush=True)
        return

    print(machine(), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        work = {count: Path(folder, f"{count}.jsonl") for count in (10, args.pairs)}
        for count, path in work.items():
            write_workload(args.source, path, count)
        size = work[args.pairs].stat().st_size
        print(f"{args.pairs:,} pairs, {size / 1e6:,.0f} MB; load {os.getloadavg()[0]:.1f}", flush=True)

        for contender in CONTENDERS:
            if not contender.startswith(args.only) and args.only != "all":
                continue
            cache = Path(folder, contender.split(",")[0])
            few = measure(args, contender, work[10], cache)
            all_of_them = measure(args, contender, work[args.pairs], cache)
            cpu = all_of_them["cpu"] - few["cpu"]
            memory = all_of_them["memory"] - few["memory"]
            print(
                f"{contender}: {all_of_them['rows']:,} pairs in {all_of_them['seconds']:.1f} s, {cpu:.1f} CPU-s "
                f"({1000 * cpu / args.pairs:.2f} a thousand), {memory:,} MB more than on 10 pairs",
                flush=True,
            )


if __name__ == "__main__":
    main(parse(Arguments, None, __doc__))
