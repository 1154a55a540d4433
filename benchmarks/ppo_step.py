"""PPO against classic TRL 0.7.11 and TRL 1.12.0: the same workload, each in a process and an environment of its own.

    python benchmarks/ppo_step.py --peers all | tee benchmarks/results/ppo_step.log

Workload: 33-million-parameter Llama with random weights (benchmarks/model.py), fp32, LoRA r=8 on the attention
projections, a reward model, the SFT model as reference; steps of 16 prompts (16 to 96 tokens, 44 in the mean), 4 PPO
epochs, micro-batches of 4, one optimizer step an epoch. "even": no answer ends before 64 tokens. "variable": EOS has a
chance of 1/16 at every token, 64 tokens at most, so 16 in the mean. "long", not among the usual ones: of 1/64, 256 at
most, so 63 in the mean. Contenders take turns step by step, the others waiting, so that a slow minute of the machine
hits them all. The first step is left out.

Memory is the peak of the whole process. "of the machine" compares the update's useful arithmetic with what this
machine's matrix products reach at the layers' own shapes: the weight matrices over real tokens (of the prompt too; the
output layer over response tokens), forward and gradients of the activations; attention scores, LoRA, norms and padding
are not counted.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import product
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Started as a file and not with -m, Python would look for the project's modules beside this one.
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from benchmarks.common import machine  # noqa: E402
from benchmarks.model import config  # noqa: E402
from benchmarks.peers.worker import MARK  # noqa: E402
from benchmarks.ppo_workload import SETTINGS, STEPS, WORKLOADS, write_workload  # noqa: E402
from rlhf.flags import flag, parse  # noqa: E402
from rlhf.run.launch import silence_libraries  # noqa: E402

# Name of the file in benchmarks/peers/, and the name in the table.
PEERS = {"trl07": "classic TRL 0.7.11", "trl112": "TRL 1.12.0"}
PHASES = ("rollout", "score", "update", "total")


@dataclass(kw_only=True)
class Arguments:
    """Flags of benchmarks/ppo_step.py."""

    peers: str = flag("all", help="whom to compare with", choices=["all", "none", *PEERS])
    workload: str = flag("both", help="answers of one length (even), of very different length (variable), or both",
                         choices=["both", *WORKLOADS])  # fmt: skip
    steps: int = flag(0, help="PPO steps of each, the first left out; 0: 6, or 11 where answers vary")
    seed: int = flag(0, help="of what is sampled; prompts and weights are always the same")
    threads: int = flag(0, help="of torch; 0: as many as there are cores")

    def __post_init__(self):
        if self.steps and self.steps < 2:
            raise ValueError(f"--steps {self.steps} must be at least 2: the first is left out")


# ---- running ----
class Contender:
    """A process of benchmarks/peers/<name>.py: it computes a step when it is given the turn, and otherwise waits."""

    def __init__(self, name: str, folder: Path):
        python = sys.executable if name == "ours" else ROOT / "benchmarks/.peers" / name / "bin/python"
        offline = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "WANDB_MODE": "disabled"}
        self.name = name
        self.steps = []
        # A file, because a pipe that nobody reads would fill up and stop the process.
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (open as long as the process runs)
        self.process = subprocess.Popen(
            [python, "-m", f"benchmarks.peers.{name}", str(folder)],
            cwd=ROOT,
            env=os.environ | offline,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
        )
        # Loading is over when it waits for its first turn.
        self.hear()

    def hear(self) -> dict:
        """The next record it prints. Raises: RuntimeError with the end of its errors where it has ended instead."""
        for line in self.process.stdout:
            # Libraries print as well.
            if line.startswith(MARK):
                return json.loads(line.removeprefix(MARK))

        self.errors.seek(0)
        raise RuntimeError(f"{self.name} ended with {self.process.wait()}:\n{self.errors.read()[-3000:]}")

    def take_turn(self) -> None:
        """Let it compute one step, kept in `steps`; the record after it (waiting, or its report) in `last_words`."""
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        self.steps.append(self.hear())
        self.last_words = self.hear()

    def close(self) -> None:
        """End it, wherever it is."""
        self.process.kill()
        self.process.communicate()
        self.errors.close()


def measure(args: Arguments, name: str, contenders: list[str]) -> tuple[dict, dict[str, dict], list[float]]:
    """The workload; of each contender `steps` and its report; the machine's matrix rate (GFLOP/s) at each step."""
    steps = args.steps or STEPS[name]
    rates = []

    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        workload = write_workload(Path(folder), name, steps, args.seed, torch.get_num_threads())
        running = [Contender(contender, Path(folder)) for contender in contenders]
        for contender in running:
            stack.callback(contender.close)

        for _, contender in product(range(steps), running):
            if contender.name != "ours":
                contender.take_turn()
                continue
            # Before and after: the machine's speed drifts in the meantime.
            before = matrix_rate()
            contender.take_turn()
            rates.append((before + matrix_rate()) / 2)

        runs = {contender.name: contender.last_words | {"steps": contender.steps} for contender in running}
        return workload, runs, rates


