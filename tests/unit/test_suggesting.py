"""How a beginning is completed: what fits, in which order, and nothing that does not fit."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.test_vocabulary import some_edits

from catalens.domain import DEFAULT_LANGUAGES, Product
from catalens.lexical import runs, stems
from catalens_query.suggesting import Suggestion, complete, understand
from catalens_query.vocabulary import Tally

SHOP = [
    ("Running shoe Fast", "Nike", "Sport > Shoes"),
    ("Running shoe Light", "Nikkon", "Sport > Shoes"),
    ("Walking shoe", "Nike", "Sport > Shoes"),
    ("Leather shorts", "Acme", "Clothing"),
    ("Robe d'été", "Acme", "Clothing"),
    ("Camera XJ-900", "Nikkon", "Photo"),
]
PRODUCTS = [
    Product(product_id=f"p{number}", name=name, brand=brand, category=category, version=1)
    for number, (name, brand, category) in enumerate(SHOP)
]
TALLY = Tally(DEFAULT_LANGUAGES)
TALLY.add(PRODUCTS)
VOCABULARY = TALLY.vocabulary()


def suggested(text: str, limit: int = 8) -> list[Suggestion]:
    typed = understand(text, VOCABULARY)
    return [] if typed is None else complete(typed, VOCABULARY, PRODUCTS, limit)


def texts(text: str, limit: int = 8) -> list[str]:
    return [one.text for one in suggested(text, limit)]


def test_words_brands_categories_and_names_the_frequent_first() -> None:
    found = {one.text: (one.kind, one.count, one.product_id) for one in suggested("sho", 20)}
    assert found["shoe"] == ("words", 3, None)
    assert found["shorts"] == ("words", 1, None)
    assert found["Sport > Shoes"] == ("category", 3, None)
    assert found["Walking shoe"] == ("product", None, "p2")
    assert texts("sho")[0] == "shoe"
    assert texts("nik")[:2] == ["Nike", "Nikkon"]


def test_a_brand_is_not_suggested_as_a_word_too() -> None:
    assert [one.kind for one in suggested("nike")] == ["brand"]


def test_case_accents_and_elisions_do_not_matter() -> None:
    assert texts("ROB") == texts("rob") == ["robe", "Robe d'été"]
    assert texts("été") == texts("ete") == texts("l'Éte") == ["été", "Robe d'été"]


def test_several_words_are_completed_only_together() -> None:
    assert texts("running sh") == ["running shoe", "Running shoe Fast", "Running shoe Light"]
    assert texts("walking f") == []
    assert texts("nike run") == ["nike running", "Running shoe Fast"]


def test_one_word_may_be_misspelt() -> None:
    assert texts("runing sh") == texts("running sh")
    assert texts("walknig") == ["walking", "Walking shoe"]
    assert texts("wlaki") == ["walking", "Walking shoe"]
    assert texts("runing shirts") == []


def test_codes_are_found_whole() -> None:
    assert texts("xj-900") == ["Camera XJ-900"]
    assert texts("p3") == ["Leather shorts"]
    assert texts("xj-901") == []
    rack = Product(product_id="rack", name="Rack", attributes={"sku": "SH00001-02"}, version=1)
    for typed, fits in (("sh00001-02", True), ("sh00001", True), ("sh", False), ("sh0", False)):
        read = understand(typed, VOCABULARY)
        assert read is not None
        assert ("Rack" in [one.text for one in complete(read, VOCABULARY, [rack], 8)]) is fits


def test_nothing_that_is_a_word_finds_nothing() -> None:
    assert suggested("***") == []
    assert understand("...", VOCABULARY) is None


def test_no_kind_takes_more_than_half_while_there_are_others() -> None:
    assert [one.kind for one in suggested("s", 20)][:3] == ["category", "category", "words"]
    assert [one.kind for one in suggested("s", 2)] == ["category", "words"]
    assert [one.kind for one in suggested("nik", 4)] == ["brand", "brand"]


@given(text=st.text("runigshoelakdf ", min_size=1, max_size=14), limit=st.integers(1, 20))
@settings(max_examples=200)
def test_every_suggestion_goes_on_as_was_typed(text: str, limit: int) -> None:
    found = suggested(text, limit)
    assert len(found) <= limit
    assert len({one.text.casefold() for one in found}) == len(found)
    for one in found:
        words = set(runs(one.text)) | set(
            runs(next((p.brand or "" for p in PRODUCTS if p.product_id == one.product_id), ""))
        )
        typos = 0
        for typed in runs(text):
            near = min((some_edits(typed, word) for word in words), default=99)
            inflected = any(stems(typed, DEFAULT_LANGUAGES) & stems(word, DEFAULT_LANGUAGES) for word in words)
            typos += 0 if inflected else near
        assert typos <= 1 + (len(text) >= 8), (text, one)
