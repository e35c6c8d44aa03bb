"""Access control: keys, hosts, origins and sizes of bodies."""

import hashlib
import hmac
from collections.abc import Sequence
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kvote.serve.errors import ApiError

NOBODY = "anyone"
# Of a client without a key.
_OPEN = ("/", "/health")


def owner_of(authorization: str | None, keys: Sequence[str]) -> str:
    """The owner of a request: a digest of its key, by which documents are told apart. All keys are compared, in
    constant time. Raises ApiError for none of them."""
    if not keys:
        return NOBODY
    scheme, _, given = (authorization or "").partition(" ")
    told = given.strip().encode() if scheme.lower() == "bearer" else b""
    known = [hmac.compare_digest(told, key.encode()) for key in keys]
    if not any(known):
        raise ApiError(401, "The API key is missing or not one of this server's.", code="invalid_api_key")
    return hashlib.sha256(told).hexdigest()


class Gate:
    """Refuses requests under other host names (DNS rebinding), from pages of other origins, and with bodies above
    ``most`` bytes, before anything of them is read."""

    def __init__(self, app: ASGIApp, hosts: Sequence[str], most: int) -> None:
        self.app, self.hosts, self.most = app, {host.lower() for host in hosts}, most

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        error = self._refused(headers)
        if error is not None:
            await error.response(scope, receive, send)
            return
        seen = 0

        async def counted() -> Message:
            nonlocal seen
            message = await receive()
            if message["type"] == "http.request":
                seen += len(message.get("body", b""))
                if seen > self.most:
                    raise self._too_large()
            return message

        await self.app(scope, counted, send)

    def _refused(self, headers: dict[str, str]) -> ApiError | None:
        host = headers.get("host", "")
        if "*" not in self.hosts and _name(f"//{host}") not in self.hosts:
            return ApiError(403, "This server is not known under that host name; start it with --allow-host.")
        origin = headers.get("origin")
        if origin is not None and urlsplit(origin).netloc.lower() != host.lower():
            return ApiError(403, "Pages of other origins may not use this server.")
        length = headers.get("content-length", "0")
        if not length.isdecimal():
            return ApiError(400, "Content-Length is no number.")
        return self._too_large() if int(length) > self.most else None

    def _too_large(self) -> ApiError:
        return ApiError(413, f"The body is larger than {self.most:,} bytes.", code="body_too_large")


def _name(url: str) -> str:
    try:
        return (urlsplit(url).hostname or "").lower()
    except ValueError:
        return ""
