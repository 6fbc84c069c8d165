"""Serves the storefront page and the reference from the package, and answers conditional requests."""

from __future__ import annotations

import mimetypes
from dataclasses import dataclass
from importlib.resources import files
from importlib.resources.abc import Traversable
from typing import Any, Final

from aiohttp import hdrs, web

from catalens.domain import sha256_hex
from catalens.errors import NotFound
from catalens.openapi import Answer, Content, Handler, Operation

_TYPES: Final = {".js": "text/javascript", ".svg": "image/svg+xml", ".woff2": "font/woff2", ".map": "application/json"}


@dataclass(frozen=True, slots=True)
class _File:
    body: bytes
    content_type: str
    etag: str


class Pages:
    """The files of static/, read once: what is not among them does not exist, whatever the path says."""

    def __init__(self) -> None:
        self._files = dict(_read(files("catalens_query") / "static", ""))

    def operations(self) -> list[Operation]:
        """Return the rows of `/`, `/docs` and `/static/…`."""

        def row(path: str, handler: Handler, summary: str, **more: Any) -> Operation:  # Operation's own
            return Operation("GET", path, handler, summary, "pages", "public", params=None, **more)

        html: dict[int, Answer | tuple[Answer, ...]] = {200: Content("text/html"), 304: ()}
        return [
            row("/", self._named("index.html"), "The storefront page", responses=html),
            row("/docs", self._named("docs.html"), "This reference", responses=html),
            row("/static/{path:.+}", self._any, "Files of the pages", documented=False),
        ]

    def _named(self, name: str) -> Handler:
        async def page(request: web.Request) -> web.Response:
            return self._answer(request, name)

        return page

    async def _any(self, request: web.Request) -> web.Response:
        return self._answer(request, request.match_info["path"])

    def _answer(self, request: web.Request, name: str) -> web.Response:
        found = self._files.get(name)
        if found is None:
            raise NotFound(f"{request.path} does not exist")
        return conditional(request, found.body, found.content_type, found.etag)


def has_current(request: web.Request, etag: str) -> bool:
    """True when the client says that it has this very content."""
    return any(known.value in (etag, "*") for known in request.if_none_match or ())


def conditional(request: web.Request, body: bytes, content_type: str, etag: str) -> web.Response:
    """Return `body`, or 304 if the client has it; it may be kept, but is asked about each time."""
    headers = {hdrs.ETAG: f'"{etag}"', hdrs.CACHE_CONTROL: "private, no-cache"}
    if has_current(request, etag):
        return web.Response(status=304, headers=headers)
    charset = "utf-8" if content_type.startswith("text/") else None
    return web.Response(body=body, headers=headers, content_type=content_type, charset=charset)


def _read(folder: Traversable, prefix: str) -> list[tuple[str, _File]]:
    found: list[tuple[str, _File]] = []
    for entry in folder.iterdir():
        if entry.is_dir():
            found += _read(entry, f"{prefix}{entry.name}/")
            continue
        body = entry.read_bytes()
        found.append((prefix + entry.name, _File(body, _content_type(entry.name), sha256_hex(body)[:32])))
    return found


def _content_type(name: str) -> str:
    # The machine's own table comes last: it may call JavaScript text/plain, which browsers refuse to run.
    suffix = name[name.rfind(".") :].lower()
    return _TYPES.get(suffix) or mimetypes.guess_type(name)[0] or "application/octet-stream"
