"""What ObjectBlobStore promises beyond its port: a bucket that is shared, ill, damaged or not ours."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator

import pytest
from tests.s3_server import Bucket, s3_bucket

from catalens.domain import sha256_hex
from catalens.engines.objects import ObjectBlobStore
from catalens.errors import Misconfigured, NotFound, Transient
from catalens.settings import BlobSettings

HERE = BlobSettings(url="s3://pictures/shop/")
OLD = 1_000_000_000.0
FAR_FUTURE = 4_000_000_000.0


@pytest.fixture
async def bucket(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Bucket]:
    async with s3_bucket(monkeypatch) as bucket:
        yield bucket


def key(reference: str) -> str:
    return f"shop/{reference[:2]}/{reference}"


async def references(store: ObjectBlobStore, older_than: float) -> list[str]:
    return [reference async for reference in store.references(older_than=older_than)]


async def test_a_picture_lies_under_its_prefix_and_its_sha256(bucket: Bucket) -> None:
    store = await ObjectBlobStore.open(HERE)
    reference = await store.put(b"picture")
    assert bucket.objects == {key(reference): b"picture"}
    assert await (await ObjectBlobStore.open(BlobSettings(url="s3://pictures/shop"))).get(reference) == b"picture"
    with pytest.raises(NotFound):
        await (await ObjectBlobStore.open(BlobSettings(url="s3://pictures/other"))).get(reference)


async def test_putting_a_known_blob_makes_it_young_again(bucket: Bucket) -> None:
    store = await ObjectBlobStore.open(HERE)
    reference = await store.put(b"picture")
    bucket.stored[key(reference)] = OLD
    assert await references(store, OLD + 1) == [reference]
    before = time.time()
    await store.put(b"picture")
    assert bucket.stored[key(reference)] >= before
    assert await references(store, OLD + 1) == []
    await store.delete(reference, older_than=OLD + 1)
    assert await store.get(reference) == b"picture"


async def test_a_known_blob_that_was_damaged_is_mended_by_putting_it_again(bucket: Bucket) -> None:
    store = await ObjectBlobStore.open(HERE)
    reference = await store.put(b"picture")
    bucket.objects[key(reference)] = b"pict"
    with pytest.raises(NotFound, match="damaged"):
        await store.get(reference)
    await store.put(b"picture")
    assert await store.get(reference) == b"picture"


async def test_what_others_keep_in_the_bucket_is_no_blob(bucket: Bucket) -> None:
    store = await ObjectBlobStore.open(HERE)
    reference = await store.put(b"picture")
    stranger = sha256_hex(b"stranger")
    for other in ("shop/readme.txt", f"shop/zz/{stranger}", f"shop/{stranger}", f"shopping/{key(stranger)[5:]}", "x"):
        bucket.objects[other], bucket.stored[other] = b"", OLD
    assert await references(store, FAR_FUTURE) == [reference]


@pytest.mark.parametrize("status", [500, 503, 429, 403, 401])
async def test_a_store_that_is_ill_may_be_asked_again(bucket: Bucket, status: int) -> None:
    store = await ObjectBlobStore.open(HERE)
    reference = await store.put(b"picture")
    bucket.fails_with = status
    for call in (
        store.put(b"picture"),
        store.get(reference),
        references(store, FAR_FUTURE),
        store.delete(reference),
        store.delete(reference, older_than=FAR_FUTURE),
    ):
        with pytest.raises(Transient, match="object store"):
            await call
    bucket.fails_with = 0
    assert await store.get(reference) == b"picture"


async def test_a_store_that_is_away_is_said_at_the_start(monkeypatch: pytest.MonkeyPatch, bucket: Bucket) -> None:
    monkeypatch.setenv("AWS_ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(Transient):
        await ObjectBlobStore.open(HERE)
    bucket.fails_with = 503
    with pytest.raises(Transient):
        await ObjectBlobStore.open(HERE)


async def test_credentials_that_are_refused_are_said_at_the_start(
    monkeypatch: pytest.MonkeyPatch, bucket: Bucket
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "somebody-else")
    with pytest.raises(Misconfigured, match="CATALENS_BLOBS__URL") as caught:
        await ObjectBlobStore.open(HERE)
    assert "the-secret" not in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "url", ["s3://no-such-bucket/x", "s3://", "ftp://host/x", "pictures", "https://host/x", "az://c/x"]
)
async def test_what_is_no_bucket_is_said_at_the_start(
    monkeypatch: pytest.MonkeyPatch, bucket: Bucket, url: str
) -> None:
    monkeypatch.delenv("AZURE_STORAGE_ACCOUNT_NAME", raising=False)
    with pytest.raises(Misconfigured, match="CATALENS_BLOBS__URL"):
        await ObjectBlobStore.open(BlobSettings(url=url))
