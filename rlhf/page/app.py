"""The application: its routes, what each takes and answers. The texts of people and models are data throughout.

Every write is JSON, checked field by field. No path comes from a request: the files that are served are read once,
and are looked up by their names.
"""

import json
import sqlite3
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from rlhf.page import export
from rlhf.page.fields import BadField, chat_fields, count_field, prompt_fields, text_field, undo_fields, vote_fields
from rlhf.page.guard import Guard
from rlhf.page.results import results
from rlhf.page.store import AlreadyVoted, Store
from rlhf.page.vote import Plan, Shown, UnknownPair

# They load torch, which a page without a model does not need.
if TYPE_CHECKING:
    from rlhf.page.chat import Chat
    from rlhf.page.prepare import Preparer

STATIC = Path(__file__).parent / "static"
# Pairs that one question may get.
MOST_AHEAD = 3
TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}


@dataclass
class Page:
    """What the application serves; `chat` and `preparer` are None where no model is loaded."""

    store: Store
    plan: Plan
    output_dir: Path
    min_pairs: int
    base: str | None = None
    token: str | None = None
    chat: "Chat | None" = None
    preparer: "Preparer | None" = None
    # Routes of other rooms, such as the API's.
    more_routes: list = field(default_factory=list)


def create_app(page: Page):
    """The ASGI application of a page."""
    handlers = Handlers(page)

    @asynccontextmanager
    async def lifespan(app):
        if page.preparer:
            page.preparer.start()
        yield
        if page.preparer:
            await page.preparer.stop()

    # Each route names its methods: a GET changes nothing, so that no link can vote.
    routes = [
        Route("/page/state", handlers.state),
        Route("/page/next", handlers.next),
        Route("/page/vote", handlers.vote, methods=["POST"]),
        Route("/page/undo", handlers.undo, methods=["POST"]),
        Route("/page/prompt", handlers.prompt, methods=["POST"]),
        Route("/page/chat", handlers.chat, methods=["POST"]),
        Route("/page/results", handlers.results),
        Route("/page/export", handlers.export, methods=["POST"]),
        Route("/page/files/{name}", handlers.file),
        *page.more_routes,
        *_static_routes(),
    ]
    errors = {
        BadField: _error(400, "bad_request"),
        json.JSONDecodeError: _error(400, "bad_request"),
        # Bytes that are no UTF-8, and brackets nested too deeply, are the sender's mistake like any other.
        UnicodeDecodeError: _error(400, "bad_request"),
        RecursionError: _error(400, "bad_request"),
        AlreadyVoted: _error(409, "already_voted"),
        UnknownPair: _error(404, "unknown_pair"),
        sqlite3.OperationalError: _error(507, "disk_full"),
        # The only files that are written are the store and the exports.
        OSError: _error(507, "disk_full"),
    }
    return Guard(Starlette(routes=routes, lifespan=lifespan, exception_handlers=errors), page.token)


def _error(status: int, code: str):
    """A handler of exceptions that answers in the shape of the API's errors."""

    async def handle(request: Request, error: Exception):
        return JSONResponse({"error": {"message": str(error), "type": code, "code": code}}, status)

    return handle


def _static_routes() -> list[Route]:
    """A route for each file of static/, read once."""
    routes = []
    for path in sorted(STATIC.iterdir()):
        kind = TYPES.get(path.suffix)
        if kind:
            # By name and from a list made at the start: no request can name another file.
            address = "/" if path.name == "index.html" else f"/static/{path.name}"
            routes.append(Route(address, _file_handler(path.read_bytes(), kind)))
    return routes


def _file_handler(content: bytes, kind: str):
    async def handle(request: Request):
        return Response(content, media_type=kind)

    return handle


