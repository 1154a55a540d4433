"""uvicorn's HTTP protocol with a limit of time for the head of a request; the body's is in guard.py."""

import asyncio

from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_SECONDS = 15


class PatientProtocol(H11Protocol):
    """Closes a connection whose next request has begun and does not come to the end of its head.

    Without it a client that sends a byte a minute holds its connection for ever.
    """

    head_timer: asyncio.TimerHandle | None = None

    def data_received(self, data: bytes) -> None:
        """Take bytes; the timer runs from the first byte of a head to its last."""
        # First, as it is what tells whether the head has come to its end.
        super().data_received(data)
        waits = self._waits_for_head()
        if waits and self.head_timer is None:
            # Not moved on by further bytes: one a minute would otherwise keep the connection for ever.
            self.head_timer = self.loop.call_later(HEAD_SECONDS, self._give_up)
        if not waits:
            self._stop_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection has ended."""
        self._stop_timer()
        super().connection_lost(exc)

    def _waits_for_head(self) -> bool:
        # Between two requests of one connection the last cycle is done; a first request has none yet.
        return self.cycle is None or self.cycle.response_complete

    def _give_up(self) -> None:
        self.head_timer = None
        if self._waits_for_head() and not self.transport.is_closing():
            self.transport.close()

    def _stop_timer(self) -> None:
        if self.head_timer is not None:
            self.head_timer.cancel()
            self.head_timer = None
