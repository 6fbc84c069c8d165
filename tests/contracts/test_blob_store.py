"""What every BlobStore promises."""

from __future__ import annotations

import asyncio
import hashlib

import pytest

from catalens.errors import NotFound
from catalens.ports import BlobStore

FAR_FUTURE = 4_000_000_000.0
UNKNOWN = hashlib.sha256(b"never stored").hexdigest()


async def stored_before(store: BlobStore, older_than: float) -> set[str]:
    return {reference async for reference in store.references(older_than=older_than)}


@pytest.mark.parametrize("data", [b"\xff\xd8\xff picture", b"", b"\x00" * 3_000_000])
async def test_what_was_put_comes_back_under_its_sha256(blob_store: BlobStore, data: bytes) -> None:
    reference = await blob_store.put(data)
    assert reference == hashlib.sha256(data).hexdigest()
    assert await blob_store.get(reference) == data


async def test_storing_twice_is_storing_once(blob_store: BlobStore) -> None:
    first, second = await asyncio.gather(blob_store.put(b"same"), blob_store.put(b"same"))
    assert first == second == await blob_store.put(b"same")
    assert [reference async for reference in blob_store.references(older_than=FAR_FUTURE)] == [first]


@pytest.mark.parametrize("reference", [UNKNOWN, "", "../secret", "00\0", "a" * 63, "a" * 5000, UNKNOWN.upper()])
async def test_what_is_not_there_is_not_found(blob_store: BlobStore, reference: str) -> None:
    with pytest.raises(NotFound):
        await blob_store.get(reference)
    await blob_store.delete(reference)


async def test_deleted_is_gone_and_can_be_stored_again(blob_store: BlobStore) -> None:
    reference, other = await blob_store.put(b"one"), await blob_store.put(b"two")
    await blob_store.delete(reference)
    with pytest.raises(NotFound):
        await blob_store.get(reference)
    assert await stored_before(blob_store, FAR_FUTURE) == {other}
    assert await blob_store.put(b"one") == reference
    assert await blob_store.get(reference) == b"one"


async def test_references_are_those_not_stored_since(blob_store: BlobStore) -> None:
    expected = {await blob_store.put(bytes([number])) for number in range(40)}
    assert await stored_before(blob_store, FAR_FUTURE) == expected
    assert await stored_before(blob_store, 1_000_000_000.0) == set()


async def test_a_conditional_delete_spares_what_was_stored_again(blob_store: BlobStore) -> None:
    reference = await blob_store.put(b"kept")
    await blob_store.delete(reference, older_than=1_000_000_000.0)
    assert await blob_store.get(reference) == b"kept"
    await blob_store.delete(reference, older_than=FAR_FUTURE)
    with pytest.raises(NotFound):
        await blob_store.get(reference)
