"""What comes between the network and the page: who may ask, from where, how much and how slowly.

Host            a site that lets its own name point at this machine is refused (DNS rebinding)
token           in the link once, then in a cookie; programs send it as a bearer token
Origin          a write from another site's page is refused
body            limited in length and in time, read before the page sees the request
answer          headers that let no script, no frame and no other site in
"""

import asyncio
import hmac
import json
from http.cookies import CookieError, SimpleCookie
from urllib.parse import parse_qs, urlsplit

# Of a request: a long conversation and a long edited answer have room in it.
MAX_BODY = 1_000_000
BODY_SECONDS = 15
COOKIE = "playground"
LOOPBACK = ("127.0.0.1", "localhost", "::1")

HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    # A browser must not take a file of text for a script.
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    # Answers and names are nobody else's who opens this browser later.
    "cache-control": "no-store",
}


class Refused(Exception):
    """A request that is not answered: its status, and why."""

    def __init__(self, status: int, code: str, message: str):
        super().__init__(message)
        self.status = status
        self.code = code


class Guard:
    """ASGI middleware around the whole application."""

    def __init__(self, app, token: str | None):
        self.app = app
        self.token = token

    async def __call__(self, scope, receive, send):
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        # There is no other protocol here: a WebSocket is turned away before its handshake.
        if scope["type"] != "http":
            return await send({"type": "websocket.close", "code": 1008})

        send = _with_headers(send)
        # HTTP's headers are bytes; latin-1 decodes any of them and loses none.
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        try:
            self._check_host(headers)
            if self._came_by_link(scope):
                return await _answer(send, 303, b"", {"location": "/", "set-cookie": self._cookie()})
            self._check_token(headers)
            # Reading needs no further proof: another site can ask for it, and gets to see nothing.
            if scope["method"] in ("GET", "HEAD"):
                return await self.app(scope, receive, send)
            _check_origin(headers)
            body = await _body(headers, receive)
        except Refused as refused:
            error = {"message": str(refused), "type": "invalid_request_error", "code": refused.code}
            content = json.dumps({"error": error}).encode()
            return await _answer(send, refused.status, content, {"content-type": "application/json"})
        return await self.app(scope, _replayed(body, receive), send)

    def _check_host(self, headers: dict) -> None:
        # With a token a foreign name gains nothing: the cookie belongs to the name under which it was set.
        # By urlsplit, as a host may be an IPv6 address with colons of its own.
        host = urlsplit(f"//{headers.get('host', '')}").hostname
        if self.token is None and host not in LOOPBACK:
            raise Refused(
                421, "host", "this page answers under 127.0.0.1 and localhost: start it with --token for more"
            )

    def _came_by_link(self, scope) -> bool:
        """True for the link with the token in it, which becomes a cookie: the address bar shows it no longer."""
        given = parse_qs(scope["query_string"].decode("latin-1")).get("token", [""])[0]
        return bool(self.token and scope["method"] == "GET" and scope["path"] == "/" and self._fits(given))

    def _cookie(self) -> str:
        # Lax, not Strict: a link from a chat program must arrive with the cookie that it has just set.
        return f"{COOKIE}={self.token}; Path=/; HttpOnly; SameSite=Lax; Max-Age=31536000"

    def _check_token(self, headers: dict) -> None:
        if self.token is None:
            return
        kind, _, bearer = headers.get("authorization", "").partition(" ")
        try:
            cookies = SimpleCookie(headers.get("cookie", ""))
        except CookieError:
            cookies = {}
        cookie = cookies[COOKIE].value if COOKIE in cookies else ""
        if not (kind.lower() == "bearer" and self._fits(bearer.strip())) and not self._fits(cookie):
            raise Refused(401, "token", "open this page by the link that playground.py printed, with its token")

    def _fits(self, given: str) -> bool:
        # In constant time: a comparison that stops at the first wrong letter tells how many are right.
        return hmac.compare_digest(given.encode("utf-8", "replace"), self.token.encode())


def _check_origin(headers: dict) -> None:
    """Refuse a write that another site's page has sent. Programs send no Origin, browsers always do."""
    origin = headers.get("origin")
    foreign = origin is not None and urlsplit(origin).netloc != headers.get("host")
    if foreign or headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
        raise Refused(403, "origin", "another site's page may not write here")
    # A form of another site can send text, but no JSON.
    if headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise Refused(415, "content_type", "send application/json")


async def _body(headers: dict, receive) -> bytes:
    """The whole body of a request. Raises: Refused where it is too long, or takes too long to come."""
    too_long = Refused(413, "too_long", f"a request may have {MAX_BODY:,} bytes")
    # The header alone is refused here; what really comes is counted below.
    length = headers.get("content-length", "0")
    if not length.isdigit() or int(length) > MAX_BODY:
        raise too_long

    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise Refused(400, "disconnected", "the request ended before its body")
                body += message.get("body", b"")
                if len(body) > MAX_BODY:
                    raise too_long
                if not message.get("more_body"):
                    return bytes(body)
    except TimeoutError:
        raise Refused(408, "too_slow", f"the body took longer than {BODY_SECONDS} seconds") from None


def _replayed(body: bytes, receive):
    """A `receive` that gives the body that is read already, and then what comes: the end of the connection."""
    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def again():
        return messages.pop() if messages else await receive()

    return again


def _with_headers(send):
    """A `send` that adds HEADERS to every answer."""

    async def adding(message):
        if message["type"] == "http.response.start":
            own = {name.lower() for name, _ in message.get("headers", [])}
            more = [(name.encode(), value.encode()) for name, value in HEADERS.items() if name.encode() not in own]
            message = message | {"headers": [*message.get("headers", []), *more]}
        await send(message)

    return adding


async def _answer(send, status: int, content: bytes, headers: dict[str, str]) -> None:
    # The rest of a body that is too long is not read: the connection ends with this answer.
    headers = headers | {"content-length": str(len(content)), "connection": "close"}
    raw = [(name.encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": status, "headers": raw})
    await send({"type": "http.response.body", "body": content})
