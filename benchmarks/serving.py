"""The page's API beside transformers' own generate: seconds to the first token, tokens a second of eight requests.

    python -m benchmarks.serving --model DIR | tee benchmarks/results/serving.log

A real server on this machine, asked over HTTP by streaming clients; the base and two random adapters of rank 8 on all
linear layers take turns among the requests. transformers has the same base in memory, without adapters and without a
server: its generate answers one request after the other, and all of them as one padded batch. Greedy, so that
everybody writes the same tokens for the base. Contenders take turns, --repeats times; other programs only ever add
time, so that on a busy machine the best figure says more than the median.
"""

import asyncio
import socket
import statistics
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import openai
import torch
import uvicorn
from peft import LoraConfig, get_peft_model
from starlette.applications import Starlette
from transformers import AutoModelForCausalLM

import compare
from benchmarks.common import machine
from rlhf.flags import REQUIRED, flag, parse
from rlhf.models.lora import lora_targets
from rlhf.page import api
from rlhf.page.engine import Engine
from rlhf.run.launch import silence_libraries

# Questions that take more than a few words.
TOPICS = ("a river", "an old clock", "two friends", "the sea", "a garden", "a long train ride", "winter", "a lost key")
LONG = "Here are some notes. " + " ".join(f"Line {number} says that day {number} was fine." for number in range(60))


@dataclass(kw_only=True)
class Arguments:
    """Flags of benchmarks/serving.py."""

    model: str = flag(REQUIRED, help="directory of a chat model")
    tokens: int = flag(64, help="tokens of an answer at most")
    repeats: int = flag(3, help="times that each figure is taken")
    threads: int = flag(0, help="threads of PyTorch; 0 takes all cores")


# ---- who answers ----
def write_adapter(base: str, folder: Path, seed: int) -> str:
    """Save a random adapter as plain peft does."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = LoraConfig(r=8, lora_alpha=16, target_modules=lora_targets(model, "all-linear"), task_type="CAUSAL_LM")
    model = get_peft_model(model, config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            # Small: the answers stay as long as those of the base.
            torch.nn.init.normal_(parameter, std=1e-3)
    model.save_pretrained(str(folder))
    return f"{folder.name}={folder}"


def make_engine(model: str, folder: Path) -> Engine:
    """The engine on the base and two adapters, loaded as compare.py loads them."""
    adapters = [write_adapter(model, folder / name, seed) for seed, name in enumerate(("first", "second"))]
    args = compare.parse_args(["--base_model_name", model, "--adapters", *adapters])
    prompt_format = compare.format_of(args, model, compare.tokenizer_of(args, model))
    versions = compare.load_versions(args, model, prompt_format)
    return Engine(versions.model, prompt_format, list(args.versions))


def serve(engine: Engine) -> tuple[uvicorn.Server, str]:
    """A server with the engine's API, and its address."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    app = Starlette(routes=api.routes(engine))
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off"))
    threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True).start()
    while not server.started:
        time.sleep(0.01)
    return server, f"http://127.0.0.1:{listener.getsockname()[1]}/v1"


# ---- what is measured ----
async def ask(client, model: str, question: str, tokens: int) -> tuple[float, int]:
    """Seconds to the first piece of text, and tokens of the answer."""
    asked = {"model": model, "messages": [{"role": "user", "content": question}], "max_tokens": tokens}
    begin = time.perf_counter()
    first = 0.0
    stream = await client.chat.completions.create(
        **asked, temperature=0, stream=True, stream_options={"include_usage": True}
    )
    async for chunk in stream:
        if not first and chunk.choices and chunk.choices[0].delta.content:
            first = time.perf_counter() - begin
    return first, chunk.usage.completion_tokens


def ask_all(address: str, requests: list[tuple[str, str]], tokens: int, at_once: bool) -> tuple[float, float]:
    """Tokens a second over all requests (version, question), and the median of the seconds to the first token."""

    async def run() -> list[tuple[float, int]]:
        async with openai.AsyncOpenAI(base_url=address, api_key="none", max_retries=0) as client:
            waiting = [ask(client, *request, tokens) for request in requests]
            return await asyncio.gather(*waiting) if at_once else [await one for one in waiting]

    begin = time.perf_counter()
    answers = asyncio.run(run())
    seconds = time.perf_counter() - begin
    return sum(written for _, written in answers) / seconds, statistics.median(first for first, _ in answers)


