"""Engines over a tiny base with random adapters, and what is asked of them."""

import asyncio
from contextlib import contextmanager
from pathlib import Path

import torch
from adapters import random_adapter

from rlhf.compare.answers import REWARD_MODEL, AnswerSettings, Versions
from rlhf.data.choose_format import text_format
from rlhf.data.encoding import load_tokenizer
from rlhf.page.engine import Engine, Settings

GREEDY = Settings(do_sample=False, max_new_tokens=16)


def write_adapters(base: str, root: Path, scale: float = 0.3) -> dict[str, str]:
    """Directories of random adapters: sft, ppo and reward."""
    stages = {"sft": "sft", "ppo": "ppo", "reward": "reward"}
    return {
        name: random_adapter(base, root / name, stage=stage, seed=seed, scale=scale)
        for seed, (name, stage) in enumerate(stages.items())
    }


def load_versions(base: str, folders: dict[str, str], prompt_format=None, **writing) -> Versions:
    """The versions sft and ppo on one base in memory, with the reward model where there is one."""
    prompt_format = prompt_format or text_format(load_tokenizer(base))
    versions = Versions(base, prompt_format, AnswerSettings(**writing), torch.float32, "cpu")
    for name in ("sft", "ppo"):
        versions.add(name, folders[name])
    if "reward" in folders:
        versions.add_reward_model(folders["reward"])
    return versions


@contextmanager
def running(versions: Versions, **settings):
    """An engine at work on base, sft and ppo."""
    names = ["base", "sft", "ppo"]
    reward = versions.score_heads.get(REWARD_MODEL)
    engine = Engine(versions.model, versions.prompt_format, names, reward=reward, **settings)
    engine.start()
    try:
        yield engine
    finally:
        engine.close()


def ask(engine: Engine, requests: list[tuple], pause: float = 0.0) -> list:
    """The answers to (version, query, settings, seed) each, or the errors that ended them; `pause` between them."""

    async def all_of_them():
        tickets = []
        for request in requests:
            tickets.append(engine.submit(*request))
            await asyncio.sleep(pause)
        return await asyncio.gather(*(ticket.result() for ticket in tickets), return_exceptions=True)

    return asyncio.run(asyncio.wait_for(all_of_them(), 60))
