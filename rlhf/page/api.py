"""OpenAI's API over the engine: /v1/chat/completions, /v1/completions and /v1/models, each version a model name.

    app = Starlette(routes=[*api.routes(engine), ...])

A chat is encoded in the prompt format of the adapters; a completion is plain text that goes on. Whatever is wrong with
a request is said in the API's own shape, and a client that goes away frees its place.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Mount, Route

from rlhf.page import openai_requests
from rlhf.page.engine import Engine
from rlhf.page.openai_answers import Shape, error, error_body, event
from rlhf.page.openai_requests import BadRequest, Encoder, Wanted
from rlhf.page.rows import CANCELLED, Answer
from rlhf.page.tickets import EngineClosed, QueueFull, Ticket, TooLong, UnknownVersion

# Bytes of a body at most, and seconds that it may take to arrive.
BODY_BYTES = 1 << 20
BODY_SECONDS = 30


def routes(
    engine: Engine, *, prefix: str = "/v1", default_tokens: int = 512, body_bytes: int = BODY_BYTES
) -> list[Mount]:
    """The API's routes, for an application to mount; the application starts and closes the engine.

    Args:
        default_tokens: length of an answer at most, where a request does not say. body_bytes: of a request at most.
    """
    api = Api(engine, default_tokens, body_bytes)
    # An application of its own, so that these errors take the API's shape and those of the page keep theirs.
    inner = Starlette(
        routes=[
            Route("/chat/completions", api.chat, methods=["POST"]),
            Route("/completions", api.completions, methods=["POST"]),
            Route("/models", api.models, methods=["GET"]),
            Route("/models/{name:path}", api.model, methods=["GET"]),
        ],
        exception_handlers={BadRequest: _refuse, HTTPException: _no_route, Exception: _own_fault},
    )
    return [Mount(prefix, app=inner)]


class Api:
    """The handlers of one engine."""

    def __init__(self, engine: Engine, default_tokens: int, body_bytes: int):
        self.engine = engine
        self.encoder = Encoder(engine.prompt_format)
        self.default_tokens = default_tokens
        self.body_bytes = body_bytes
        # Of the server and not of the adapter: clients only want a number here.
        self.created = int(time.time())

    # ---- models ----
    async def models(self, request: Request) -> Response:
        """All versions."""
        return JSONResponse({"object": "list", "data": [self._described(name) for name in self.engine.versions]})

    async def model(self, request: Request) -> Response:
        """One version."""
        name = request.path_params["name"]
        if name not in self.engine.versions:
            raise _unknown(name, self.engine.versions)
        return JSONResponse(self._described(name))

    def _described(self, name: str) -> dict:
        return {"id": name, "object": "model", "created": self.created, "owned_by": "lora-rlhf"}

    # ---- answers ----
    async def chat(self, request: Request) -> Response:
        """The next turn of a dialogue."""
        return await self._answer(request, openai_requests.chat, is_chat=True)

    async def completions(self, request: Request) -> Response:
        """A text goes on."""
        return await self._answer(request, openai_requests.completion, is_chat=False)

    async def _answer(self, request: Request, read: Callable, is_chat: bool) -> Response:
        """`read`: makes of a body what is wanted."""
        body = await self._body(request)
        # In a thread of its own: the streams of all others go on while a long text is encoded.
        wanted = await asyncio.to_thread(read, body, self.encoder)
        tickets = self._submit(wanted)
        shape = Shape(is_chat, wanted.model, self.engine.prompt_format.tokenizer)
        prompt_tokens = sum(map(len, wanted.queries))
        # The tickets are the stream's own from here on: it frees their places when it ends, however that is.
        if wanted.stream:
            return Stream(tickets, chunks(tickets, shape, prompt_tokens, wanted.usage_in_stream))
        try:
            answers = await unless_gone(request, asyncio.gather(*map(finished, tickets)))
        except BadRequest:
            raise
        # The engine's own errors (out of memory, numbers that are not finite) are told as the server's.
        except Exception as problem:
            raise BadRequest(_unfinished(problem), status=500) from None
        # Of a finished answer this changes nothing; of an unfinished one it frees the place.
        finally:
            for ticket in tickets:
                ticket.cancel()
        return JSONResponse(shape.whole(answers, prompt_tokens))

    def _submit(self, wanted: Wanted) -> list[Ticket]:
        """A ticket for each answer, or none at all. Raises: BadRequest."""
        tickets = []
        try:
            for number in range(len(wanted.queries) * wanted.n):
                query = wanted.queries[number // wanted.n]
                # The answers to one request differ, and the first of them is that of a request for one.
                seed = (wanted.seed + number) % openai_requests.SEEDS
                # A default may be cut to what fits, for nobody asked for it; a number that was asked for is refused
                # instead.
                room = self.engine.positions - len(query)
                most = wanted.max_tokens or max(1, min(self.default_tokens, room))
                tickets.append(self.engine.submit(wanted.model, query, wanted.settings_for(most), seed))
        except (UnknownVersion, TooLong, QueueFull, EngineClosed, ValueError) as problem:
            # All or none: a request for several answers does not begin with a part of them.
            for ticket in tickets:
                ticket.cancel()
            raise self._refusal(problem, wanted.model) from None
        return tickets

    def _refusal(self, problem: Exception, name: str) -> BadRequest:
        """What the engine's refusal is called in the API."""
        if isinstance(problem, UnknownVersion):
            return _unknown(name, self.engine.versions)
        if isinstance(problem, TooLong):
            return BadRequest(str(problem), code="context_length_exceeded")
        if isinstance(problem, QueueFull):
            return BadRequest(str(problem), status=429, code="rate_limit_exceeded")
        if isinstance(problem, EngineClosed):
            return BadRequest(str(problem), status=503)
        return BadRequest(str(problem))

    async def _body(self, request: Request) -> bytes:
        """The body of a request. Raises: BadRequest for one that is too large or too slow."""
        parts = []
        size = 0
        try:
            async with asyncio.timeout(BODY_SECONDS):
                async for part in request.stream():
                    # Counted as it comes: a header may promise fewer bytes than are sent.
                    size += len(part)
                    if size > self.body_bytes:
                        raise BadRequest(f"the body is larger than {self.body_bytes} bytes", status=413)
                    parts.append(part)
        except TimeoutError:
            raise BadRequest(f"the body did not arrive within {BODY_SECONDS} seconds", status=408) from None
        except ClientDisconnect:
            raise BadRequest("the client has gone", status=400) from None
        return b"".join(parts)


