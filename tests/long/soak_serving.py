"""Five clients ask a server for minutes, some of them going away half way: no answer is lost and memory stays flat.

    python tests/long/soak_serving.py --seconds 120 | tee benchmarks/results/soak_serving.log

Every answer that is waited for is held against the engine's answer to the same request alone, asked before. Memory is
that of the server's process, which the clients share: after a quarter of the time, and at the end.
"""

import argparse
import asyncio
import random
import re
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "support"), str(ROOT / "tests" / "long")]

import openai  # noqa: E402
from engines import ask, load_versions, running, write_adapters  # noqa: E402
from served import served  # noqa: E402
from soak import make_base  # noqa: E402

from rlhf.data.choose_format import text_format  # noqa: E402
from rlhf.data.encoding import load_tokenizer  # noqa: E402
from rlhf.page.engine import Engine, Settings  # noqa: E402

NAMES = ("base", "sft", "ppo")
# Different requests: each of them is asked again and again.
REQUESTS = 60
CLIENTS = 5


def megabytes() -> float:
    """Memory of this process that is in use."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+)", status).group(1)) / 1024


def requests_of(rng: random.Random) -> list[dict]:
    """Requests of all kinds of length, to all versions."""
    made = []
    for number in range(REQUESTS):
        question = "小猫喜欢什么？" * rng.randrange(1, 12)
        made.append(
            {
                "model": NAMES[number % 3], "messages": [{"role": "user", "content": question}], "seed": number,
                "max_tokens": rng.choice((1, 8, 30, 90)), "temperature": rng.choice((0, 0.7, 1)),
            }
        )  # fmt: skip
    return made


def alone(engine: Engine, request: dict) -> str:
    """The engine's answer to a request without anybody beside it."""
    query = engine.prompt_format.query_ids([("user", request["messages"][0]["content"])])
    settings = {"max_new_tokens": request["max_tokens"], "do_sample": request["temperature"] > 0}
    settings["temperature"] = request["temperature"] or 1.0
    return ask(engine, [(request["model"], query, Settings(**settings), request["seed"])])[0].text


async def client(
    address: str, requests: list[tuple[dict, str]], end: float, rng: random.Random, seen: Counter
) -> None:
    """Ask one of the requests, each with its answer, until the time is over; `seen` counts what came of it."""
    async with openai.AsyncOpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=60) as talk:
        while time.monotonic() < end:
            request, expected = rng.choice(requests)
            kind = rng.choice(("whole", "stream", "stream", "gone"))
            try:
                if kind == "whole":
                    text = (await talk.chat.completions.create(**request)).choices[0].message.content
                else:
                    text = await read_stream(talk, request, rng.randrange(6) if kind == "gone" else None)
            except openai.OpenAIError as error:
                seen[f"lost: {type(error).__name__}"] += 1
                continue
            seen[kind] += 1
            seen["different"] += text is not None and text != expected


async def read_stream(talk, request: dict, most: int | None) -> str | None:
    """The text of a stream; None where it is left after `most` pieces."""
    stream = await talk.chat.completions.create(**request, stream=True)
    text = ""
    async with stream:
        pieces = 0
        async for chunk in stream:
            text += chunk.choices[0].delta.content or ""
            pieces += 1
            if pieces == most:
                return None
    return text


async def watch(seconds: float, found: list[float]) -> None:
    """Note the memory at each tenth of the time."""
    for _ in range(10):
        await asyncio.sleep(seconds / 10)
        found.append(megabytes())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=120)
    seconds = parser.parse_args().seconds
    rng = random.Random(0)
    seen = Counter()
    memory: list[float] = []

    async def everybody(address: str, requests: list) -> None:
        end = time.monotonic() + seconds
        clients = [client(address, requests, end, random.Random(number), seen) for number in range(CLIENTS)]
        await asyncio.gather(watch(seconds, memory), *clients)

    with tempfile.TemporaryDirectory() as folder:
        base = make_base(Path(folder) / "base")
        folders = write_adapters(base, Path(folder))
        versions = load_versions(base, folders, text_format(load_tokenizer(base)))
        with running(versions, max_rows=4) as engine:
            requests = [(request, alone(engine, request)) for request in requests_of(rng)]
            with served(engine) as address:
                asyncio.run(everybody(address, requests))
                deadline = time.monotonic() + 10
                while engine.load() != (0, 0) and time.monotonic() < deadline:
                    time.sleep(0.05)
                left = engine.load()

    lost = sum(count for kind, count in seen.items() if kind.startswith("lost"))
    print(f"{seconds:.0f} s, {CLIENTS} clients: {dict(sorted(seen.items()))}; left in the engine {left}")
    print("memory at each tenth, MB:", ", ".join(f"{value:.0f}" for value in memory))
    flat = memory[-1] < memory[2] * 1.02
    print(f"lost {lost}, different {seen['different']}, memory {'flat' if flat else 'grows'}")
    return 0 if not lost and not seen["different"] and left == (0, 0) and flat else 1


if __name__ == "__main__":
    sys.exit(main())
