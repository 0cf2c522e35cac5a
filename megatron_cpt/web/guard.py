"""Who may talk to the server: checked before any page sees a request.

A page that another site opened in the same browser can send requests here, and a name of its own can be made to point
at this machine (DNS rebinding). So the Host must be one of ours, every request needs the token that the command
printed (moved into a cookie by the first page), and what changes something must come from our own origin.
"""

from __future__ import annotations

import hmac
import json
from collections.abc import Mapping
from http.cookies import CookieError, SimpleCookie
from urllib.parse import parse_qs, urlencode

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

MOST_BODY_BYTES = 1 << 20
_SECURITY_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}
_READING = ("GET", "HEAD")


class Guard:
    """Middleware that refuses what is not from the person who started the server.

    Args:
        app: what answers the requests that pass.
        token: the secret of this server.
        port: on which it listens; part of the cookie's name, because cookies are shared over ports.
        hosts: names by which it may be called, without the port.
    """

    def __init__(self, app: ASGIApp, token: str, port: int, hosts: tuple[str, ...]) -> None:
        self.app = app
        self.token = token
        self.cookie = f"megatron_cpt_{port}"
        self.authorities = frozenset(f"{host}:{port}" for host in hosts) | (frozenset(hosts) if port == 80 else set())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or hand it on."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            return  # no websockets here
        headers = Headers(scope=scope)
        send = _with_security_headers(send, fresh=not scope["path"].startswith("/static/"))
        refusal = self._refusal(scope, headers)
        if refusal is not None:
            await refusal(scope, receive, send)
            return
        await self.app(scope, _limited(receive), send)

    def _refusal(self, scope: Scope, headers: Headers) -> Response | None:
        host = headers.get("host", "")
        if host not in self.authorities:
            return PlainTextResponse("this server does not answer to that name", 421)
        given = _query(scope).get("token")
        if given is not None and scope["method"] in _READING:
            return self._welcome(scope) if self._is_token(given) else _needs_token()
        by_header = self._is_token(headers.get("authorization", "").removeprefix("Bearer "))
        if not by_header and not self._is_token(_cookies(headers).get(self.cookie, "")):
            return _needs_token()
        if scope["method"] in _READING:
            return None
        if not by_header and headers.get("origin") != f"http://{host}":
            return PlainTextResponse("the request comes from another page", 403)
        if headers.get("content-type", "").partition(";")[0].strip() != "application/json":
            return PlainTextResponse("send JSON", 415)
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > MOST_BODY_BYTES:
            return PlainTextResponse("the request is too large", 413)
        return None

    def _welcome(self, scope: Scope) -> Response:
        """Put the token into a cookie and out of the address, where it would stay in the history."""
        left = {name: value for name, value in _query(scope).items() if name != "token"}
        # One slash: the browser would take `//name` for another server.
        path = "/" + scope["path"].lstrip("/\\")
        response = RedirectResponse(path + ("?" + urlencode(left) if left else ""), 303)
        response.set_cookie(self.cookie, self.token, httponly=True, samesite="strict", path="/")
        return response

    def _is_token(self, given: str) -> bool:
        return hmac.compare_digest(given.encode(), self.token.encode())


def _needs_token() -> Response:
    return PlainTextResponse("open the address that the command `megatron-cpt web` printed: it holds the token", 403)


def _query(scope: Scope) -> Mapping[str, str]:
    return {name: values[-1] for name, values in parse_qs(scope["query_string"].decode("latin-1")).items()}


def _cookies(headers: Headers) -> Mapping[str, str]:
    try:
        return {name: morsel.value for name, morsel in SimpleCookie(headers.get("cookie", "")).items()}
    except CookieError:
        return {}


def _with_security_headers(send: Send, *, fresh: bool) -> Send:
    async def send_with(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            for name, value in _SECURITY_HEADERS.items():
                headers.setdefault(name, value)
            if fresh:
                headers.setdefault("Cache-Control", "no-store")
        await send(message)

    return send_with


def _limited(receive: Receive) -> Receive:
    """Stop reading a body that is longer than it says, or that never said."""
    read = 0

    async def receive_limited() -> Message:
        nonlocal read
        message = await receive()
        read += len(message.get("body", b""))
        if read > MOST_BODY_BYTES:
            return {"type": "http.disconnect"}
        return message

    return receive_limited


def parse_body(body: bytes) -> dict[str, object]:
    """Return the JSON object that a request brought.

    Raises:
        ValueError: it is none.
    """
    value = json.loads(body)
    if not isinstance(value, dict):
        raise ValueError("the body is not a JSON object")
    return value
