"""Fetches pictures over HTTP as a hostile world requires: where a URL leads is checked at every step."""

from __future__ import annotations

import asyncio
import ipaddress
import re
import socket
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final
from weakref import WeakValueDictionary

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from pydantic import ValidationError
from yarl import URL

from catalens.domain import SeenPicture, sha256_hex
from catalens.errors import ForbiddenUrl, InvalidPicture, NotFound, Transient
from catalens.ports import FetchedPicture
from catalens.settings import PictureSettings

Lookup = Callable[[str, int], Sequence[str]]
"""Blocking: host and port → every address the name has. Raises OSError."""

_MAX_REDIRECTS: Final = 5
_REDIRECTS: Final = frozenset((301, 302, 303, 307, 308))
_LATER: Final = frozenset((408, 425, 429))
_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f]")
_NAME: Final = re.compile(r"(?=.{1,253}$)[a-z0-9_]([a-z0-9_-]{0,62})(\.[a-z0-9_]([a-z0-9_-]{0,62}))*", re.IGNORECASE)
# A name whose last label is a number is an address in some old spelling (2130706433, 0x7f.1, 0177.0.0.1).
_OLD_ADDRESS: Final = re.compile(r"(.*\.)?(0x[0-9a-f]*|[0-9]+)", re.IGNORECASE)
_NAT64: Final = ipaddress.IPv6Network("64:ff9b::/96")
_GLOBAL_V6: Final = ipaddress.IPv6Network("2000::/3")
# Global to Python's tables, but tunnels to anywhere (6to4) or documentation.
_NOT_GLOBAL: Final = (
    ipaddress.ip_network("192.88.99.0/24"),
    ipaddress.ip_network("2002::/16"),
    ipaddress.ip_network("3fff::/20"),
)


def is_global(address: str) -> bool:
    """Return whether `address` lies on the public Internet, whatever it is wrapped in (IPv4-mapped, NAT64)."""
    ip = ipaddress.ip_address(address)
    if isinstance(ip, ipaddress.IPv6Address):
        if ip.ipv4_mapped is not None:
            ip = ip.ipv4_mapped
        elif ip in _NAT64:
            ip = ipaddress.IPv4Address(int(ip) & 0xFFFF_FFFF)
        elif ip not in _GLOBAL_V6:
            return False
    return ip.is_global and not ip.is_multicast and not any(ip in network for network in _NOT_GLOBAL)