# ---- waiting ----
async def finished(ticket: Ticket) -> Answer:
    """The answer. Raises: BadRequest where the server closes before; the error that ended the answer."""
    answer = await ticket.result()
    if answer.finish_reason == CANCELLED:
        raise BadRequest("the server is closing", status=503)
    return answer


async def unless_gone(request: Request, work: Awaitable[list[Answer]]) -> list[Answer]:
    """The answers, unless the client goes away before. Raises: BadRequest then; the error that ended an answer."""
    # The body has been read, so that the next thing to be received can only be the end of the connection.
    work = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait([work, gone], return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            raise BadRequest("the client has gone", status=400)
        return work.result()
    finally:
        # Only the waiting ends here; the answers end by their tickets.
        work.cancel()
        gone.cancel()


async def _gone(request: Request) -> None:
    """Return as soon as the client has closed its connection."""
    # What else may come is an empty rest of the body.
    while (await request.receive())["type"] != "http.disconnect":
        pass


# ---- streams ----
class Stream(StreamingResponse):
    """Events as they come. However the response ends, its places are free afterwards."""

    def __init__(self, tickets: list[Ticket], events: AsyncIterator[bytes]):
        # Proxies that keep an answer until it is whole are asked not to.
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self.tickets = tickets

    async def __call__(self, scope, receive, send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            for ticket in self.tickets:
                ticket.cancel()


async def chunks(tickets: list[Ticket], shape: Shape, prompt_tokens: int, counted: bool) -> AsyncIterator[bytes]:
    """The events of a stream: pieces of all answers as they come, the end of each, the counts if they are wanted."""
    news: asyncio.Queue = asyncio.Queue()
    # One task an answer: a slow one holds no other up.
    readers = [asyncio.ensure_future(_read(index, ticket, news)) for index, ticket in enumerate(tickets)]
    answers: list[Answer] = []
    try:
        # Clients build a message from its role, which has to come before its text.
        for index in range(len(tickets)) if shape.chat else ():
            yield shape.opening(index)
        while len(answers) < len(tickets):
            index, item = await news.get()
            # One failed answer ends the stream, as a choice that never closes would make a client wait.
            if isinstance(item, Exception):
                raise item
            if isinstance(item, Answer):
                answers.append(item)
                yield shape.closing(index, item.finish_reason)
            else:
                yield shape.piece(index, item)
        if counted:
            yield shape.counted(answers, prompt_tokens)
        yield event("[DONE]")
    # The status has been sent, so that an error can only be one more event.
    except Exception as problem:
        yield event(error_body(_unfinished(problem), 500))
    finally:
        for reader in readers:
            reader.cancel()


async def _read(index: int, ticket: Ticket, news: asyncio.Queue) -> None:
    """Put the pieces of one answer, and then the answer, among the news of all."""
    try:
        async for piece in ticket.pieces():
            await news.put((index, piece))
        await news.put((index, await finished(ticket)))
    except Exception as problem:
        await news.put((index, problem))


# ---- errors ----
def _unknown(name: str, versions: list[str]) -> BadRequest:
    # At most 60 characters of the name, for it is the client's own text.
    sentence = f"there is no model {name!r:.60}: there are {', '.join(versions)}"
    return BadRequest(sentence, "model", status=404, code="model_not_found")


def _unfinished(problem: Exception) -> str:
    return f"the answer could not be finished: {problem}"


async def _refuse(request: Request, problem: BadRequest) -> Response:
    return error(problem.message, problem.status, problem.param, problem.code)


async def _no_route(request: Request, problem: HTTPException) -> Response:
    return error(f"{request.method} {request.url.path}: {problem.detail}", problem.status_code)


async def _own_fault(request: Request, problem: Exception) -> Response:
    return error(f"the answer could not be made: {type(problem).__name__}", 500)
