"""An S3 of a few lines in the test's own loop: what obstore asks of a bucket, and ways to misbehave."""

from __future__ import annotations

import hashlib
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from email.utils import formatdate
from xml.etree import ElementTree as ET
from xml.sax.saxutils import escape

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

KEY = "the-access-key"
_NAMESPACE = "{http://s3.amazonaws.com/doc/2006-03-01/}"
_PAGE = 7


class Bucket:
    """One bucket, named "pictures", and what was asked of it."""

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.stored: dict[str, float] = {}
        """Unix seconds of the last write, by key."""
        self.asked: list[str] = []
        self.fails_with = 0
        """A status that every answer has, to stand for a store that is ill."""

    def app(self) -> web.Application:
        app = web.Application(client_max_size=64 * 1024 * 1024)
        app.router.add_route("*", "/pictures", self._answer)
        app.router.add_route("*", "/pictures/{key:.+}", self._answer)
        return app

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        key = request.match_info.get("key", "")
        self.asked.append(f"{request.method} {key}")
        if self.fails_with:
            return web.Response(status=self.fails_with)
        if f"Credential={KEY}/" not in request.headers.get("Authorization", ""):
            return web.Response(status=403, text="<Error><Code>AccessDenied</Code></Error>")
        if not key:
            return await self._delete_several(request) if request.method == "POST" else self._list(request)
        if request.method == "PUT":
            self.objects[key], self.stored[key] = await request.read(), time.time()
            return web.Response(headers={"ETag": _etag(self.objects[key])})
        if key not in self.objects:
            return web.Response(status=404)
        if request.method == "DELETE":
            self._delete(key)
            return web.Response(status=204)
        headers = {
            "ETag": _etag(self.objects[key]),
            "Last-Modified": formatdate(self.stored[key], usegmt=True),
        }
        return web.Response(body=self.objects[key], headers=headers)

    def _list(self, request: web.Request) -> web.Response:
        prefix, after = request.query.get("prefix", ""), request.query.get("continuation-token", "")
        found = [key for key in sorted(self.objects) if key.startswith(prefix) and key > after]
        page = found[:_PAGE]
        more = len(found) > _PAGE
        body = "".join(
            f"<Contents><Key>{escape(key)}</Key><Size>{len(self.objects[key])}</Size>"
            f"<ETag>{escape(_etag(self.objects[key]))}</ETag><LastModified>{_iso(self.stored[key])}</LastModified></Contents>"
            for key in page
        )
        token = f"<NextContinuationToken>{escape(page[-1])}</NextContinuationToken>" if more else ""
        return web.Response(
            text=f"<ListBucketResult><IsTruncated>{str(more).lower()}</IsTruncated>{token}{body}</ListBucketResult>",
            content_type="application/xml",
        )

    async def _delete_several(self, request: web.Request) -> web.Response:
        root = ET.fromstring(await request.text())  # noqa: S314  # the client under test wrote it
        keys = [found.text or "" for tag in ("Key", f"{_NAMESPACE}Key") for found in root.iter(tag)]
        for key in keys:
            self._delete(key)
        deleted = "".join(f"<Deleted><Key>{escape(key)}</Key></Deleted>" for key in keys)
        return web.Response(text=f"<DeleteResult>{deleted}</DeleteResult>", content_type="application/xml")

    def _delete(self, key: str) -> None:
        self.objects.pop(key, None)
        self.stored.pop(key, None)


@asynccontextmanager
async def s3_bucket(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Bucket]:
    """Yield a bucket that s3://pictures/… leads to, by the environment of this process."""
    bucket = Bucket()
    async with TestServer(bucket.app()) as server:
        for name, value in {
            "AWS_ENDPOINT": str(server.make_url("/")).rstrip("/"),
            "AWS_ALLOW_HTTP": "true",
            "AWS_REGION": "us-east-1",
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": "the-secret",
        }.items():
            monkeypatch.setenv(name, value)
        yield bucket


def _etag(data: bytes) -> str:
    return f'"{hashlib.md5(data, usedforsecurity=False).hexdigest()}"'


def _iso(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds)) + ".000Z"
