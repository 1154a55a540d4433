"""Answers for the next pairs, written while people read the ones before."""

import asyncio
import sqlite3
from contextlib import suppress

from rlhf.page.chat import Chat
from rlhf.page.engine import Settings
from rlhf.page.fields import BadField
from rlhf.page.store import Prompt, Version
from rlhf.page.vote import Plan

# Pairs that nobody has voted on and that lie ready.
AHEAD = 12

# Answers that are asked for at once: a conversation beside them does not wait for all of those ahead.
TOGETHER = 4

# After an error, such as a full disk, before it is tried again.
WAIT_SECONDS = 5


class Preparer:
    """One task that keeps AHEAD pairs ready; `wake` it after a vote."""

    def __init__(self, plan: Plan, chat: Chat, settings: Settings, sampling: dict, seed: int):
        self.plan = plan
        self.chat = chat
        self.settings = settings
        # As it is kept with each answer.
        self.sampling = sampling
        self.seed = seed
        self.awake = asyncio.Event()
        self.task: asyncio.Task | None = None
        # What the format or the base's length refuses: asked again, it would be refused again.
        self.refused: set[int] = set()

    def start(self) -> None:
        """Begin; inside the event loop."""
        self.task = asyncio.create_task(self._run())

    async def stop(self) -> None:
        """End; what is half written is dropped."""
        self.task.cancel()
        with suppress(asyncio.CancelledError):
            await self.task

    def wake(self) -> None:
        """Look again whether answers are wanted."""
        self.awake.set()

    async def _run(self) -> None:
        while True:
            self.awake.clear()
            wanted = await asyncio.to_thread(self.plan.wanted, AHEAD)
            wanted = [(prompt, version) for prompt, version in wanted if prompt.id not in self.refused]
            if not wanted:
                await self.awake.wait()
                continue
            try:
                # A few at a time: the first pair is shown as soon as it is there.
                await asyncio.gather(*(self._write(prompt, version) for prompt, version in wanted[:TOGETHER]))
            except (sqlite3.Error, OSError, RuntimeError, FloatingPointError, MemoryError) as error:
                print(f"the next pairs are not written: {error}; trying again in {WAIT_SECONDS} seconds", flush=True)
                await asyncio.sleep(WAIT_SECONDS)

    async def _write(self, prompt: Prompt, version: Version) -> None:
        try:
            query = self.chat.encode(list(prompt.turns), self.settings.max_new_tokens)
        except BadField as error:
            self.refused.add(prompt.id)
            print(f"a prompt is left out: {error}", flush=True)
            return

        # One seed a prompt: two answers differ by their weights and never by luck.
        seed = self.seed * 1_000_003 + prompt.id
        # Whoever talks to a version waits for no pair that is written ahead.
        ticket = self.chat.engine.submit(version.name, query, self.settings, seed, background=True)
        try:
            answer = await ticket.result()
        finally:
            ticket.cancel()
        if answer.finish_reason == "cancelled":
            return
        row = {"prompt": prompt.id, "version": version, "sampling": self.sampling, "seed": seed}
        row |= {"text": answer.text, "score": answer.score}
        self.plan.note_answers(await asyncio.to_thread(self.plan.store.add_answers, [row]))
