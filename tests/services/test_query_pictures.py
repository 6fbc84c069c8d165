"""Uploaded pictures and texts: search by picture, embeddings and similarity, with every bad picture there is."""

from __future__ import annotations

import io
import json
from base64 import b64encode
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import numpy as np
import pytest
import pytest_asyncio
from PIL import Image
from tests.pictures import animated_gif, encode, jpeg, png_bomb, rotated_jpeg, scene
from tests.shop import Answer, Shop, open_shop, picture

from catalens.domain import Product, sha256_hex

pytestmark = pytest.mark.asyncio(loop_scope="module")

RED, BLUE = picture(220, 10, 10), picture(10, 10, 220)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shop(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Shop]:
    """A shop with a red and a blue product."""
    async with open_shop(tmp_path_factory.mktemp("shop") / "data") as opened:
        await opened.put(Product(product_id="red", name="Wine", brand="Acme"), RED)
        await opened.put(Product(product_id="blue", name="Water", brand="Other"), BLUE)
        yield opened


PHOTO = jpeg()
GOOD = {
    "one pixel": encode(scene(1, 1), "PNG"),
    "animated gif": animated_gif((220, 30, 30), (30, 60, 220)),
    "cmyk jpeg": encode(scene().convert("CMYK"), "JPEG"),
    "16-bit png": encode(Image.fromarray(np.full((40, 50), 40_000, np.uint16)), "PNG"),
    "rotated photo": rotated_jpeg(scene(40, 60), 6),
    "transparent webp": encode(scene().convert("RGBA"), "WEBP"),
    "palette png": encode(scene().convert("P"), "PNG"),
}
BAD = {
    "empty": (b"", 415),
    "text": (b"this is no picture", 415),
    "truncated jpeg": (PHOTO[: len(PHOTO) // 2], 415),
    "only a header": (b"\xff\xd8\xff\xe0", 415),
    "html": (b"<html><img src=x></html>", 415),
    "svg": (b'<svg xmlns="http://www.w3.org/2000/svg"/>', 415),
    "png bomb": (png_bomb(20_000, 20_000), 413),
    "too many bytes": (RED + bytes(500_001), 413),
}


def form(content: bytes, part: str = "file", name: str = "photo.jpg", **fields: str) -> aiohttp.FormData:
    body = aiohttp.FormData()
    for key, text in fields.items():
        body.add_field(key, text)
    body.add_field(part, io.BytesIO(content), filename=name, content_type="image/jpeg")
    return body


async def search(shop: Shop, content: bytes, paging: str = "", part: str = "file", **fields: str) -> Answer:
    return await shop.call("POST", f"/api/v1/search-image{paging}", data=form(content, part, **fields))


def found(answer: Answer) -> list[str]:
    assert answer.status == 200, answer.body
    return [result["product_id"] for result in answer.json["results"]]


# --- search by picture --------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["file", "image", "image_file"])
async def test_an_uploaded_picture_finds_its_product(shop: Shop, part: str) -> None:
    answer = await search(shop, BLUE, part=part)
    assert found(answer) == ["blue", "red"]
    assert answer.json.keys() == {
        *("results", "count", "total", "model", "mode", "took_ms"),
        *("query_image", "embedding_dimension"),
    }
    assert answer.json["query_image"] == {"width": 48, "height": 48, "format": "png", "sha256": sha256_hex(BLUE)}
    assert answer.json["embedding_dimension"] == shop.encoder.spec.dimension
    assert answer.json["count"] == 2


async def test_it_is_the_search_by_picture_of_the_json_call(shop: Shop) -> None:
    body: dict[str, Any] = {"image": {"data": b64encode(BLUE).decode()}, "query": "wine", "image_weight": 0.3}
    other = await shop.search(**body)
    answer = await search(shop, BLUE, text="wine", image_weight="0.3")
    assert answer.json["results"] == other["results"]
    assert answer.json["mode"] == "hybrid"


async def test_text_weight_filters_and_limit_are_heeded(shop: Shop) -> None:
    assert found(await search(shop, BLUE, text="wine", image_weight="0"))[0] == "red"
    assert found(await search(shop, BLUE, text="wine", image_weight="1"))[0] == "blue"
    assert found(await search(shop, BLUE, filters=json.dumps({"brand": "Acme"}))) == ["red"]
    assert found(await search(shop, BLUE, "?limit=1")) == ["blue"]
    assert found(await search(shop, BLUE, "?limit=1&offset=1")) == ["red"]


@pytest.mark.parametrize(
    ("field", "fields"),
    [
        ("image_weight", {"image_weight": "2"}),
        ("image_weight", {"image_weight": "half"}),
        ("image_weight", {"image_weight": "true"}),
        ("text", {"text": ""}),
        ("filters", {"filters": "{"}),
        ("filters", {"filters": "[]"}),
        ("filters", {"filters": "[" * 50_000}),
        ("filters.colour", {"filters": '{"colour": "red"}'}),
        ("filters", {"filters": '{"price": {"gte": NaN}}'}),
        ("query", {"query": "wine"}),
    ],
)
async def test_a_wrong_form_field_is_named(shop: Shop, field: str, fields: dict[str, str]) -> None:
    answer = await search(shop, BLUE, **fields)
    assert answer.status == 422, answer.body
    assert answer.json["errors"][0]["field"] == field


@pytest.mark.parametrize("path", ["search-image", "embed-image"])
async def test_exactly_one_picture_is_expected(shop: Shop, path: str) -> None:
    none = aiohttp.FormData(default_to_multipart=True)
    none.add_field("text", "wine")
    two = form(RED)
    two.add_field("image", BLUE, filename="b.png", content_type="image/png")
    other = form(RED, part="photo")
    for body in (two, other, none):
        answer = await shop.call("POST", f"/api/v1/{path}", data=body)
        assert answer.status == 422, answer.body
    as_json = await shop.call("POST", f"/api/v1/{path}", json={"image": "x"})
    assert as_json.status == 415


@pytest.mark.parametrize("path", ["search-image", "embed-image"])
@pytest.mark.parametrize("kind", GOOD)
async def test_unusual_pictures_are_understood(shop: Shop, path: str, kind: str) -> None:
    answer = await shop.call("POST", f"/api/v1/{path}", data=form(GOOD[kind]))
    assert answer.status == 200, answer.body
    if path == "search-image" and kind == "rotated photo":
        assert (answer.json["query_image"]["width"], answer.json["query_image"]["height"]) == (60, 40)


@pytest.mark.parametrize("path", ["search-image", "embed-image", "similarity"])
@pytest.mark.parametrize("kind", BAD)
async def test_bad_pictures_are_refused_and_the_service_goes_on(shop: Shop, path: str, kind: str) -> None:
    content, status = BAD[kind]
    body = form(content, part="image1" if path == "similarity" else "file")
    if path == "similarity":
        body.add_field("image2", RED, filename="b.png", content_type="image/png")
    answer = await shop.call("POST", f"/api/v1/{path}", data=body)
    assert answer.status == status, answer.body
    assert answer.headers["Content-Type"].startswith("application/problem+json")
    assert found(await search(shop, RED))[0] == "red"


async def test_a_body_of_forty_megabytes_is_413(shop: Shop) -> None:
    answer = await search(shop, bytes(40 * 1024 * 1024))
    assert answer.status == 413


async def test_a_search_by_picture_without_an_encoder_is_503(shop: Shop) -> None:
    for body in (form(RED), form(RED, text="wine")):
        answer = await shop.call("POST", "/api/v1/search-image", data=body, wordless=True)
        assert answer.status == 503
        assert "Retry-After" in answer.headers


# --- embeddings ---------------------------------------------------------------------------------------------


async def test_embeddings_are_normalised_and_the_encoders_own(shop: Shop) -> None:
    text = (await shop.call("POST", "/api/v1/embed", json={"text": "red wine"})).json
    image = (await shop.call("POST", "/api/v1/embed-image", data=form(RED))).json
    for answer, expected in (
        (text, await shop.encoder.embed_text("red wine")),
        (image, (await shop.encoder.embed_image(RED)).embedding),
    ):
        assert answer.keys() == {"embedding", "dimension", "model"}
        assert answer["dimension"] == len(answer["embedding"]) == shop.encoder.spec.dimension
        assert answer["model"] == shop.encoder.spec.id
        assert np.linalg.norm(answer["embedding"]) == pytest.approx(1.0, abs=1e-5)
        assert answer["embedding"] == pytest.approx(expected.tolist(), abs=1e-5)


async def test_a_batch_of_texts_answers_each_on_its_own(shop: Shop) -> None:
    requests = [{"text": "red"}, {"text": ""}, {"text": "blue"}, {"words": "red"}]
    answer = await shop.call("POST", "/api/v1/embed/batch", json={"requests": requests})
    first, empty, third, unknown = answer.json["responses"]
    assert first == (await shop.call("POST", "/api/v1/embed", json={"text": "red"})).json
    assert third["embedding"] != first["embedding"]
    assert (empty["status"], unknown["status"]) == (422, 422)
    too_many = await shop.call("POST", "/api/v1/embed/batch", json={"requests": requests * 2})
    assert too_many.status == 422


@pytest.mark.parametrize("body", [{}, {"text": ""}, {"text": "  "}, {"text": 5}, {"text": "a", "image": "b"}, [], "a"])
async def test_a_text_that_is_none_is_refused(shop: Shop, body: Any) -> None:
    assert (await shop.call("POST", "/api/v1/embed", json=body)).status == 422


async def test_the_same_content_is_computed_once(shop: Shop) -> None:
    async def misses() -> int:
        return int((await shop.call("GET", "/api/v1/stats")).json["cache"]["misses"])

    fresh = picture(1, 2, 3)
    await search(shop, fresh)
    before = await misses()
    await search(shop, fresh)
    await shop.search(image={"data": b64encode(fresh).decode()})
    assert await misses() == before


async def test_without_an_encoder_there_are_no_embeddings(shop: Shop) -> None:
    assert (await shop.call("POST", "/api/v1/embed", json={"text": "a"}, wordless=True)).status == 503
    assert (await shop.call("POST", "/api/v1/embed-image", data=form(RED), wordless=True)).status == 503


# --- similarity ---------------------------------------------------------------------------------------------


async def similarity(shop: Shop, **body: Any) -> float:
    answer = await shop.call("POST", "/api/v1/similarity", json=body)
    assert answer.status == 200, answer.body
    return float(answer.json["similarity"])


async def test_similarity_is_the_cosine(shop: Shop) -> None:
    red = {"image": {"data": b64encode(RED).decode()}}
    assert await similarity(shop, a={"text": "red"}, b={"text": "red"}) == pytest.approx(1.0, abs=1e-5)
    assert await similarity(shop, a=red, b=red) == pytest.approx(1.0, abs=1e-5)
    crossed = await similarity(shop, a={"text": "blue"}, b=red)
    expected = await shop.encoder.embed_text("blue") @ (await shop.encoder.embed_image(RED)).embedding
    assert crossed == pytest.approx(float(expected), abs=1e-5)
    assert await similarity(shop, a=red, b={"text": "blue"}) == pytest.approx(crossed, abs=1e-6)


async def test_two_uploads_are_compared(shop: Shop) -> None:
    body = form(RED, part="image1")
    body.add_field("image2", BLUE, filename="b.png", content_type="image/png")
    answer = await shop.call("POST", "/api/v1/similarity", data=body)
    inline = [{"image": {"data": b64encode(content).decode()}} for content in (RED, BLUE)]
    assert answer.json["similarity"] == pytest.approx(await similarity(shop, a=inline[0], b=inline[1]), abs=1e-6)
    assert (await shop.call("POST", "/api/v1/similarity", data=form(RED, part="image1"))).status == 422
    assert (await shop.call("POST", "/api/v1/similarity", data=form(RED))).status == 422


@pytest.mark.parametrize(
    ("field", "body"),
    [
        ("b", {"a": {"text": "x"}}),
        ("a", {"a": {}, "b": {"text": "x"}}),
        ("a", {"a": {"text": "x", "image": {"url": "http://e.org/"}}, "b": {"text": "x"}}),
        ("b.image.data", {"a": {"text": "x"}, "b": {"image": {"data": "?"}}}),
        ("a.image.url", {"a": {"image": {"url": "file:///etc/passwd"}}, "b": {"text": "x"}}),
        ("c", {"a": {"text": "x"}, "b": {"text": "x"}, "c": 1}),
    ],
)
async def test_a_comparison_without_sense_is_refused(shop: Shop, field: str, body: dict[str, Any]) -> None:
    answer = await shop.call("POST", "/api/v1/similarity", json=body)
    assert answer.status == 422, answer.body
    assert answer.json["errors"][0]["field"] == field
