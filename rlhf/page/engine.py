"""The decoding engine of the page and its API: one thread owns the model, and answers join and leave a running batch.

    engine = Engine(versions.model, prompt_format, ["base", "sft", "rlhf20"], reward=score_head)
    engine.start()
    ticket = engine.submit("sft", query_ids, Settings(), seed=1)
    async for piece in ticket.pieces(): ...
    answer = await ticket.result()

Every answer is drawn from its own seed: it is the same alone and in company, whenever it joins. The requests wait in
one queue, first come first served, so that no version waits for another.
"""

import math
import threading

import torch
from peft import PeftModel
from torch import nn

from rlhf.compare.answers import REWARD_MODEL, Versions
from rlhf.compare.arguments import BASE
from rlhf.data.prompt_format import PromptFormat
from rlhf.models.forward import backbone_of
from rlhf.models.scoring import score
from rlhf.page.batch import Batch, positions_of, speed_up
from rlhf.page.row_adapters import RowAdapters
from rlhf.page.rows import CANCELLED, Row, Settings
from rlhf.page.tickets import EngineClosed, Ticket, TooLong, UnknownVersion, Waiting

# Tokens of prompts that are read between two steps of the batch: the others wait no longer for a long prompt.
READ_AT_ONCE = 256


class Engine:
    """One model with all its adapters, and the answers that it is writing."""

    def __init__(
        self,
        model: nn.Module,
        prompt_format: PromptFormat,
        versions: list[str],
        *,
        reward: nn.Module | None = None,
        max_rows: int = 8,
        max_waiting: int = 64,
    ):
        """
        Args:
            model: the base with the adapters of all versions on it, as rlhf.compare.answers.Versions loads it.
            versions: their names; "base" is the bare base.
            reward: score head of the reward model, whose adapter is on the model too; None scores nothing.
            max_rows: answers written at the same time. max_waiting: requests that wait for their turn.
        """
        self.model = model.get_base_model() if isinstance(model, PeftModel) else model
        self.prompt_format = prompt_format
        self.versions = list(versions)
        self.reward = reward
        self.max_rows = max_rows
        self.positions = positions_of(self.model)

        speed_up(self.model)
        self._adapters = RowAdapters(self.model)
        self._batch = Batch(self.model, self._adapters, max_rows)
        self._waiting = Waiting(max_waiting, max_rows)
        # Its prompt is read in pieces, between which the others get their tokens.
        self._reading: Ticket | None = None
        # In the order of the batch's rows.
        self._writing: list[Ticket] = []
        self._changed = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    # ---- for everybody ----
    def start(self) -> None:
        """Begin to answer."""
        self._thread.start()

    def close(self) -> None:
        """Take no more requests and end those that are there as cancelled."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join()

    def submit(
        self,
        version: str | dict[str, float],
        query_ids: list[int],
        settings: Settings,
        seed: int,
        background: bool = False,
    ) -> Ticket:
        """Ask for one answer; returns at once, from any thread.

        Args:
            version: a name, or names with weights: the sum of their LoRA terms, each times its weight.
            query_ids: token ids up to where the answer begins. seed: of the answer's own draws.
            background: nobody waits for it yet: everybody else comes first.
        Raises: UnknownVersion, TooLong, QueueFull, EngineClosed; ValueError for ids that are no tokens.
        """
        adapters = self._adapters_of(version)
        # Refused here, in the caller's thread: an id beyond the table would be an error of the card, after which no
        # kernel runs.
        vocabulary = self.model.get_input_embeddings().weight.shape[0]
        if not query_ids or not all(0 <= token < vocabulary for token in query_ids):
            raise ValueError(f"the prompt needs at least one token, and none outside of 0 to {vocabulary - 1}")
        if len(query_ids) + settings.max_new_tokens > self.positions:
            raise TooLong(
                f"the prompt has {len(query_ids)} tokens, the answer may have {settings.max_new_tokens} more, but "
                f"this model has {self.positions} positions in all"
            )

        stop_ids = self.prompt_format.stop_ids
        row = Row(list(query_ids), adapters, settings, seed, stop_ids, self.prompt_format.tokenizer)
        ticket = Ticket(row, self._wake, background)
        with self._changed:
            if self._closing:
                raise EngineClosed("the server is closing")
            self._waiting.add(ticket)
            self._changed.notify()
        return ticket

    def load(self) -> tuple[int, int]:
        """Answers that are being written, and requests that wait."""
        with self._changed:
            return len(self._writing) + (self._reading is not None), len(self._waiting)

    def _adapters_of(self, version: str | dict[str, float]) -> dict[str, float]:
        """Names in memory -> weights. Raises: UnknownVersion; ValueError for a weight that is no number."""
        weights = {version: 1.0} if isinstance(version, str) else version
        for name, weight in weights.items():
            if name not in self.versions:
                raise UnknownVersion(f"there is no version {name!r:.60}: there are {', '.join(self.versions)}")
            if not math.isfinite(weight):
                raise ValueError(f"the weight of {name} is not finite")
        return {Versions.adapter_name(name): float(weight) for name, weight in weights.items() if name != BASE}

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify()

    # ---- the engine's thread ----
    @torch.no_grad()
    def _run(self) -> None:
        try:
            while self._wait_for_work():
                self._drop_cancelled()
                self._read_prompts()
                self._write_tokens()
        finally:
            # Nobody may wait for a thread that is not there any more, whatever ended it.
            with self._changed:
                self._closing = True
                left = [*self._waiting.take_all(), *filter(None, [self._reading]), *self._writing]
            for ticket in left:
                ticket.finish(CANCELLED)

    def _wait_for_work(self) -> bool:
        """Return True as soon as there is something to do, False where the engine closes."""
        with self._changed:
            while not (self._closing or self._waiting or self._reading or self._writing):
                self._changed.wait()
            return not self._closing

    def _drop_cancelled(self) -> None:
        """Free the places of those who have gone."""
        with self._changed:
            gone = self._waiting.take_cancelled()
        if self._reading and self._reading.cancelled:
            gone.append(self._reading)
            self._reading = None
        for place in reversed(range(len(self._writing))):
            if self._writing[place].cancelled:
                gone.append(self._leave(place))
        for ticket in gone:
            ticket.finish(CANCELLED)

    def _read_prompts(self) -> None:
        """Read prompts of waiting requests, as many tokens as fit between two steps."""
        # A budget of tokens and not of requests: one prompt may be as long as a hundred.
        left = READ_AT_ONCE
        while left > 0 and (ticket := self._next_to_read()):
            row = ticket.row
            before = row.read
            try:
                logits = self._batch.read(row, left)
                reason = self._take(ticket, logits) if logits is not None else None
            # Whatever a request's own prompt, adapter or settings bring about ends that request alone.
            except Exception as error:
                self._reading = None
                ticket.fail(error)
                continue

            left -= row.read - before
            if logits is None:
                continue
            self._reading = None
            if reason:
                self._finish(ticket, reason)
            else:
                self._join(ticket)

    def _next_to_read(self) -> Ticket | None:
        """The request whose prompt is being read, else the next one, as long as there is a place for it."""
        with self._changed:
            if self._reading is None:
                self._reading = self._waiting.next(self.max_rows - len(self._writing))
            return self._reading

    def _join(self, ticket: Ticket) -> None:
        """Let an answer be written with the others."""
        self._writing.append(ticket)
        try:
            self._batch.join(ticket.row)
        except Exception as error:
            self._fail_batch(error)

    def _write_tokens(self) -> None:
        """One more token of every answer."""
        if not self._writing:
            return
        try:
            logits = self._batch.step()
        except Exception as error:
            self._fail_batch(error)
            return

        # From the last one on, because the last row gets the place of one that leaves.
        for place in reversed(range(len(self._writing))):
            ticket = self._writing[place]
            try:
                reason = self._take(ticket, logits[place])
            except Exception as error:
                self._leave(place)
                ticket.fail(error)
                continue
            if reason:
                self._finish(self._leave(place), reason)

    def _fail_batch(self, error: Exception) -> None:
        """End all answers of the batch, which is in no known state (out of memory, say); the next get a new one."""
        failed = self._writing
        # Emptied first: `fail` wakes others, who may ask how many are being written.
        self._writing = []
        self._batch.clear()
        for ticket in failed:
            ticket.fail(error)

    def _take(self, ticket: Ticket, logits: torch.Tensor) -> str | None:
        """Choose a request's next token and show its text; the reason where the answer ends with it."""
        text, reason = ticket.row.take(logits)
        ticket.show(text)
        return reason

    def _leave(self, place: int) -> Ticket:
        """Take an answer out of the batch, whose last row gets its place."""
        self._batch.leave(place)
        ticket = self._writing[place]
        self._writing[place] = self._writing[-1]
        self._writing.pop()
        return ticket

    def _finish(self, ticket: Ticket, reason: str) -> None:
        """Score an answer where that is asked for, and hand it over."""
        value = None
        try:
            if self.reward is not None and ticket.row.settings.score:
                value = self._score(ticket.row.whole())
        except Exception as error:
            ticket.fail(error)
            return
        ticket.finish(reason, value)

    def _score(self, ids: list[int]) -> float:
        """Score of the reward model, which is one more adapter on the same base."""
        input_ids = torch.tensor([ids], device=self.model.device)
        with self._adapters.active([{Versions.adapter_name(REWARD_MODEL): 1.0}]):
            return float(score(backbone_of(self.model), self.reward, input_ids, torch.ones_like(input_ids)))