class Transformers:
    """The same base by transformers' own generate."""

    def __init__(self, directory: str, engine: Engine):
        self.format = engine.prompt_format
        self.model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
        self.settings = {
            "do_sample": False, "eos_token_id": list(self.format.stop_ids), "pad_token_id": self.format.pad_id
        }  # fmt: skip

    def write(self, questions: list[str], tokens: int) -> int:
        """Answer the questions as one batch padded on the left; returns the tokens of all answers."""
        queries = [self.format.query_ids([("user", question)]) for question in questions]
        longest = max(map(len, queries))
        ids = [[self.format.pad_id] * (longest - len(query)) + query for query in queries]
        mask = [[0] * (longest - len(query)) + [1] * len(query) for query in queries]
        rows = self.model.generate(
            torch.tensor(ids), attention_mask=torch.tensor(mask), max_new_tokens=tokens, **self.settings
        )
        stops = set(self.format.stop_ids)
        answers = rows[:, longest:].tolist()
        return sum(next((place + 1 for place, token in enumerate(row) if token in stops), len(row)) for row in answers)

    def seconds(self, question: str) -> float:
        """Seconds to the first token."""
        begin = time.perf_counter()
        self.write([question], 1)
        return time.perf_counter() - begin

    def rate(self, batches: list[list[str]], tokens: int) -> float:
        """Tokens a second of these batches, one after the other."""
        begin = time.perf_counter()
        written = sum(self.write(batch, tokens) for batch in batches)
        return written / (time.perf_counter() - begin)


def measure(args: Arguments, address: str, peer: Transformers) -> dict[str, list[float]]:
    """Name -> figure of each repeat."""
    questions = [f"Write a story about {topic}, with many details." for topic in TOPICS]
    one = [("base", question) for question in questions]
    mixed = [(("base", "first", "second")[number % 3], question) for number, question in enumerate(questions)]
    figures: dict[str, list[float]] = {}

    def note(name: str, value: float) -> None:
        figures.setdefault(name, []).append(value)

    # The first round warms up.
    for number in range(args.repeats + 1):
        if number == 1:
            figures.clear()
        for kind, question in (("short prompt", questions[0]), ("long prompt", LONG)):
            for version in ("base", "first"):
                note(f"first token s, {kind}, {version}", ask_all(address, [(version, question)], 1, False)[1])
            note(f"first token s, {kind}, generate", peer.seconds(question))
        note("tokens/s, one after the other", ask_all(address, one, args.tokens, False)[0])
        rate, first = ask_all(address, one, args.tokens, True)
        note("tokens/s, eight at once", rate)
        note("first token s, eight at once", first)
        note("tokens/s, eight at once, three versions", ask_all(address, mixed, args.tokens, True)[0])
        note("tokens/s, generate, one after the other", peer.rate([[question] for question in questions], args.tokens))
        note("tokens/s, generate, one batch of eight", peer.rate([questions], args.tokens))
    return figures


def main(args: Arguments) -> None:
    """Start the server, let all take turns, print the table."""
    silence_libraries()
    if args.threads:
        torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        engine = make_engine(args.model, Path(folder))
        engine.start()
        server, address = serve(engine)
        peer = Transformers(args.model, engine)
        for kind, question in (("short", f"Write a story about {TOPICS[0]}, with many details."), ("long", LONG)):
            print(f"{kind} prompt: {len(engine.prompt_format.query_ids([('user', question)]))} tokens")
        figures = measure(args, address, peer)
        server.should_exit = True
        engine.close()

    print(f"{machine()}\n{Path(args.model).name}, answers of at most {args.tokens} tokens, {args.repeats} times each")
    print(f"{'':<44}{'best':>9}{'median':>9}")
    for name, values in figures.items():
        best = min(values) if name.startswith("first") else max(values)
        every = ", ".join(f"{value:.3g}" for value in values)
        print(f"{name:<44}{best:>9.3g}{statistics.median(values):>9.3g}  ({every})")


if __name__ == "__main__":
    main(parse(Arguments, None, __doc__))
