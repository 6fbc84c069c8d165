"""What every ImageSource promises, and that HttpImages goes nowhere it must not, whoever answers."""

from __future__ import annotations

import asyncio
import gzip
import tracemalloc
import zlib
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from tests import pictures

from catalens.domain import SeenPicture, sha256_hex
from catalens.engines.images import HttpImages, Lookup, is_global, system_lookup
from catalens.errors import ForbiddenUrl, InvalidPicture, NotFound, Transient
from catalens.ports import FetchedPicture
from catalens.settings import PictureSettings

PICTURE = pictures.jpeg()
OPEN = PictureSettings(allow_private_networks=True, max_bytes=100_000, fetch_timeout=30)
STRICT = PictureSettings(max_bytes=100_000, fetch_timeout=30)

BOMB = gzip.compress(b"\x00" * 50_000_000)
assert len(BOMB) < OPEN.max_bytes

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Shop:
    """A local picture server that behaves as badly as a path asks it to."""

    def __init__(self) -> None:
        self.seen: list[str] = []
        self.connections: set[asyncio.Transport | None] = set()
        self.at_once: Counter[str] = Counter()
        self.most_at_once: Counter[str] = Counter()
        self.headers: list[dict[str, str]] = []
        self.hold = asyncio.Event()
        self.entered = asyncio.Semaphore(0)
        self.cut_off = asyncio.Event()

    async def answer(self, request: web.Request) -> web.StreamResponse:
        self.seen.append(request.path_qs)
        self.connections.add(request.transport)
        self.headers.append(dict(request.headers))
        handler: Handler = getattr(self, request.match_info["what"].replace("-", "_"))
        return await handler(request)

    async def picture(self, _: web.Request) -> web.StreamResponse:
        return web.Response(body=PICTURE, content_type="image/jpeg")

    async def tagged(self, request: web.Request) -> web.StreamResponse:
        """A picture with the validators that the query names; 304 to whoever states one of them."""
        validators = {name: request.query[name] for name in ("ETag", "Last-Modified") if name in request.query}
        asked = {"ETag": "If-None-Match", "Last-Modified": "If-Modified-Since"}
        if any(request.headers.get(asked[name]) == value for name, value in validators.items()):
            return web.Response(status=304, headers=validators)
        return web.Response(body=PICTURE, headers=validators)

    async def unmodified(self, _: web.Request) -> web.StreamResponse:
        return web.Response(status=304)

    async def status(self, request: web.Request) -> web.StreamResponse:
        return web.Response(status=int(request.query["code"]), headers={"Retry-After": "7"})

    async def redirect(self, request: web.Request) -> web.StreamResponse:
        return web.Response(status=int(request.query.get("code", "302")), headers={"Location": request.query["to"]})

    async def around(self, request: web.Request) -> web.StreamResponse:
        left = int(request.query["left"])
        to = f"/around?left={left - 1}" if left else "/picture"
        return web.Response(status=302, headers={"Location": to})

    async def endless(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        try:
            while True:
                await response.write(b"x" * 10_000)
        finally:
            self.cut_off.set()

    async def silent(self, _: web.Request) -> web.StreamResponse:
        await self.hold.wait()
        return web.Response()

    async def dripping(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(PICTURE[:10])
        await self.hold.wait()
        return response

    async def loris(self, request: web.Request) -> web.StreamResponse:
        """Never silent for long, and never done."""
        response = web.StreamResponse()
        await response.prepare(request)
        while not self.hold.is_set():
            await response.write(b"x")
            await asyncio.sleep(0.01)
        return response

    async def cut(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Length": str(len(PICTURE))})
        await response.prepare(request)
        await response.write(PICTURE[:100])
        assert request.transport is not None
        request.transport.close()
        return response

    async def boastful(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Length": "5000000"})
        await response.prepare(request)
        await self.hold.wait()
        return response

    async def packed(self, request: web.Request) -> web.StreamResponse:
        packed = gzip.compress(PICTURE)
        coding, body = {
            "gzip": ("gzip", packed),
            "deflate": ("deflate", zlib.compress(PICTURE)),
            "half": ("gzip", packed[:-9]),
            "br": ("br", PICTURE),
        }[request.query["how"]]
        return web.Response(body=body, headers={"Content-Encoding": coding})

    async def bomb(self, _: web.Request) -> web.StreamResponse:
        return web.Response(body=BOMB, headers={"Content-Encoding": "gzip"})

    async def counted(self, request: web.Request) -> web.StreamResponse:
        for name in (request.url.host or "", "all"):
            self.at_once[name] += 1
            self.most_at_once[name] = max(self.most_at_once[name], self.at_once[name])
        self.entered.release()
        await self.hold.wait()
        for name in (request.url.host or "", "all"):
            self.at_once[name] -= 1
        return web.Response(body=PICTURE)


@pytest.fixture
async def shop() -> Shop:
    return Shop()


@pytest.fixture
async def at(shop: Shop) -> AsyncIterator[Callable[[str], str]]:
    """Return the URL of a path of the shop."""
    app = web.Application()
    app.router.add_get("/{what}", shop.answer)
    server = TestServer(app)
    await server.start_server(shutdown_timeout=0)
    yield lambda path: str(server.make_url("/")).rstrip("/") + path
    shop.hold.set()
    await server.close()


@asynccontextmanager
async def source(settings: PictureSettings = OPEN, lookup: Lookup = system_lookup) -> AsyncIterator[HttpImages]:
    images = HttpImages(settings, lookup)
    try:
        yield images
    finally:
        await images.close()


At = Callable[[str], str]


# --- what is fetched -------------------------------------------------------------------------------------------------


async def test_the_bytes_come_as_they_are(at: At, shop: Shop) -> None:
    async with source() as images:
        assert await images.fetch(at("/picture")) == PICTURE
    assert shop.headers[0]["Accept-Encoding"] == "identity"
    assert "Cookie" not in shop.headers[0]


@pytest.mark.parametrize("code", [301, 302, 303, 307, 308])
async def test_redirects_are_followed_relative_ones_too(at: At, code: int) -> None:
    async with source() as images:
        assert await images.fetch(at(f"/redirect?code={code}&to={at('/picture')}")) == PICTURE
        assert await images.fetch(at(f"/redirect?code={code}&to=/picture")) == PICTURE
        assert await images.fetch(at("/around?left=4")) == PICTURE


async def test_five_redirects_are_enough(at: At, shop: Shop) -> None:
    async with source() as images:
        with pytest.raises(ForbiddenUrl, match="redirects"):
            await images.fetch(at("/around?left=99"))
    assert len(shop.seen) == 6


@pytest.mark.parametrize("how", ["gzip", "deflate"])
async def test_a_body_that_was_packed_unasked_is_unpacked(at: At, how: str) -> None:
    async with source() as images:
        assert await images.fetch(at(f"/packed?how={how}")) == PICTURE


@pytest.mark.parametrize(
    ("code", "error"),
    [
        (400, NotFound),
        (403, NotFound),
        (404, NotFound),
        (410, NotFound),
        (408, Transient),
        (429, Transient),
        (500, Transient),
        (503, Transient),
        (204, Transient),
        (304, Transient),
    ],
)
async def test_each_status_says_whether_to_come_back(at: At, code: int, error: type[Exception]) -> None:
    async with source() as images:
        with pytest.raises(error) as caught:
            await images.fetch(at(f"/status?code={code}"))
    if code in (429, 503):
        assert isinstance(caught.value, Transient)
        assert caught.value.retry_after == 7


# --- what is not fetched again ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "validators",
    ['ETag="1"', 'ETag=W/"1"', "Last-Modified=Sun, 22 Nov 2026 10:00:00 GMT", 'ETag="1"&Last-Modified=yesterday'],
)
async def test_a_picture_that_is_the_same_is_not_sent_again(at: At, shop: Shop, validators: str) -> None:
    async with source() as images:
        first = await images.fetch_changed(at(f"/tagged?{validators}"), None)
        assert first is not None
        assert first.data == PICTURE
        assert first.seen is not None
        assert first.seen.sha256 == sha256_hex(PICTURE)
        assert await images.fetch_changed(at(f"/tagged?{validators}"), first.seen) is None
        changed = await images.fetch_changed(
            at(f"/tagged?{validators}"), first.seen.model_copy(update={"etag": '"0"', "last_modified": None})
        )
        assert changed == first
    assert not {"If-None-Match", "If-Modified-Since"} & shop.headers[0].keys()


async def test_without_a_validator_there_is_nothing_to_ask_by(at: At) -> None:
    async with source() as images:
        fetched = await images.fetch_changed(at("/picture"), None)
    assert fetched == FetchedPicture(PICTURE, None)


@pytest.mark.parametrize("etag", ["", "é", '"' + "x" * 600 + '"'])
async def test_a_validator_that_is_none_is_not_remembered(at: At, etag: str) -> None:
    async with source() as images:
        fetched = await images.fetch_changed(at(f"/tagged?ETag={etag}"), None)
    assert fetched == FetchedPicture(PICTURE, None)


async def test_what_was_seen_at_one_address_is_not_asked_of_another(at: At, shop: Shop) -> None:
    """A redirect may lead elsewhere by now, and what "1" means there is that host's own affair."""
    async with source() as images:
        first = await images.fetch_changed(at('/redirect?to=/tagged?ETag="1"'), None)
        assert first is not None
        assert first.seen is not None
        assert first.seen.url.endswith("/tagged?ETag=%221%22")
        assert await images.fetch_changed(at('/redirect?to=/tagged?ETag="1"'), first.seen) is None
        assert await images.fetch_changed(at('/redirect?to=/tagged?ETag="1"%26v=2'), first.seen) == FetchedPicture(
            PICTURE, first.seen.model_copy(update={"url": first.seen.url + "&v=2"})
        )
    asked = [path for path, headers in zip(shop.seen, shop.headers, strict=True) if "If-None-Match" in headers]
    assert len(asked) == 1
    assert asked[0].startswith("/tagged")


async def test_not_modified_is_believed_only_where_it_was_asked(at: At) -> None:
    elsewhere = SeenPicture(url="https://elsewhere.example/", sha256="0" * 64, etag='"1"')
    async with source() as images:
        for seen in (None, elsewhere, SeenPicture(url=at("/unmodified"), sha256="0" * 64)):
            with pytest.raises(Transient, match="304"):
                await images.fetch_changed(at("/unmodified"), seen)
        with pytest.raises(Transient, match="304"):
            await images.fetch(at("/unmodified"))
        assert (
            await images.fetch_changed(at("/unmodified"), SeenPicture(url=at("/unmodified"), sha256="0" * 64, etag="1"))
            is None
        )


async def test_the_next_picture_comes_over_the_same_connection(at: At, shop: Shop) -> None:
    async with source() as images:
        for path in ("/picture", '/tagged?ETag="1"', "/picture"):
            await images.fetch(at(path))
        await images.fetch_changed(at("/unmodified"), SeenPicture(url=at("/unmodified"), sha256="0" * 64, etag="1"))
        await images.fetch(at("/picture"))
    assert len(shop.connections) == 1


# --- limits ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/endless", "/boastful", "/bomb"])
async def test_too_many_bytes_are_not_taken(at: At, path: str) -> None:
    async with source() as images:
        with pytest.raises(InvalidPicture) as caught:
            await images.fetch(at(path))
    assert caught.value.reason == "too_many_bytes"


async def test_a_packed_bomb_is_unpacked_no_further_than_the_limit(at: At) -> None:
    tracemalloc.start()
    try:
        async with source() as images:
            with pytest.raises(InvalidPicture):
                await images.fetch(at("/bomb"))
        assert tracemalloc.get_traced_memory()[1] < 10_000_000
    finally:
        tracemalloc.stop()


async def test_an_endless_body_is_cut_off_and_not_read_on(at: At, shop: Shop) -> None:
    async with source() as images:
        with pytest.raises(InvalidPicture):
            await images.fetch(at("/endless"))
    await shop.cut_off.wait()


async def test_a_body_of_exactly_the_limit_passes(at: At) -> None:
    for how in ("/picture", "/packed?how=gzip"):
        async with source(OPEN.model_copy(update={"max_bytes": len(PICTURE)})) as images:
            assert await images.fetch(at("/picture")) == PICTURE
        async with source(OPEN.model_copy(update={"max_bytes": len(PICTURE) - 1})) as images:
            with pytest.raises(InvalidPicture):
                await images.fetch(at(how))


@pytest.mark.parametrize("path", ["/silent", "/dripping", "/loris"])
async def test_who_is_slow_is_left(at: At, path: str) -> None:
    async with source(OPEN.model_copy(update={"fetch_timeout": 0.05})) as images:
        with pytest.raises(Transient, match=r"0\.05 s"):
            await images.fetch(at(path))


async def test_a_broken_connection_and_a_body_cut_short_are_tried_again(at: At) -> None:
    async with source() as images:
        for path in ("/cut", "/packed?how=half"):
            with pytest.raises(Transient):
                await images.fetch(at(path))
        with pytest.raises(Transient):
            await images.fetch("http://127.0.0.1:1/refused")


async def test_what_is_no_http_is_tried_again_and_the_error_has_no_url() -> None:
    async def babble(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"what?\r\n\r\n")
        writer.close()

    async with source() as images, await asyncio.start_server(babble, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        with pytest.raises(Transient) as caught:
            await images.fetch(f"http://127.0.0.1:{port}/a.png?signature=secret")
    assert "secret" not in str(caught.value)


async def test_a_packing_nobody_asked_for_and_we_do_not_know_is_no_picture(at: At) -> None:
    async with source() as images:
        with pytest.raises(InvalidPicture):
            await images.fetch(at("/packed?how=br"))


async def test_downloads_at_once_are_limited_by_host_and_waiting_takes_no_time(at: At, shop: Shop) -> None:
    settings = OPEN.model_copy(update={"fetch_concurrency": 3, "fetch_per_host": 2})
    urls = [at("/counted").replace("127.0.0.1", name) for name in ["one.example"] * 5 + ["two.example"] * 5]
    async with source(settings, lambda _host, _port: ["127.0.0.1"]) as images:
        tasks = [asyncio.create_task(images.fetch(url), name="fetch") for url in urls]
        for _ in range(3):
            await shop.entered.acquire()
        async with source() as outside:  # meanwhile a fourth download would have come in
            for _ in range(3):
                await outside.fetch(at("/picture"))
        shop.hold.set()
        assert await asyncio.gather(*tasks) == [PICTURE] * 10
    assert shop.most_at_once["one.example"] == 2
    assert shop.most_at_once["two.example"] <= 2
    assert shop.most_at_once["all"] == 3


# --- where it goes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "url",
    [
        "",
        "picture.jpg",
        "//host/picture.jpg",
        "http://",
        "http:///picture.jpg",
        "ftp://shop.example/a.jpg",
        "file:///etc/passwd",
        "gopher://shop.example/",
        "data:image/png;base64,AAAA",
        "http://user:secret@shop.example/a.jpg",
        "http://user@shop.example/a.jpg",
        "http://shop.example:0/",
        "http://shop.example:99999/",
        "http://shop.example:http/",
        "http://exa mple.com/",
        "http://-shop.example/",
        "http://a..b/",
        "http://" + "a" * 300 + ".example/",
        "http://shop.example\\@127.0.0.1/",
        "http://shop.example/\r\nHost: evil",
        "http://\ud800/",
        "http://[::1",
    ],
)
async def test_what_is_no_url_of_a_picture_is_refused_without_the_network(url: str) -> None:
    async with source(OPEN, _nobody) as images:
        with pytest.raises(ForbiddenUrl):
            images.check(url)
        with pytest.raises(ForbiddenUrl):
            await images.fetch(url)


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1",
        "127.1",
        "2130706433",
        "0x7f000001",
        "0x7f.1",
        "0177.0.0.1",
        "127.0.0.1.",
        "①②⑦.⓪.⓪.①",
        "0.0.0.0",
        "10.0.0.1",
        "100.64.0.1",
        "169.254.169.254",
        "172.16.0.1",
        "192.168.0.1",
        "192.0.2.1",
        "198.18.0.1",
        "224.0.0.1",
        "240.0.0.1",
        "255.255.255.255",
        "[::]",
        "[::1]",
        "[::ffff:127.0.0.1]",
        "[::ffff:169.254.169.254]",
        "[::ffff:224.0.0.1]",
        "[::127.0.0.1]",
        "[64:ff9b::a9fe:a9fe]",
        "[64:ff9b:1::1]",
        "[2002:7f00:1::]",
        "[2001:0:7f00:1::]",
        "[fe80::1]",
        "[fe80::1%25eth0]",
        "[fc00::1]",
        "[fec0::1]",
        "[ff02::1]",
        "[2001:db8::1]",
        "localhost",
        "LOCALHOST.",
        "shop.localhost",
    ],
)
async def test_hosts_that_are_visibly_not_public_are_refused_without_the_network(host: str) -> None:
    async with source(STRICT, _nobody) as images:
        with pytest.raises(ForbiddenUrl):
            images.check(f"http://{host}/a.jpg")
        with pytest.raises(ForbiddenUrl):
            await images.fetch(f"https://{host}:8443/a.jpg")


async def test_ordinary_urls_pass_the_check() -> None:
    async with source(STRICT, _nobody) as images:
        for url in (
            "https://cdn.shop.example/a/b.jpg?w=800&h=600#top",
            "http://shop.example:8080/ein%20bild.jpg",
            "http://shop.example/ein bild.jpg",
            "HTTPS://SHOP.EXAMPLE./A.JPG",
            "https://bücher.example/ü.jpg",
            "https://my_shop.s3.amazonaws.com/x",
            "http://93.184.215.14/a.jpg",
            "http://[2606:4700::1111]/a.jpg",
        ):
            images.check(url)


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("8.8.8.8", True),
        ("::ffff:8.8.8.8", True),
        ("64:ff9b::808:808", True),
        ("2606:4700::1111", True),
        ("fe80::1%eth0", False),
        ("192.88.99.1", False),
        ("3fff::1", False),
    ],
)
def test_global_is_what_the_public_internet_routes(address: str, expected: bool) -> None:
    assert is_global(address) is expected


