"""Five people vote and two API clients ask for minutes: no confirmed vote is lost, and memory stays flat.

    python tests/long/soak_page.py --seconds 120 | tee benchmarks/results/soak_page.log

playground.py runs as a process of its own on a tiny base with two adapters, and writes the answers while people vote
on them. At the end it is killed; the votes that it confirmed are counted in the store.
"""

import argparse
import random
import re
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "support"), str(ROOT / "tests" / "long")]

import httpx  # noqa: E402
import openai  # noqa: E402
from adapters import random_adapter  # noqa: E402
from pages import Playground  # noqa: E402
from soak import make_base  # noqa: E402

from rlhf.page.store import Store  # noqa: E402

VOTERS = 5
CLIENTS = 2
# More than can be voted on in the time.
PROMPTS = 20_000


def vote(address: str, person: str, end: float, confirmed: Counter, wrong: Counter) -> None:
    """One person: take the next pair, vote on it, until the time is over."""
    rng = random.Random(person)
    with httpx.Client(base_url=address, timeout=30) as client:
        while time.monotonic() < end:
            answer = client.get("/page/next", params={"person": person, "tab": "t"})
            pairs = answer.json().get("pairs", []) if answer.status_code == 200 else []
            if answer.status_code != 200:
                wrong[f"next {answer.status_code}"] += 1
            if not pairs:
                time.sleep(0.05)
                continue
            side = rng.choice(("left", "right", "tie", "bad"))
            ballot = {"key": f"{person} {pairs[0]['pair']}", "pair": pairs[0]["pair"], "person": person}
            answer = client.post("/page/vote", json=ballot | {"side": side, "seconds": 1.0})
            if answer.status_code == 200:
                confirmed[person] += 1
            else:
                wrong[f"vote {answer.status_code}"] += 1


def ask(address: str, number: int, end: float, answered: Counter, wrong: Counter) -> None:
    """One API client: a chat after the other, streamed or not."""
    rng = random.Random(number)
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=60) as client:
        while time.monotonic() < end:
            words = {"model": rng.choice(("sft", "ppo")), "max_tokens": 16, "seed": rng.randrange(1000)}
            messages = [{"role": "user", "content": "我喜欢什么？"}]
            try:
                if rng.random() < 0.5:
                    list(client.chat.completions.create(messages=messages, stream=True, **words))
                else:
                    client.chat.completions.create(messages=messages, **words)
                answered[number] += 1
            except openai.OpenAIError as error:
                wrong[f"API {type(error).__name__}"] += 1


def megabytes(process: int) -> int:
    status = Path(f"/proc/{process}/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+)", status).group(1)) // 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=120)
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        base = make_base(folder / "base")
        adapters = [
            f"{name}={random_adapter(base, folder / name, seed=seed)}" for seed, name in enumerate(("sft", "ppo"))
        ]
        prompts = folder / "prompts.txt"
        prompts.write_text("".join(f"小猫喜欢{number}吗？\n" for number in range(PROMPTS)), encoding="utf-8")
        site = Playground(
            "--base_model_name", base, "--adapters", *adapters, "--include_base", "False", "--prompts", str(prompts),
            "--max_new_tokens", "8", "--overlap", "0", "--bf16", "False", "--output_dir", str(folder / "page"),
        )  # fmt: skip
        said: list[str] = []
        threading.Thread(target=lambda: said.extend(site.process.stdout), daemon=True).start()

        end = time.monotonic() + args.seconds
        confirmed: Counter = Counter()
        answered: Counter = Counter()
        wrong: Counter = Counter()
        people = [(vote, (site.address, f"person {n}", end, confirmed, wrong)) for n in range(VOTERS)]
        people += [(ask, (site.address, n, end, answered, wrong)) for n in range(CLIENTS)]
        threads = [threading.Thread(target=work, args=given) for work, given in people]
        for thread in threads:
            thread.start()
        memory = []
        while any(thread.is_alive() for thread in threads):
            memory.append(megabytes(site.process.pid))
            time.sleep(args.seconds / 10)
        for thread in threads:
            thread.join()
        site.kill()

        store = Store(folder / "page")
        kept = Counter(row["person"] for row in store.votes())
        store.close()
    lost = {person: count - kept[person] for person, count in confirmed.items() if count != kept[person]}
    votes = f"{sum(confirmed.values())} votes, {sum(answered.values())} answers"
    print(f"{args.seconds:.0f} s, {VOTERS} voters, {CLIENTS} API clients: {votes}")
    print(f"confirmed votes that the killed server had not kept: {lost or 'none'}; refused: {dict(wrong) or 'none'}")
    print(f"tracebacks: {sum('Traceback' in line for line in said)}")
    print(f"memory at each tenth, MB: {', '.join(map(str, memory))}")


if __name__ == "__main__":
    main()
