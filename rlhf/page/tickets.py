"""A request's way back: pieces of text and the finished answer, from the engine's thread to whoever waits for them."""

import asyncio
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future

from rlhf.page.rows import Answer, Row

# Places that requests in the background leave free.
KEPT_FREE = 2


class UnknownVersion(ValueError):
    """A request names a version that is not there."""


class TooLong(ValueError):
    """Prompt and answer together need more positions than the model has."""


class QueueFull(RuntimeError):
    """Too many requests are waiting."""


class EngineClosed(RuntimeError):
    """The engine takes no more requests."""


class Ticket:
    """One answer that was asked for.

    The engine's thread appends and finishes; any number of event loops may read.
    """

    def __init__(self, row: Row, wake: Callable[[], None], background: bool):
        """`wake`: tells the engine that something has changed. `background`: everybody else comes first."""
        self.row = row
        self.cancelled = False
        self.background = background
        self._wake = wake
        self._pieces: list[str] = []
        self._future: Future[Answer] = Future()
        # Running from the start, so that a reader who gives up cannot take it from the others.
        self._future.set_running_or_notify_cancel()
        self._readers: list[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = []

    # ---- for whoever waits ----
    async def pieces(self) -> AsyncIterator[str]:
        """The answer's text as it comes, whole characters only. Raises: the error that ended the answer."""
        reader = (asyncio.get_running_loop(), asyncio.Event())
        self._readers.append(reader)
        # Each reader counts for itself, so that one who comes late gets the whole text.
        given = 0
        try:
            while True:
                # In this order: what comes after a look sets the event again.
                reader[1].clear()
                # Looked at before the pieces: what comes between the two is then read in the next round.
                ended = self._future.done()
                while given < len(self._pieces):
                    given += 1
                    yield self._pieces[given - 1]
                if ended:
                    break
                await reader[1].wait()
        finally:
            self._readers.remove(reader)
        self._future.result()

    async def result(self) -> Answer:
        """The finished answer. Raises: the error that ended it."""
        # Cancelling this only ends the waiting of one reader, see `__init__`.
        return await asyncio.wrap_future(self._future)

    def cancel(self) -> None:
        """Give the place up: the answer ends as "cancelled" with what there is of it."""
        self.cancelled = True
        self._wake()

    # ---- for the engine's thread ----
    def show(self, text: str) -> None:
        """Hand out a piece of text."""
        if text:
            self._pieces.append(text)
            self._notify()

    def finish(self, reason: str, score: float | None = None) -> None:
        """Hand out the answer."""
        row = self.row
        self.show(row.stream.rest())
        logprobs = row.logprobs if row.settings.logprobs else None
        # The keys and values of a row that never joined, which would be kept as long as somebody holds the ticket.
        row.cache = None
        self._future.set_result(Answer("".join(self._pieces), row.token_ids, reason, logprobs, score))
        self._notify()

    def fail(self, error: Exception) -> None:
        """Hand out an error in place of the answer."""
        self.row.cache = None
        self._future.set_exception(error)
        self._notify()

    def _notify(self) -> None:
        # A copy, for readers come and go in their own threads.
        for loop, news in list(self._readers):
            try:
                loop.call_soon_threadsafe(news.set)
            except RuntimeError:
                # The reader's loop has been closed: nobody waits there.
                continue


class Waiting:
    """The requests that wait for a place, first come first served; those in the background let everybody else pass."""

    def __init__(self, most: int, places: int):
        """`most`: requests that may wait. `places`: answers that are written at the same time."""
        self.most = most
        # The background never fills all places, unless there is one alone.
        self.kept_free = min(KEPT_FREE, places - 1)
        self._tickets: list[Ticket] = []

    def __len__(self) -> int:
        return len(self._tickets)

    def add(self, ticket: Ticket) -> None:
        """Let a request wait. Raises: QueueFull."""
        if len(self._tickets) >= self.most:
            raise QueueFull(f"{self.most} requests are waiting already: try again in a while")
        self._tickets.append(ticket)

    def next(self, free: int) -> Ticket | None:
        """Take out the request that comes next while so many places are free; None where none may."""
        if free < 1:
            return None
        # Whoever waits comes before all of the background, however long that has been there.
        chosen = next((ticket for ticket in self._tickets if not ticket.background), None)
        if chosen is None and self._tickets and free > self.kept_free:
            chosen = self._tickets[0]
        if chosen is not None:
            self._tickets.remove(chosen)
        return chosen

    def take_cancelled(self) -> list[Ticket]:
        """Take out those that nobody waits for any more."""
        gone = [ticket for ticket in self._tickets if ticket.cancelled]
        self._tickets = [ticket for ticket in self._tickets if not ticket.cancelled]
        return gone

    def take_all(self) -> list[Ticket]:
        """Take out all."""
        left = self._tickets
        self._tickets = []
        return left