def _nobody(host: str, port: int) -> Sequence[str]:
    raise AssertionError(f"{host} was looked up")


class HostileResolver:
    """Answers each look-up with the next of its answers."""

    def __init__(self, *answers: Sequence[str]) -> None:
        self.answers = list(answers)
        self.asked: list[str] = []

    def __call__(self, host: str, port: int) -> Sequence[str]:
        del port
        self.asked.append(host)
        return self.answers.pop(0)


@pytest.mark.parametrize(
    "addresses",
    [
        ["127.0.0.1"],
        ["93.184.215.14", "10.0.0.1"],
        ["::ffff:127.0.0.1"],
        ["2606:4700::1111", "::1"],
        ["64:ff9b::7f00:1"],
    ],
)
async def test_a_name_with_one_address_that_is_not_public_is_refused(
    at: At, shop: Shop, addresses: Sequence[str]
) -> None:
    async with source(STRICT, HostileResolver(addresses)) as images:
        with pytest.raises(ForbiddenUrl, match=r"rebind\.example"):
            await images.fetch(at("/picture").replace("127.0.0.1", "rebind.example"))
    assert shop.seen == []


async def test_the_connection_goes_to_the_address_that_was_checked(at: At, shop: Shop) -> None:
    # The first answer is the one that is used: a second look-up would lead elsewhere, and is never made.
    lookup = HostileResolver(["127.0.0.1"], ["127.0.0.99"])
    async with source(OPEN, lookup) as images:
        assert await images.fetch(at("/picture").replace("127.0.0.1", "shop.example")) == PICTURE
    assert lookup.asked == ["shop.example"]
    assert shop.headers[0]["Host"].startswith("shop.example:")


