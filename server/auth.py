"""Who may use the server, and how much: pages, API keys and their limits, as plain ASGI middleware."""

from __future__ import annotations

from collections.abc import Collection

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from medusa_core.errors import MedusaError
from server.answers import error_response
from server.errors import CrossSiteError, InvalidAPIKeyError, RateLimitError
from server.keys import ApiKey, Keyring
from server.limits import Allowance, RateLimiter, rate_limit_headers
from server.request_info import request_info, route_path

# For the machines that poll them, and the API's description. Everything else needs a key, where there are keys.
OPEN_PATHS = frozenset({"/health", "/ready", "/metrics", "/version", "/openapi.json", "/docs", "/docs/oauth2-redirect", "/redoc"})


def is_guarded(path: str) -> bool:
    """Whether a route needs a key."""
    return path not in OPEN_PATHS


class CrossSiteMiddleware:
    """Refuses requests that a browser sends for another site's page, unless CORS lets that page in.

    Such a page cannot read the answers of a server on its visitor's machine or network, but could keep it busy: a plain form's
    request needs nobody's consent.
    """

    def __init__(self, app: ASGIApp, origins: Collection[str]) -> None:
        self._app = app
        self._origins = frozenset(origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "POST" and self._is_foreign(Headers(scope=scope)):
            error = CrossSiteError("This page may not call the server.", hint="Start it with --cors-origin and the page's origin.")
            await error_response(error)(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _is_foreign(self, headers: Headers) -> bool:
        is_cross = headers.get("sec-fetch-site") in ("cross-site", "same-site")
        return is_cross and "*" not in self._origins and headers.get("origin") not in self._origins


class APIKeyMiddleware:
    """Refuses requests without an accepted key, and those beyond the key's limits.

    Limits count requests with a body: those that cost something.
    """

    def __init__(self, app: ASGIApp, keyring: Keyring, limiter: RateLimiter) -> None:
        self._app = app
        self._keyring = keyring
        self._limiter = limiter

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not is_guarded(route_path(scope)):
            await self._app(scope, receive, send)
            return
        key = self._keyring.find(_given_key(Headers(scope=scope)))
        if key is None:
            error = InvalidAPIKeyError("The API key is missing or wrong.", hint="Send it as 'Authorization: Bearer KEY'.")
            await error_response(error)(scope, receive, send)
            return
        request_info(scope).key_name = key.name
        if scope["method"] != "POST" or key.limits.is_unlimited:
            await self._app(scope, receive, send)
            return
        await self._run_limited(key, scope, receive, send)

    async def _run_limited(self, key: ApiKey, scope: Scope, receive: Receive, send: Send) -> None:
        info = request_info(scope)
        try:
            allowance = await self._limiter.acquire(key.name, key.limits)
        except MedusaError as error:
            await error_response(error)(scope, receive, send)
            return
        info.headers |= rate_limit_headers(key.limits, allowance)
        if allowance.refused_for is not None:
            await error_response(_rate_limit_error(key, allowance))(scope, receive, send)
            return
        try:
            await self._app(scope, receive, send)
        finally:
            self._limiter.settle(key.name, key.limits, num_tokens=info.num_charged_tokens)


def _given_key(headers: Headers) -> bytes:
    """Empty, which is no key, if there is none."""
    scheme, _, key = headers.get("authorization", "").partition(" ")
    # Headers are decoded as Latin-1; the bytes behind them are the key's own.
    return key.strip().encode("latin-1") if scheme.lower() == "bearer" else b""


def _rate_limit_error(key: ApiKey, allowance: Allowance) -> RateLimitError:
    limits = key.limits
    reached = {
        "requests": f"{limits.requests_per_minute} requests per minute",
        "tokens": f"{limits.tokens_per_minute} tokens per minute",
        "parallel": f"{limits.parallel_requests} requests at once",
        None: "",
    }[allowance.refused_for]
    return RateLimitError(
        f"The limit of this API key is reached: {reached}.", hint="Wait as long as retry-after says, then try again."
    )