def system_lookup(host: str, port: int) -> Sequence[str]:
    """Ask the system's resolver."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_ADDRCONFIG)
    return [str(address[0]) for *_, address in found]


class _CheckedResolver(AbstractResolver):
    """Gives aiohttp only addresses that were checked; it connects to these and asks nobody again."""

    def __init__(self, lookup: Lookup, allow_private: bool, threads: ThreadPoolExecutor) -> None:
        self._lookup = lookup
        self._allow_private = allow_private
        self._threads = threads

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        """Return every address of `host`. Raises ForbiddenUrl if a single one is not global, OSError if none."""
        del family  # both are taken
        loop = asyncio.get_running_loop()
        addresses = await loop.run_in_executor(self._threads, self._lookup, host, port)
        if not addresses:
            raise OSError(f"{host} has no address")
        if not self._allow_private and not all(is_global(address) for address in addresses):
            raise ForbiddenUrl(f"{host} has an address that is not on the public Internet")
        return [
            ResolveResult(
                hostname=host,
                host=address,
                port=port,
                family=socket.AF_INET6 if ":" in address else socket.AF_INET,
                proto=0,
                flags=socket.AI_NUMERICHOST,
            )
            for address in addresses
        ]

    async def close(self) -> None:
        """Hold nothing."""


class HttpImages:
    """ImageSource over HTTP(S). Make it on the event loop that uses it."""

    def __init__(self, settings: PictureSettings, lookup: Lookup = system_lookup) -> None:
        self._settings = settings
        # Threads of its own: a name server that hangs must not take the threads that the rest of the process needs.
        self._threads = ThreadPoolExecutor(settings.fetch_per_host, thread_name_prefix="lookup")
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(
                limit=0,  # `fetch` counts, so that waiting for a turn takes nothing from the time to deliver
                resolver=_CheckedResolver(lookup, settings.allow_private_networks, self._threads),
                use_dns_cache=False,
            ),
            headers={"User-Agent": "catalens", "Accept": "image/*", "Accept-Encoding": "identity"},
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,  # a bomb is inflated under our own limit
            timeout=aiohttp.ClientTimeout(total=None),  # one deadline over all redirects instead
        )
        self._slots = asyncio.Semaphore(settings.fetch_concurrency)
        self._host_slots: WeakValueDictionary[str, asyncio.Semaphore] = WeakValueDictionary()

    def check(self, url: str) -> None:
        """Raise ForbiddenUrl if the URL is malformed or visibly forbidden, without any network access."""
        try:
            parsed = URL(url)
        except ValueError as error:  # UnicodeError is one
            raise ForbiddenUrl(f"not a URL: {error}") from error
        if _CONTROL.search(url):
            raise ForbiddenUrl("a URL has no control characters")
        self._check(parsed)

    def _check(self, url: URL) -> None:
        if url.scheme not in ("http", "https"):
            raise ForbiddenUrl("only http and https URLs are fetched")
        if url.raw_user is not None or url.raw_password is not None:
            raise ForbiddenUrl("a picture's URL must not carry a user name or password")
        if not url.port:
            raise ForbiddenUrl("a URL's port is between 1 and 65535")
        host = url.raw_host or ""
        address = _literal(host)
        if address is None and not _NAME.fullmatch(host.removesuffix(".")):
            raise ForbiddenUrl("the URL has no valid host name")
        if not self._is_allowed(host.removesuffix(".").lower()):
            raise ForbiddenUrl(f"{host} is not among the hosts of CATALENS_PICTURES__ALLOWED_HOSTS")
        if self._settings.allow_private_networks:
            return
        if host.removesuffix(".").lower().split(".")[-1] == "localhost" or (address and not is_global(address)):
            raise ForbiddenUrl(f"{host} is not on the public Internet")

    def _is_allowed(self, host: str) -> bool:
        allowed = [name.lower() for name in self._settings.allowed_hosts]
        if not allowed:
            return True
        return any(host == name.removeprefix(".") or (name.startswith(".") and host.endswith(name)) for name in allowed)

    async def fetch(self, url: str) -> bytes:
        """Return the bytes; the port says what it raises. Waiting for a free slot does not count as time."""
        fetched = await self.fetch_changed(url, None)
        if fetched is None:
            raise TypeError("a picture that nobody has seen cannot be unchanged")
        return fetched.data

    async def fetch_changed(self, url: str, seen: SeenPicture | None) -> FetchedPicture | None:
        """Return the picture, or None if it is still the one that was `seen`; otherwise as fetch."""
        self.check(url)
        target = URL(url)
        host = target.raw_host or ""
        host_slots = self._host_slots.get(host)
        if host_slots is None:
            host_slots = self._host_slots[host] = asyncio.Semaphore(self._settings.fetch_per_host)
        async with host_slots, self._slots:
            try:
                async with asyncio.timeout(self._settings.fetch_timeout):
                    return await self._follow(target, seen)
            except TimeoutError as error:
                raise Transient(f"{host} did not deliver within {self._settings.fetch_timeout:g} s") from error
            except aiohttp.ClientResponseError as error:  # its text has the URL, in which there may be a signature
                raise Transient(f"{host} does not speak HTTP as it should") from error
            except (aiohttp.ClientError, OSError) as error:
                raise Transient(f"{host} could not be reached: {error}") from error

    async def _follow(self, url: URL, seen: SeenPicture | None) -> FetchedPicture | None:
        for _ in range(_MAX_REDIRECTS + 1):
            conditions = _conditions(seen) if seen is not None and str(url) == seen.url else {}
            async with self._session.get(url, headers=conditions, allow_redirects=False) as response:
                if response.status == 304 and conditions:  # unasked it is no answer
                    return None
                if response.status not in _REDIRECTS:
                    _expect_picture(response)
                    data = await self._read(response)
                    return FetchedPicture(data, _seen(url, data, response))
                location = response.headers.get("Location", "")
            try:
                url = url.join(URL(location))
            except ValueError as error:
                raise ForbiddenUrl(f"{url.host} redirects to what is no URL") from error
            self._check(url)
        raise ForbiddenUrl(f"more than {_MAX_REDIRECTS} redirects")

    async def _read(self, response: aiohttp.ClientResponse) -> bytes:
        limit = self._settings.max_bytes
        if (response.content_length or 0) > limit:
            raise _too_many_bytes(limit)
        inflate = _inflater(response)
        received, body = 0, bytearray()
        async for chunk in response.content.iter_any():
            received += len(chunk)
            try:
                body += chunk if inflate is None else inflate.decompress(chunk, limit + 1 - len(body))
            except zlib.error as error:
                raise InvalidPicture("not_a_picture", "the body is not compressed as its header says") from error
            if max(received, len(body)) > limit:
                raise _too_many_bytes(limit)
        if inflate is not None and not inflate.eof:
            raise Transient("the compressed body ended early")
        return bytes(body)

    async def close(self) -> None:
        """Break off what is being fetched and release the connections."""
        await self._session.close()
        self._threads.shutdown(wait=False, cancel_futures=True)


def _literal(host: str) -> str | None:
    """Return `host` if it is an address as connections take it, None if it is a name. Raises ForbiddenUrl."""
    try:
        return str(ipaddress.ip_address(host))
    except ValueError as error:
        if ":" in host or _OLD_ADDRESS.fullmatch(host.removesuffix(".")):
            raise ForbiddenUrl("the URL's host is an address in an unusual spelling") from error
        return None


def _conditions(seen: SeenPicture) -> dict[str, str]:
    """Return the headers that ask for the picture only if it is another one now; empty if that cannot be asked."""
    headers = {"If-None-Match": seen.etag, "If-Modified-Since": seen.last_modified}
    return {name: value for name, value in headers.items() if value is not None}


def _seen(url: URL, data: bytes, response: aiohttp.ClientResponse) -> SeenPicture | None:
    """Return what to remember of a picture; None if its host gave nothing to ask by, or nothing that is well formed."""
    etag, last_modified = (response.headers.get(name) for name in ("ETag", "Last-Modified"))
    if etag is None and last_modified is None:
        return None
    try:
        return SeenPicture(url=str(url), sha256=sha256_hex(data), etag=etag, last_modified=last_modified)
    except ValidationError:  # of a hostile host: nothing worth a word
        return None


def _expect_picture(response: aiohttp.ClientResponse) -> None:
    status, host = response.status, response.url.host
    if status == 200:
        return
    if status in _LATER or status >= 500:
        seconds = response.headers.get("Retry-After", "")
        known = seconds.isascii() and seconds.isdigit()
        raise Transient(f"{host} answered {status}", retry_after=min(float(seconds), 3600.0) if known else 1.0)
    if status >= 400:  # gone, or forbidden like 401 and 403: asking again gives the same
        raise NotFound(f"{host} answered {status}")
    raise Transient(f"{host} answered {status} and no picture")


def _inflater(response: aiohttp.ClientResponse) -> zlib._Decompress | None:
    """Return what undoes the body's compression, which we did not ask for; None if it has none."""
    encoding = response.headers.get("Content-Encoding", "identity").strip().lower()
    if encoding in ("", "identity"):
        return None
    if encoding in ("gzip", "x-gzip", "deflate"):
        return zlib.decompressobj(wbits=zlib.MAX_WBITS | 32)  # gzip and zlib by their first bytes
    raise InvalidPicture(
        "not_a_picture", f"{response.url.host} sends the picture as {encoding}, which was not asked for"
    )


def _too_many_bytes(limit: int) -> InvalidPicture:
    return InvalidPicture("too_many_bytes", f"the picture has more than the {limit} bytes allowed")