async def test_a_name_without_an_address_may_have_one_later() -> None:
    def unknown(host: str, port: int) -> Sequence[str]:
        raise OSError("no such name")

    for lookup in (unknown, HostileResolver([])):
        async with source(STRICT, lookup) as images:
            with pytest.raises(Transient):
                await images.fetch("http://nosuch.example/a.jpg")


@pytest.mark.parametrize(
    "target",
    [
        "http://169.254.169.254/latest/meta-data",
        "http://[::ffff:169.254.169.254]/",
        "http://2852039166/",
        "file:///etc/passwd",
        "http://user:secret@shop.example/",
        "http://elsewhere.example/",
        "http://[",
        "",
    ],
)
async def test_every_redirect_is_checked_again(at: At, shop: Shop, target: str) -> None:
    # The shop is let in by name on the loopback; what it points to is held to the rules of its list of hosts.
    settings = OPEN.model_copy(update={"allowed_hosts": ("shop.example",)})
    async with source(settings, HostileResolver(["127.0.0.1"])) as images:
        with pytest.raises((ForbiddenUrl, NotFound) if target == "" else ForbiddenUrl):
            await images.fetch(at(f"/redirect?to={target}").replace("127.0.0.1", "shop.example"))
    assert {path.split("?")[0] for path in shop.seen} == {"/redirect"}