class Handlers:
    """What each route does with a page."""

    def __init__(self, page: Page):
        self.page = page

    async def state(self, request: Request):
        """What the page has to know before anything is asked: are there a model, a reward model, prompts."""
        page = self.page
        chat = page.chat
        return JSONResponse(
            {
                "chat": chat is not None,
                "scores": bool(chat and chat.has_reward),
                # Names are no secret: only which answer is whose.
                "versions": chat.names if chat else [],
                "settings": chat.defaults if chat else None,
                "min_pairs": page.min_pairs,
                "can_vote": bool(page.plan.versions[1:]),
            }
        )

    # ---- votes ----
    async def next(self, request: Request):
        """The next pairs of a person, and how far they are; nothing in it says which version wrote what."""
        query = request.query_params
        person = text_field(query, "person", 60)
        tab = text_field(query, "tab", 60)
        # Numbers of at most 14 digits: longer ones would be a request to compute, and SQLite has no place for them.
        held = {int(word) for word in query.get("held", "").split(",") if word.isdecimal() and len(word) < 15}
        count = count_field(query, "count", MOST_AHEAD)
        # Those that lie in the browser are found again, so it takes more than are asked for.
        ahead = await run_in_threadpool(self.page.plan.next, person, tab, count + len(held))
        pairs = [in_view(shown) for shown in ahead if shown.pair not in held][:count]
        # Beside the pairs, so that a page that was open all night shows what others have done.
        progress = await run_in_threadpool(self.page.plan.progress, person)
        if self.page.preparer:
            self.page.preparer.wake()
        return JSONResponse({"pairs": pairs, "progress": progress})

    async def vote(self, request: Request):
        """Store a vote; what it answers comes after the vote is on the disk, and holds the names."""
        given = vote_fields(await request.json())
        # In a thread, for a vote waits for the disk and everybody else for this loop.
        number, shown = await run_in_threadpool(self.page.plan.vote, given)
        if self.page.preparer:
            self.page.preparer.wake()
        sides = {"left": shown.left, "right": shown.right}
        named = {side: {"version": answer.version.name, "score": answer.score} for side, answer in sides.items()}
        return JSONResponse({"vote": number, **named})

    async def undo(self, request: Request):
        """Take a vote back and give its pair again."""
        # The person is part of it: an undo of somebody else's vote finds nothing.
        number, person, tab = undo_fields(await request.json())
        shown = await run_in_threadpool(self.page.plan.undo, number, person, tab)
        if shown is None:
            raise BadField("there is no such vote of yours")
        return JSONResponse({"pair": in_view(shown)})

    async def prompt(self, request: Request):
        """Put a conversation of the chat on the list of prompts to vote on."""
        if self.page.preparer is None:
            raise BadField("no model is loaded that could answer it")
        turns = prompt_fields(await request.json())
        # Shared with everybody: whoever adds a prompt wants to hear what others think.
        await run_in_threadpool(self.page.store.add_prompts, [turns], 1.0, "chat")
        await run_in_threadpool(self.page.plan.refresh)
        self.page.preparer.wake()
        return JSONResponse({"done": True})

    # ---- chat ----
    async def chat(self, request: Request):
        """Answer a conversation, as lines of JSON while it is written."""
        if self.page.chat is None:
            raise BadField("no model is loaded: start playground.py with --base_model_name")
        # Checked against the names in memory: a request cannot name an adapter that was not loaded.
        fields = chat_fields(await request.json(), self.page.chat.names)
        try:
            ticket, seed = self.page.chat.ask(fields)
        # The queue is full, or the server is closing.
        except RuntimeError as error:
            return await _error(503, "busy")(request, error)
        return StreamingResponse(self.page.chat.lines(ticket, seed), media_type="application/x-ndjson")

    # ---- results ----
    async def results(self, request: Request):
        """Tables of the votes, of everybody or of ?person=NAME."""
        person = request.query_params.get("person") or None
        # Computed anew each time, so that a vote shows at once; a thousand votes take milliseconds.
        made = await run_in_threadpool(lambda: results(self._votes(), person))
        return JSONResponse(made)

    async def export(self, request: Request):
        """Write the votes as data for training, and tell the command that trains on it."""
        file = self.page.output_dir / export.PAIRS
        try:
            made = await run_in_threadpool(lambda: export.write(self._votes(), file, self.page.min_pairs))
        except ValueError as error:
            funnel = await run_in_threadpool(lambda: export.collect(self._votes()).funnel)
            # Too few votes are no error of the request: the page shows what is missing.
            return JSONResponse({"refused": str(error), "funnel": funnel})
        rows = {export.PAIRS: made.pairs, export.SFT: made.sft, export.BAD: made.bad}
        command = export.training_command(made, file, self.page.base)
        files = [name for name, lines in rows.items() if lines]
        return JSONResponse({"funnel": made.funnel, "files": files, "folder": str(file.parent), "command": command})

    async def file(self, request: Request):
        """An exported file; its name is one of three, and never a path."""
        name = request.path_params["name"]
        path = self.page.output_dir / name
        if name not in export.FILES or not path.is_file():
            return PlainTextResponse("there is no such file", 404)
        # Saved and not shown: its texts are of people and models, and a browser would try to make something of them.
        headers = {"content-disposition": f'attachment; filename="{name}"'}
        content = await run_in_threadpool(path.read_bytes)
        return Response(content, media_type="application/x-ndjson", headers=headers)

    def _votes(self) -> list[dict]:
        return [dict(row) for row in self.page.store.votes()]


def in_view(shown: Shown) -> dict:
    """A pair as the browser gets it before the vote: texts, and nothing of who wrote them."""
    # No id of an answer either: ids rise in the order of writing, and would give versions away.
    turns = [list(turn) for turn in shown.prompt.turns]
    return {"pair": shown.pair, "turns": turns, "left": shown.left.text, "right": shown.right.text}