# ---- arithmetic ----
def layer_shapes(rows: int, response_rows: int) -> list[tuple[int, int, int, int]]:
    """(count, rows, inner, columns) of the products with weight matrices in one forward pass of a micro-batch."""
    llama = config()
    hidden = llama.hidden_size
    middle = llama.intermediate_size
    layers = llama.num_hidden_layers
    return [
        (4 * layers, rows, hidden, hidden),
        (2 * layers, rows, hidden, middle),
        (layers, rows, middle, hidden),
        (1, response_rows, hidden, llama.vocab_size),
    ]


def flops(shapes: list[tuple[int, int, int, int]]) -> int:
    """FLOPs of those products: a multiplication and an addition for each weight and row."""
    return sum(2 * count * rows * inner * columns for count, rows, inner, columns in shapes)


def matrix_rate(seconds: float = 0.25) -> float:
    """GFLOP/s of this machine at the shapes of a micro-batch (4 rows of 44 + 64 tokens), weighted by their FLOPs.

    As a layer computes them: x W^T forward, g W for the gradient of its input.
    """
    shapes = layer_shapes(4 * 108, 4 * 64)
    needed = 0.0

    for count, rows, inner, columns in shapes:
        x = torch.randn(rows, inner)
        weight = torch.randn(columns, inner)
        gradient = torch.randn(rows, columns)

        # The first product allocates, so it is not measured.
        torch.nn.functional.linear(x, weight)
        start = time.perf_counter()
        times = 0
        while time.perf_counter() - start < seconds:
            torch.nn.functional.linear(x, weight)
            gradient @ weight
            times += 1
        needed += count * (time.perf_counter() - start) / times

    # Two products each time, forward and gradient.
    return 2 * flops(shapes) / needed / 1e9


def update_rates(workload: dict, steps: list[dict]) -> list[float]:
    """GFLOP/s of useful arithmetic in the update of each step."""
    queries = sum(len(ids) for ids in workload["prompts"])
    # Forward and gradient in every epoch.
    passes = 2 * SETTINGS["ppo_epochs"]
    rates = []
    for step in steps:
        useful = flops(layer_shapes(queries + step["tokens"], step["tokens"]))
        rates.append(passes * useful / step["update"] / 1e9)
    return rates


# ---- the table ----
def table(workload: dict, runs: dict[str, dict], rates: list[float]) -> str:
    """Medians of all steps but the first, and how many times ours is better."""
    batch = workload["batch_size"]
    phases = "".join(f"{phase:>9}" for phase in PHASES)
    lines = [f"{'':<20}{phases}{'samples/s':>11}{'tokens':>8}{'GB':>7}{'ours: speed':>13}{'memory':>8}"]

    # The first step is left out everywhere, because it allocates.
    steps = {name: run["steps"][1:] for name, run in runs.items()}
    peak = {name: run["peak_gb"] for name, run in runs.items()}
    total = {name: statistics.median(step["total"] for step in measured) for name, measured in steps.items()}

    for name, measured in steps.items():
        medians = [statistics.median(step[phase] for step in measured) for phase in PHASES]
        seconds = "".join(f"{value:>9.2f}" for value in medians)
        length = statistics.mean(step["tokens"] for step in measured) / batch
        faster = total[name] / total["ours"]
        memory = peak["ours"] / peak[name]
        lines.append(
            f"{PEERS.get(name, name):<20}{seconds}{batch / total[name]:>11.2f}{length:>8.1f}{peak[name]:>7.2f}"
            f"{faster:>11.2f} x{memory:>6.2f} x"
        )

    lines.append(_reached(update_rates(workload, steps["ours"]), rates[1:]))
    # A contender whose weights did not move has not trained, and its speed means nothing.
    for name, run in runs.items():
        versions = ", ".join(f"{package} {version}" for package, version in run["versions"].items())
        lines.append(f"{PEERS.get(name, name)}: {versions}; largest change of a trained weight {run['moved']:.1e}")
    return "\n".join(lines)


def _reached(ours: list[float], machine: list[float]) -> str:
    """The update's GFLOP/s and the machine's, step by step, in one line."""
    shares = [update / limit for update, limit in zip(ours, machine, strict=True)]
    return (
        f"update: {statistics.median(ours):.0f} GFLOP/s, {statistics.median(shares):.0%} of the machine's "
        f"{statistics.median(machine):.0f} GFLOP/s"
    )


def main(args: Arguments) -> None:
    """Make the environments of the peers where needed, then run each workload and print its table."""
    silence_libraries()
    torch.set_num_threads(args.threads or os.cpu_count())
    peers = {"all": list(PEERS), "none": []}.get(args.peers, [args.peers])
    # Each peer needs packages that would not go together with ours.
    if peers:
        subprocess.run(["bash", str(ROOT / "benchmarks/setup_peers.sh")], check=True)

    print(machine(), flush=True)
    for name in ("even", "variable") if args.workload == "both" else [args.workload]:
        workload, runs, rates = measure(args, name, ["ours", *peers])
        print(
            f"\n{name}: seconds a step, medians of {workload['steps'] - 1} steps, taken in turn, of "
            f"{workload['batch_size']} answers of at most {workload['max_new_tokens']} tokens"
        )
        print(table(workload, runs, rates), flush=True)


if __name__ == "__main__":
    main(parse(Arguments, None, __doc__))