async def test_a_redirect_to_a_private_address_is_refused_where_private_networks_are(
    at: At, shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Only here the shop's own loopback address counts as public, so that the strict rules let the first request out.
    monkeypatch.setattr(
        "catalens.engines.images.is_global", lambda address: address == "127.0.0.1" or is_global(address)
    )
    private = "http://169.254.169.254/latest/meta-data"
    async with source(STRICT, HostileResolver(["127.0.0.1"], ["10.0.0.1"])) as images:
        shop_url = at("/redirect?to={}").replace("127.0.0.1", "shop.example")
        with pytest.raises(ForbiddenUrl, match=r"169\.254\.169\.254"):
            await images.fetch(shop_url.format(private))
        with pytest.raises(ForbiddenUrl, match=r"rebound\.example"):
            await images.fetch(shop_url.format("http://rebound.example/"))
    assert len(shop.seen) == 2


async def test_only_listed_hosts_are_asked_when_there_is_a_list(at: At) -> None:
    settings = OPEN.model_copy(update={"allowed_hosts": ("127.0.0.1", ".Example.com", "one.example.org")})
    async with source(settings) as images:
        assert await images.fetch(at("/picture")) == PICTURE
        for allowed in ("http://example.com/", "http://a.b.EXAMPLE.com./", "http://one.example.org/"):
            images.check(allowed)
        for other in (
            "http://badexample.com/",
            "http://two.example.org/",
            "http://x.one.example.org/",
            "http://10.0.0.1/",
        ):
            with pytest.raises(ForbiddenUrl, match="ALLOWED_HOSTS"):
                images.check(other)


async def test_no_proxy_of_the_environment_is_used(at: At, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    async with source() as images:
        assert await images.fetch(at("/picture")) == PICTURE
