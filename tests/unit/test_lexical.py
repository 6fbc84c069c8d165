"""Which spellings meet, what weighs how much, and what holds for any text."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from catalens.domain import DEFAULT_LANGUAGES, Language, Product
from catalens.lexical import (
    document_vector,
    query_vector,
    runs,
    text_for_embedding,
    vector_of_any,
    words_of,
    written,
)

FOUR: tuple[Language, ...] = ("en", "fr", "de", "es")
TEXT = st.text(st.characters(codec="utf-8"), max_size=60)


def product(name: str = "thing", product_id: str = "some-id", **fields: object) -> Product:
    return Product.model_validate({"product_id": product_id, "name": name, **fields})


def score(document: Product, query: str, languages: tuple[Language, ...] = DEFAULT_LANGUAGES) -> float:
    """Return the BM25 score with every idf 1."""
    weights = document_vector(document, languages)
    stored = dict(zip(weights.indices, weights.values, strict=True))
    asked = query_vector(query, languages)
    return sum(stored.get(term, 0.0) * value for term, value in zip(asked.indices, asked.values, strict=True))


@pytest.mark.parametrize(
    ("name", "query"),
    [
        ("T-shirt", "tshirt"),
        ("T-shirt", "t shirt"),
        ("T-Shirt", "T-SHIRT"),
        ("tshirt", "t-shirt"),
        ("tshirt", "t shirt"),
        ("t shirt", "tshirt"),
        ("wi-fi", "wifi"),
        ("robes", "robe"),
        ("robe", "robes"),
        ("dresses", "dress"),
        ("running", "run"),
        ("chevaux", "cheval"),
        ("brodée", "brode"),
        ("brodée", "brodee"),
        ("brodées", "brodé"),
        ("L’été", "ete"),
        ("l'ete", "L’ÉTÉ"),
        ("jusqu'ici", "ici"),
        ("women's shoes", "women"),
        ("aujourd'hui", "aujourd’hui"),
        ("O'Neill", "oneill"),
        ("cœur", "coeur"),
        ("Straße", "STRASSE"),
        ("e\u0301toile", "étoile"),
        ("ﬁlm", "film"),
        ("500 ml", "500ml"),
        ("500ml", "500 ml"),
        ("12,5", "12.5"),
        ("Ref. AB-1234", "ab-1234"),
        ("Ref. AB-1234", "ab1234"),
        ("XJ900/2", "xj900/2"),
        ("lampe 𝟚", "2"),
        ("красные туфли", "Красные"),
    ],
)
def test_spellings_of_one_word_meet(name: str, query: str) -> None:
    assert score(product(name), query) > 0


@pytest.mark.parametrize(
    ("name", "query"),
    [
        ("12.5", "125"),
        ("12.5", "12"),
        ("AB1234", "AB123"),
        ("AB1234", "AB12345"),
        ("model 501", "502"),
        ("shirt", "shoe"),
        ("robe", "robot"),
    ],
)
def test_other_words_and_codes_do_not_meet(name: str, query: str) -> None:
    assert score(product(name), query) == 0


def test_the_product_id_is_found_whole_and_first() -> None:
    named = product("sku:12.A-7 look-alike", "other")
    identified = product("thing", "sku:12.A-7")
    assert score(identified, "SKU:12.a-7") > 0
    assert score(identified, "sku:12.a") == 0
    assert score(product("thing", "a--b"), "where is a--b") > 0
    assert score(named, "sku:12.A-7") > 0


def test_every_field_is_found_and_the_name_weighs_most() -> None:
    fields = [
        product("zebra"),
        product(brand="Zebra"),
        product(category="Animals > Zebra"),
        product(attributes={"pattern": ["dots", "zebra"]}),
        product(description="zebra"),
    ]
    scores = [score(document, "zebra") for document in fields]
    assert scores == sorted(scores, reverse=True)
    assert scores[0] > scores[1] > scores[3] > scores[4] > 0
    assert score(product(attributes={"size": 42}), "42") > 0
    assert score(product(attributes={"waterproof": True}), "waterproof") > 0
    assert score(product(attributes={"waterproof": False}), "waterproof false") == 0


def test_the_same_spelling_beats_an_inflection_and_repetition_saturates() -> None:
    assert score(product("robe"), "robe") > score(product("robes"), "robe") > 0
    once, twice, often = (
        score(product(description="word " * count + "x " * (20 - count)), "word") for count in (1, 2, 20)
    )
    assert once < twice < often < 3 * once
    assert score(product(description="word"), "word") > score(product(description="word " + "filler " * 200), "word")


def test_a_query_word_counts_once() -> None:
    for word in ("robe", "chaussures", "dresses", "brodée", "ab1234", "t-shirt"):
        identifier = 1.0  # the whole chunk may be a product id
        assert sum(query_vector(word).values) == pytest.approx(1.0 + identifier)


def test_words_that_say_nothing_are_dropped_unless_alone() -> None:
    document = product("a dress for the summer")
    assert score(document, "the") > 0
    assert score(document, "the boat") == 0
    assert score(document, "une dress") == pytest.approx(score(document, "dress"))


def test_terms_never_change() -> None:
    # Stored in every index: other numbers here need a new index format.
    vector = query_vector("robes")
    assert vector.indices == (246623724, 566304756, 1969160346, 2441932653)
    assert vector.values == pytest.approx((0.35, 0.3, 1.0, 0.35))


@pytest.mark.parametrize(
    ("name", "query"),
    [
        ("schöne Schuhe", "schoner"),
        ("Bücher", "bucher"),
        ("Stühle", "Stuhl"),
        ("zapatos", "zapato"),
        ("camión", "camiones"),
        ("camisetas rojas", "camiseta roja"),
        ("dresses", "dress"),
        ("brodées", "brodé"),
    ],
)
def test_inflections_meet_in_each_language_that_is_declared(name: str, query: str) -> None:
    assert score(product(name), query, FOUR) > 0


def test_german_and_spanish_meet_only_where_they_are_declared() -> None:
    assert score(product("Jacken"), "Jacke") == 0
    assert score(product("Jacken"), "Jacke", ("en", "de")) > 0
    assert score(product("cantando"), "cantamos") == 0
    assert score(product("cantando"), "cantamos", ("en", "es")) > 0


@pytest.mark.parametrize("name", ["Robe d'été brodée", "T-shirt for running", "schöne Häuser", "AB-1234 dos camisetas"])
def test_a_language_more_adds_terms_and_changes_none(name: str) -> None:
    # What was indexed before a language was declared is still found by the terms that it has.
    before, after = document_vector(product(name)), document_vector(product(name), FOUR)
    assert (
        dict(zip(before.indices, before.values, strict=True)).items()
        <= dict(zip(after.indices, after.values, strict=True)).items()
    )
    assert set(query_vector(name).indices) <= set(query_vector(name, FOUR).indices)


def test_words_that_say_nothing_are_those_of_the_declared_languages() -> None:
    assert score(product("x"), "una camisa", ("es",)) == score(product("x"), "camisa", ("es",))
    both = query_vector("una camisa", ("es",)).values, query_vector("una camisa").values
    assert sum(both[0]) == pytest.approx(sum(both[1]) - 1) or sum(both[0]) < sum(both[1])


def test_words_that_may_have_been_meant_weigh_less() -> None:
    shoes, written = product("shoes"), query_vector("sheos")
    assert score(shoes, "sheos") == 0
    meant = query_vector("sheos", meant=["shoes"])
    stored = document_vector(shoes)
    hit = sum(dict(zip(meant.indices, meant.values, strict=True)).get(term, 0.0) for term in stored.indices)
    assert hit == pytest.approx(0.6)
    assert set(written.indices) <= set(meant.indices)


def test_each_word_that_was_written_is_one_however_it_is_looked_up() -> None:
    found = {word.text: word.ways for word in written("The T-shirt m red, d'été AB-12 500 ml", DEFAULT_LANGUAGES)}
    assert found == {
        "t-shirt": (("tshirt",), ("t", "shirt")),
        "m": (("m",), ("mred",)),
        "red": (("red",), ("mred",)),
        "été": (("été",),),
        "ab-12": (("ab12",), ("ab", "12")),
        "500": (("500",), ("500ml",)),
        "ml": (("ml",), ("500ml",)),
    }
    assert [word.chunk for word in written("(AB-- c", DEFAULT_LANGUAGES)] == ["(ab--", "c"]


@given(text=st.text("ab1-' .,é", max_size=30))
def test_what_is_written_is_looked_up_by_nothing_but_its_words(text: str) -> None:
    forms = {one for word in written(text, DEFAULT_LANGUAGES) for way in word.ways for one in way}
    assert forms <= words_of(text, DEFAULT_LANGUAGES)


def test_a_vector_of_any_finds_a_product_by_its_id_and_by_one_of_the_words() -> None:
    asked = set(vector_of_any(["rx1002", "shirts"], "rx-1002", DEFAULT_LANGUAGES).indices)
    for name, product_id in (("Runner blue", "RX-1002"), ("Green shirt", "a"), ("Filter RX1002", "b")):
        assert asked & set(document_vector(Product(product_id=product_id, name=name)).indices)
    assert not asked & set(document_vector(Product(product_id="c", name="RX 9")).indices)


def test_the_words_of_a_text() -> None:
    assert words_of("T-shirt d'Été, AB-12!", DEFAULT_LANGUAGES) == {"tshirt", "t", "shirt", "été", "ab12", "ab", "12"}
    assert runs("L’ÉTÉ, t-shirt!") == ["ete", "t", "shirt"]
    assert runs("...") == []


@given(name=TEXT.filter(bool), description=TEXT, query=TEXT)
def test_vectors_are_well_formed_for_any_text(name: str, description: str, query: str) -> None:
    for vector in (document_vector(product(name, description=description)), query_vector(query)):
        assert list(vector.indices) == sorted(set(vector.indices))
        assert all(0 <= term < 2**32 for term in vector.indices)
        assert all(math.isfinite(value) and value > 0 for value in vector.values)
        assert len(vector.indices) == len(vector.values)


@given(text=TEXT.filter(bool))
def test_a_text_finds_itself_in_any_case(text: str) -> None:
    if any(character.isalnum() for character in text):
        assert score(product(text), text) > 0
        assert score(product(text.lower()), text.casefold()) > 0


@given(words=st.lists(st.sampled_from(["robe", "t-shirt", "L'été", "AB-12", "the", "12,5", "red"]), min_size=1))
def test_the_order_of_a_querys_words_does_not_matter(words: list[str]) -> None:
    forward, backward = query_vector(" , ".join(words)), query_vector(" , ".join(reversed(words)))
    assert forward.indices == backward.indices
    assert forward.values == pytest.approx(backward.values)


def test_threads_share_no_state() -> None:
    names = [f"chaussures brodées {chr(97 + n % 26)}{chr(97 + n // 26)}ations" for n in range(400)]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda name: document_vector(product(name)), names))
    assert together == [document_vector(product(name)) for name in names]


def test_what_the_text_tower_sees() -> None:
    shoe = product(
        "Red\x00 shoe\n by Acme", brand="ACME", category="Sport > Shoes", description="Light,  soft. " + "word " * 200
    )
    text = text_for_embedding(shoe)
    assert text.startswith("Red shoe by Acme, Sport, Shoes. Light, soft. word word")
    assert 250 < len(text) < 350
    assert text.endswith("word")
    assert text_for_embedding(product("Shoe", brand="Acme")) == "Shoe, Acme"
    assert text_for_embedding(product("Shoe", description="x" * 1000)) == "Shoe. " + "x" * 300


@given(name=TEXT.filter(bool), description=TEXT)
def test_what_the_text_tower_sees_is_one_printable_line(name: str, description: str) -> None:
    assert text_for_embedding(product(name, description=description)).isprintable()
