"""The storefront page as a visitor meets it: words, photos, filters, the way back."""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Callable, Iterable
from typing import Any

import pytest
from PIL import Image
from playwright.sync_api import Locator, Page, Request, Route, expect
from tests.browser.conftest import Watch
from tests.browser.shop import drop, paste, photo_of

SEARCH = "**/api/v1/search"
FOOTWEAR = {
    "allstar-sneakers",
    "freerun-running-shoe",
    "hi-top-basketball-shoe",
    "pureboost-running-shoe",
    "runx-running-shoe",
    "ultraboost-running-shoe",
}
PHONE = {"viewport": {"width": 360, "height": 740}, "is_mobile": True, "has_touch": True}
SMALL_PHONE = {**PHONE, "viewport": {"width": 320, "height": 640}}


def box(page: Page) -> Locator:
    return page.get_by_role("combobox", name="Search the catalogue")


def cards(page: Page) -> Locator:
    return page.locator(".card:not(.skeleton)")


def first(page: Page) -> Locator:
    return cards(page).first


def expect_first(page: Page, product_id: str) -> None:
    expect(first(page)).to_have_attribute("data-product-id", product_id)


def order(page: Page) -> list[str]:
    return [str(card.get_attribute("data-product-id")) for card in cards(page).all()]


def settled(page: Page) -> None:
    """Wait until nothing is being loaded any more."""
    expect(page.locator("#results")).not_to_have_attribute("aria-busy", "true")


def search(page: Page, words: str) -> None:
    box(page).fill(words)
    page.keyboard.press("Enter")
    expect(page.locator("#results-title")).to_contain_text(f"“{words}”")
    settled(page)


def body_of(request: Request) -> dict[str, Any]:
    body: dict[str, Any] = json.loads(request.post_data or "null")
    return body


def is_search(request: Request) -> bool:
    return request.url.endswith("/api/v1/search")


def asked_with(**fields: Any) -> Callable[[Request], bool]:
    """What recognises a search with these fields; None: without it.

    The page counts once more by itself after some answers, so the next search need not be the one that a click began.
    """

    def recognises(request: Request) -> bool:
        return is_search(request) and all(body_of(request).get(name) == value for name, value in fields.items())

    return recognises


def with_photo(request: Request) -> bool:
    return is_search(request) and "image" in body_of(request)


def answer(*products: dict[str, Any], **more: Any) -> str:
    results = [{"product_id": "one", "name": "One", "score": 0.5, **product} for product in products]
    whole = {"results": results, "count": len(results), "model": "test", "mode": "hybrid", "took_ms": 1.0, **more}
    return json.dumps(whole)


def problem(route: Route, status: int, headers: dict[str, str] | None = None, **fields: Any) -> None:
    body = json.dumps({"type": "about:blank", "status": status, "request_id": "r-1", **fields})
    route.fulfill(status=status, headers=headers or {}, content_type="application/problem+json", body=body)


# --- the catalogue ----------------------------------------------------------------------------------------


def test_without_a_query_the_catalogue_is_shown_page_by_page(page: Page) -> None:
    page.goto("/")
    expect(page.get_by_role("heading", level=1)).to_have_text("The catalogue")
    expect(page.locator("#hero")).to_be_visible()
    expect(cards(page)).to_have_count(24)
    expect(page.locator("#count")).to_have_text("24 of 54 products")
    page.get_by_role("button", name="Show more").click()
    expect(cards(page)).to_have_count(48)
    expect(cards(page).nth(24).get_by_role("button")).to_be_focused()
    page.get_by_role("button", name="Show more").click()
    expect(cards(page)).to_have_count(54)
    expect(page.get_by_role("button", name="Show more")).to_be_hidden()
    expect(page.locator("#end")).to_be_visible()


def test_a_card_shows_what_a_shopper_asks_for(page: Page) -> None:
    page.goto("/?brand=Converse")
    card = first(page)
    expect(card.get_by_role("heading")).to_have_text("Allstar Sneakers")
    expect(card).to_contain_text("Converse")
    expect(card).to_contain_text("$65.00")
    expect(card).to_contain_text("In stock")
    page.wait_for_function("() => document.querySelector('.card img').naturalWidth > 0")


def test_the_footer_names_the_model_and_the_time(page: Page) -> None:
    page.goto("/?q=chair")
    footer = page.locator("#footer-model")
    expect(footer).to_contain_text("catalens-starter (starter model — not CLIP)")
    expect(footer).to_contain_text(re.compile(r"answered in [\d.]+ ms"))


# --- words ------------------------------------------------------------------------------------------------


def test_typing_is_enough(page: Page) -> None:
    page.goto("/")
    box(page).press_sequentially("sneakers", delay=10)
    expect_first(page, "allstar-sneakers")
    expect(page).to_have_url(re.compile(r"\?q=sneakers$"))
    expect(page).to_have_title("Results for “sneakers” – Catalens")


def test_a_newer_search_aborts_the_older_one(page: Page) -> None:
    page.goto("/")
    # Left without an answer, so that only giving it up can end it.
    page.route(SEARCH, lambda route: None if body_of(route.request)["query"] == "tent" else route.continue_())
    with page.expect_event("requestfailed", asked_with(query="tent")) as failed:
        with page.expect_request(asked_with(query="tent")):
            box(page).fill("tent")
        box(page).fill("camera lens")
        expect_first(page, "camera-lens")
    assert "ERR_ABORTED" in (failed.value.failure or "")


def test_nothing_found_leads_back_to_the_catalogue(page: Page) -> None:
    page.route(SEARCH, lambda route: route.fulfill(content_type="application/json", body=answer()))
    page.goto("/?q=unobtainium")
    expect(page.get_by_role("heading", name="Nothing matches")).to_be_visible()
    page.get_by_role("button", name="Show the whole catalogue").click()
    expect(cards(page)).to_have_count(24)


def test_options_travel_with_the_search_and_in_the_address(page: Page) -> None:
    page.goto("/?q=shoe")
    page.get_by_text("Options").click()
    with page.expect_request(asked_with(mode="lexical")):
        page.get_by_label("How to match").select_option("lexical")
    with page.expect_request(asked_with(using="text")):
        page.get_by_label("Compare with").select_option("text")
    expect(page).to_have_url(re.compile(r"mode=lexical&using=text"))

    # A photo cannot be searched for by exact words: the mode gives way and cannot be chosen.
    with page.expect_request(with_photo) as sent:
        drop(page, photo_of("tent"))
    assert "mode" not in body_of(sent.value)
    expect(page.get_by_role("option", name="Exact words only")).to_be_disabled()
    settled(page)


# --- what is being typed ----------------------------------------------------------------------------------


def options(page: Page) -> Locator:
    return page.get_by_role("listbox", name="Suggestions").get_by_role("option")


def with_words(page: Page) -> None:
    """Wait until the service has read the catalogue's words: it suggests and corrects nothing before."""
    page.evaluate("""async () => {
      for (let ready = false; !ready; ) ready = (await (await fetch("/api/v1/suggest?q=a")).json()).ready;
    }""")


def suggest(page: Page, *suggestions: dict[str, Any]) -> None:
    """Answer every text with these."""
    body = json.dumps({"suggestions": suggestions, "count": len(suggestions), "ready": True})
    page.route("**/api/v1/suggest*", lambda route: route.fulfill(content_type="application/json", body=body))


def test_suggestions_are_chosen_with_the_arrow_keys(page: Page) -> None:
    page.goto("/")
    with_words(page)
    expect(box(page)).to_have_attribute("aria-expanded", "false")
    box(page).fill("snea")
    expect(options(page).first).to_have_text(re.compile("sneakers"))
    expect(box(page)).to_have_attribute("aria-expanded", "true")
    page.keyboard.press("ArrowDown")
    expect(options(page).first).to_have_attribute("aria-selected", "true")
    expect(box(page)).to_have_attribute("aria-activedescendant", str(options(page).first.get_attribute("id")))
    page.keyboard.press("ArrowUp")
    expect(options(page).first).to_have_attribute("aria-selected", "false")
    page.keyboard.press("ArrowUp")
    expect(options(page).last).to_have_attribute("aria-selected", "true")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowDown")
    expect(options(page).first).to_have_attribute("aria-selected", "true")
    page.keyboard.press("Enter")
    expect(options(page)).to_have_count(0)
    expect(box(page)).to_have_value("sneakers")
    expect(page).to_have_url(re.compile(r"\?q=sneakers$"))
    expect_first(page, "allstar-sneakers")


def test_escape_takes_the_suggestions_away_and_not_the_words(page: Page) -> None:
    suggest(page, {"text": "tents", "kind": "words"})
    page.goto("/")
    box(page).fill("ten")
    expect(options(page)).to_have_count(1)
    page.keyboard.press("Escape")
    expect(options(page)).to_have_count(0)
    expect(box(page)).to_have_value("ten")
    expect(page.locator("#results-title")).to_have_text("Results for “ten”")


def test_brands_and_categories_are_suggested_as_filters(page: Page) -> None:
    path = "Sports & Outdoor > Footwear"
    suggest(page, {"text": "Nike", "kind": "brand", "count": 3}, {"text": path, "kind": "category", "count": 6})
    page.goto("/")
    box(page).fill("n")
    expect(options(page)).to_have_text(["NikeBrand · 3", "FootwearCategory · 6"])
    options(page).first.click()
    expect(page).to_have_url(re.compile(r"\?q=Nike&brand=Nike$"))
    expect(cards(page)).to_have_count(3)
    box(page).fill("n")
    options(page).last.click()
    expect(page).to_have_url(re.compile(r"\?q=Footwear&category=Sports.*Footwear&brand=Nike$"))


def test_a_newer_text_gives_up_the_older_suggestions(page: Page) -> None:
    page.goto("/")
    with_words(page)
    page.route("**/api/v1/suggest*q=ten", lambda _: None)  # left without an answer
    with page.expect_event("requestfailed", lambda request: request.url.endswith("q=ten")) as failed:
        with page.expect_request("**/api/v1/suggest*q=ten"):
            box(page).fill("ten")
        box(page).fill("tripo")
        expect(options(page).first).to_have_text(re.compile("tripod"))
    assert "ERR_ABORTED" in (failed.value.failure or "")


def test_without_suggestions_the_search_goes_on(page: Page, watch: Watch) -> None:
    watch.expected.append("Failed to load resource")
    asked: list[Request] = []

    def busy(route: Route) -> None:
        asked.append(route.request)
        problem(route, 429, {"Retry-After": "0"}, title="Too many requests")

    page.route("**/api/v1/suggest*", busy)
    page.goto("/")
    box(page).fill("tripod")
    expect_first(page, "tripod")
    settled(page)
    assert len(asked) == 1
    expect(options(page)).to_have_count(0)
    expect(page.locator("#notice")).to_be_hidden()


def test_a_misspelt_word_is_corrected_unless_it_is_meant(page: Page) -> None:
    page.goto("/")
    with_words(page)
    search(page, "runing shoe")
    line = page.locator("#corrected")
    expect(line).to_have_text("Showing results for running shoe. Search instead for runing shoe")
    with page.expect_request(asked_with(correct=False)):
        line.get_by_role("link", name="runing shoe").click()
    expect(line).to_be_hidden()
    expect(page).to_have_url(re.compile(r"q=runing\+shoe&exact=1$"))
    page.go_back()
    expect(line).to_be_visible()
    line.get_by_role("link", name="running shoe").click()
    expect(page).to_have_url(re.compile(r"\?q=running\+shoe$"))
    expect(line).to_be_hidden()
    expect(box(page)).to_have_value("running shoe")


# --- the order, and the reasons ---------------------------------------------------------------------------


def test_results_are_sorted_by_price(page: Page) -> None:
    page.goto("/")
    expect(page.get_by_label("Sort by")).to_be_hidden()
    search(page, "camera")
    page.get_by_label("Sort by").select_option("Highest price first")
    expect(page).to_have_url(re.compile("sort=price_desc"))
    settled(page)
    shown = [float(text.lstrip("$").replace(",", "")) for text in page.locator(".card .price").all_text_contents()]
    assert shown == sorted(shown, reverse=True)
    assert len(set(shown)) > 5


def test_a_result_says_why_it_is_there(page: Page) -> None:
    page.goto("/?q=tripod")
    why = first(page).locator(".why")
    expect(why.locator("li").first).to_be_hidden()
    why.get_by_text("Why this result?").click()
    expect(why.locator("li")).to_have_text(
        [re.compile(rf"^{part}\d+%$") for part in ("Picture", "Description", "Words")]
    )
    shares = [int(re.sub(r"\D", "", text)) for text in why.locator("li").all_text_contents()]
    assert 98 <= sum(shares) <= 102  # each is rounded
    assert shares[2] == max(shares)


def test_a_list_that_lacks_the_product_is_no_reason(page: Page) -> None:
    parts = [
        {"part": "image", "score": None, "contribution": 0},
        {"part": "lexical", "score": 2.5, "contribution": 0.3},
        {"part": "boost", "field": "stock", "contribution": 0.1},
    ]
    body = answer({"explain": parts})
    page.route(SEARCH, lambda route: route.fulfill(content_type="application/json", body=body))
    page.goto("/?q=chair")
    first(page).get_by_text("Why this result?").click()
    reasons = first(page).locator(".why li")
    expect(reasons).to_have_text(["Pictureno match", "Words75%", "Raised for stock25%"])


# --- photos -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("product_id", ["allstar-sneakers", "road-bike", "orchid"])
def test_a_dropped_photo_finds_its_product(page: Page, product_id: str) -> None:
    page.goto("/")
    expect(cards(page)).to_have_count(24)
    drop(page, photo_of(product_id))
    expect(page.get_by_role("heading", name="Matches for your photo")).to_be_visible()
    expect_first(page, product_id)
    expect(page.get_by_alt_text("Your photo")).to_be_visible()
    expect(page.locator("#drop")).to_be_hidden()


def test_a_pasted_photo_finds_its_product(page: Page) -> None:
    page.goto("/")
    paste(page, photo_of("tent"))
    expect_first(page, "tent")


def test_a_chosen_photo_finds_its_product(page: Page) -> None:
    page.goto("/")
    with page.expect_file_chooser() as chooser:
        page.get_by_role("button", name="Search with a photo").click()
    chooser.value.set_files({"name": "p.jpg", "mimeType": "image/jpeg", "buffer": photo_of("leather-sofa")})
    expect_first(page, "leather-sofa")


def test_a_picture_dragged_within_the_page_finds_its_product(page: Page) -> None:
    page.goto("/?brand=Converse")
    expect_first(page, "allstar-sneakers")
    first(page).locator("img").evaluate("""(image) => {
      const dataTransfer = new DataTransfer();
      dataTransfer.setData("text/uri-list", image.src);
      dataTransfer.setData("text/html", image.outerHTML);
      document.body.dispatchEvent(new DragEvent("drop", { bubbles: true, cancelable: true, dataTransfer }));
    }""")
    expect(page.get_by_role("heading", name="Matches for your photo")).to_be_visible()
    expect_first(page, "allstar-sneakers")


def test_a_large_photo_is_made_small_before_it_is_sent(page: Page) -> None:
    large = io.BytesIO()
    Image.new("RGBA", (3000, 1500), (200, 30, 30, 128)).save(large, "PNG")
    page.goto("/")
    with page.expect_request(with_photo) as sent:
        drop(page, large.getvalue(), "large.png", "image/png")
    with Image.open(io.BytesIO(base64.b64decode(body_of(sent.value)["image"]["data"]))) as picture:
        assert (picture.format, picture.size) == ("JPEG", (1024, 512))
    settled(page)


def test_a_small_photo_is_sent_as_it_is(page: Page) -> None:
    page.goto("/")
    with page.expect_request(with_photo) as sent:
        drop(page, photo_of("tent"))
    assert base64.b64decode(body_of(sent.value)["image"]["data"]) == photo_of("tent")
    settled(page)


def test_what_is_no_picture_shows_the_servers_answer(page: Page, watch: Watch) -> None:
    watch.expected.append("Failed to load resource")
    page.goto("/")
    drop(page, b"no picture at all", "notes.txt", "text/plain")
    alert = page.locator("#problem")
    expect(alert).to_be_visible()
    expect(alert.get_by_role("heading")).not_to_be_empty()
    page.get_by_role("button", name="Remove the photo").click()
    expect(alert).to_be_hidden()
    expect(cards(page)).to_have_count(24)


def test_the_slider_weighs_the_photo_against_the_words(page: Page) -> None:
    page.goto("/")
    slider = page.get_by_role("slider")
    expect(slider).to_be_hidden()
    drop(page, photo_of("allstar-sneakers"))
    expect_first(page, "allstar-sneakers")
    expect(slider).to_be_hidden()
    with page.expect_request(asked_with(image_weight=0.5)):
        search(page, "orchid")
    expect(slider).to_be_visible()

    with page.expect_request(asked_with(image_weight=0)):
        slider.press("End")
    expect_first(page, "orchid")
    expect(slider).to_have_attribute("aria-valuetext", "0 % picture, 100 % words")
    words_only = order(page)
    with page.expect_request(asked_with(image_weight=1)):
        slider.press("Home")
    expect_first(page, "allstar-sneakers")
    assert order(page) != words_only

    page.get_by_role("button", name="Remove the photo").click()
    expect(slider).to_be_hidden()
    expect_first(page, "orchid")


# --- filters ----------------------------------------------------------------------------------------------


def choice(page: Page, facet: str, name: str) -> Locator:
    """Return what one clicks to choose this value."""
    values = page.get_by_role("list", name=facet, exact=True)
    return values.get_by_role("link", name=name).or_(values.get_by_role("checkbox", name=name))


def tallies(page: Page, facet: str) -> dict[str, int]:
    items = page.get_by_role("list", name=facet, exact=True).locator(".choice:has(.tally)").all()
    return {item.locator(".choice-name").inner_text(): int(item.locator(".tally").inner_text()) for item in items}


def test_facets_say_how_many_there_are_and_narrow_the_results(page: Page) -> None:
    page.goto("/?q=shoe")
    expect(choice(page, "Category", "Footwear")).to_be_visible()
    assert tallies(page, "Category")["Footwear"] == len(FOOTWEAR)
    expect(choice(page, "Color", "black")).to_be_visible()
    black = tallies(page, "Color")["black"]

    choice(page, "Color", "black").check()
    expect(cards(page)).to_have_count(black)
    expect(page).to_have_url(re.compile(r"attributes\.color=black$"))
    expect(choice(page, "Color", "black")).to_be_focused()
    white = tallies(page, "Color")["white"]  # its own filter hides nothing of a facet
    assert white > 0
    choice(page, "Color", "white").check()
    expect(page.locator("#count")).not_to_have_text(f"{black} products")
    settled(page)
    assert black < len(order(page)) <= black + white
    both = order(page)

    page.reload()
    expect(cards(page)).to_have_count(len(both))
    assert order(page) == both
    expect(choice(page, "Color", "white")).to_be_checked()
    page.go_back()
    expect(cards(page)).to_have_count(black)
    expect(choice(page, "Color", "white")).not_to_be_checked()

    page.get_by_role("button", name="Remove the filter Color: black").click()
    expect(page).to_have_url(re.compile(r"\?q=shoe$"))


def test_a_second_tick_before_the_answer_keeps_the_first(page: Page) -> None:
    page.goto("/?q=shoe")
    expect(choice(page, "Color", "black")).to_be_visible()

    def one_is_not_enough(route: Route) -> None:
        if body_of(route.request).get("filters", {}).get("attributes.color") != ["black"]:
            route.continue_()  # the first is left without an answer

    page.route(SEARCH, one_is_not_enough)
    choice(page, "Color", "black").check()
    choice(page, "Color", "white").check()
    expect(page).to_have_url(re.compile(r"attributes\.color=black.*white"))
    settled(page)
    expect(choice(page, "Color", "black")).to_be_checked()
    expect(choice(page, "Color", "white")).to_be_checked()


def test_a_chip_that_is_taken_off_leaves_the_keyboard_at_the_results(page: Page) -> None:
    page.goto("/?q=shoe&attributes.color=black")
    page.get_by_role("button", name="Remove the filter Color: black").press("Enter")
    expect(page.locator("#results-title")).to_be_focused()
    expect(choice(page, "Color", "black")).not_to_be_checked()


def test_facets_of_the_catalogue_are_counted_while_browsing(page: Page) -> None:
    page.goto("/")
    expect(choice(page, "Category", "Electronics")).to_be_visible()
    browsing = {facet: tallies(page, facet) for facet in ("Category", "Color")}
    search(page, "chair")  # the whole catalogue is like a chair, more or less
    expect(choice(page, "Price ranges", "$50")).to_have_count(2)
    assert {facet: tallies(page, facet) for facet in ("Category", "Color")} == browsing


def test_a_long_facet_is_unfolded(page: Page) -> None:
    page.goto("/")
    brands = page.get_by_role("list", name="Brand", exact=True)
    expect(brands.get_by_role("checkbox")).to_have_count(6)
    brands.get_by_role("button", name="Show all 19").click()
    expect(brands.get_by_role("checkbox")).to_have_count(19)
    expect(brands.get_by_role("checkbox").nth(6)).to_be_focused()


def test_a_price_range_is_a_filter_as_it_stands(page: Page) -> None:
    page.goto("/?q=camera")
    step = page.get_by_role("list", name="Price ranges").get_by_role("link").nth(1)
    expect(step).to_be_visible()
    name, count = step.locator(".choice-name").inner_text(), int(step.locator(".tally").inner_text())
    low, high = (int(part.lstrip("$")) for part in name.split(" – "))
    with page.expect_request(asked_with(filters={"price": {"gte": low, "lt": high}})):
        step.click()
    expect(cards(page)).to_have_count(count)
    expect(page.get_by_label("Highest price")).to_have_value(str(high))
    page.get_by_label("Lowest price").fill(str(low - 1))
    page.keyboard.press("Tab")
    expect(page).to_have_url(re.compile(rf"min={low - 1}&below={high}$"))
    page.get_by_label("Highest price").fill(str(high - 1))
    with page.expect_request(asked_with(filters={"price": {"gte": low - 1, "lte": high - 1}})):
        page.keyboard.press("Tab")


def test_close_matches_only(page: Page) -> None:
    page.goto("/?q=tripod")
    settled(page)
    before = len(order(page))
    with page.expect_request(asked_with(min_score=0.55)):
        page.get_by_role("checkbox", name="Close matches only").check()
    expect(cards(page)).not_to_have_count(before)
    expect_first(page, "tripod")
    assert len(order(page)) < before


def test_an_index_that_counts_nothing_is_searched_all_the_same(page: Page, watch: Watch) -> None:
    watch.expected.append("Failed to load resource")
    refused: list[Request] = []

    def old(route: Route) -> None:
        if "facets" not in body_of(route.request):
            route.continue_()
            return
        refused.append(route.request)
        errors = [{"field": "facets", "message": "this index counts no brand"}]
        problem(route, 422, title="Invalid", detail="", errors=errors)

    page.route(SEARCH, old)
    page.goto("/?q=tripod")
    expect_first(page, "tripod")
    choice(page, "Brand", "Nike").check()
    expect(cards(page)).to_have_count(3)
    assert len(refused) == 1


def test_category_and_price_narrow_a_search(page: Page) -> None:
    page.goto("/?q=shoe")
    choice(page, "Category", "Footwear").click()
    expect(page).to_have_url(re.compile("category=Sports"))
    settled(page)
    assert "runx-running-shoe" in order(page)
    assert set(order(page)) <= FOOTWEAR

    with page.expect_request(asked_with(filters={"category": "Sports & Outdoor > Footwear", "price": {"lte": 70}})):
        page.get_by_label("Highest price").fill("70")
        page.keyboard.press("Enter")
    settled(page)
    assert "runx-running-shoe" in order(page)
    assert set(order(page)) <= {"allstar-sneakers", "runx-running-shoe"}

    page.get_by_role("button", name="Clear filters").click()
    expect(page).to_have_url(re.compile(r"\?q=shoe$"))


def test_the_catalogue_can_be_filtered_without_a_query(page: Page) -> None:
    page.goto("/")
    choice(page, "Category", "Sports & Outdoor").click()
    expect(page.locator("#count")).to_have_text("14 products")
    expect(choice(page, "Brand", "Samsung")).to_have_count(0)
    choice(page, "Brand", "Nike").check()
    expect(page.locator("#count")).to_have_text("3 products")
    page.get_by_role("checkbox", name="In stock").check()
    expect(page).to_have_url(re.compile(r"category=Sports.*brand=Nike.*stock=1"))
    expect(page.locator("#count")).to_have_text("3 products")


def test_an_impossible_price_range_is_said_and_not_sent(page: Page) -> None:
    page.goto("/?q=chair")
    settled(page)
    page.get_by_label("Lowest price").fill("50")
    page.keyboard.press("Tab")
    expect(page).to_have_url(re.compile("min=50"))
    page.get_by_label("Highest price").fill("10")
    page.keyboard.press("Tab")
    expect(page.get_by_text("The lowest price is above the highest.")).to_be_visible()
    assert "max=" not in page.url


# --- the way there and back -------------------------------------------------------------------------------


def test_more_like_this_and_back_to_the_photo(page: Page) -> None:
    page.goto("/")
    drop(page, photo_of("allstar-sneakers"))
    expect_first(page, "allstar-sneakers")
    before = order(page)
    first(page).get_by_role("button", name="More like this").click()
    title = page.get_by_role("heading", name="More like Allstar Sneakers")
    expect(title).to_be_visible()
    expect(title).to_be_focused()
    expect(first(page)).not_to_have_attribute("data-product-id", "allstar-sneakers")
    expect(page).to_have_url(re.compile(r"\?similar=allstar-sneakers$"))
    settled(page)
    assert "allstar-sneakers" not in order(page)
    page.get_by_role("button", name="Back").click()
    expect_first(page, "allstar-sneakers")
    expect(page.get_by_alt_text("Your photo")).to_be_visible()
    assert order(page) == before


def test_a_link_to_similar_products_works_by_itself(page: Page) -> None:
    page.goto("/?similar=orchid")
    expect(page.get_by_role("heading", name="More like Orchid")).to_be_visible()
    page.get_by_role("button", name="Whole catalogue").click()
    expect(page.locator("#count")).to_have_text("24 of 54 products")


def test_back_and_forward_walk_through_the_searches(page: Page) -> None:
    page.goto("/")
    expect(cards(page)).to_have_count(24)
    search(page, "tripod")
    expect_first(page, "tripod")
    search(page, "tent")
    expect_first(page, "tent")
    page.go_back()
    expect_first(page, "tripod")
    expect(box(page)).to_have_value("tripod")
    page.go_back()
    expect(page.locator("#count")).to_have_text("24 of 54 products")
    expect(box(page)).to_have_value("")
    page.go_forward()
    expect_first(page, "tripod")


def test_typing_leaves_one_entry_to_go_back_over(page: Page) -> None:
    page.goto("/")
    expect(cards(page)).to_have_count(24)
    for words in ("te", "tenn", "tennis ball"):
        box(page).fill(words)
        expect(page.locator("#results-title")).to_contain_text(f"“{words}”")
    expect_first(page, "tennis-ball")
    page.go_back()
    expect(page.locator("#results-title")).to_have_text("The catalogue")


def test_the_address_is_the_whole_state(page: Page) -> None:
    page.goto("/?q=shoe&category=Sports+%26+Outdoor+%3E+Footwear&max=100&mode=hybrid")
    expect(box(page)).to_have_value("shoe")
    expect(choice(page, "Category", "Footwear")).to_have_attribute("aria-current", "true")
    expect(page.get_by_label("Highest price")).to_have_value("100")
    expect(page.get_by_label("How to match")).to_have_value("hybrid")
    settled(page)
    before = order(page)
    assert before
    page.reload()
    expect(cards(page)).to_have_count(len(before))
    assert order(page) == before


def test_the_keyboard_alone_is_enough(page: Page) -> None:
    page.goto("/")
    expect(cards(page)).to_have_count(24)
    page.keyboard.press("Tab")
    expect(page.get_by_role("link", name="Skip to the results")).to_be_focused()
    page.keyboard.press("/")
    expect(box(page)).to_be_focused()
    page.keyboard.type("basketball")
    page.keyboard.press("Enter")
    expect_first(page, "basketball")
    settled(page)
    more = first(page).get_by_role("button", name="More like this")
    tab_until(page, more)
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", name="More like Basketball")).to_be_focused()
    back = page.get_by_role("button", name="Back")
    page.keyboard.press("Shift+Tab")
    expect(back).to_be_focused()
    page.keyboard.press("Enter")
    expect_first(page, "basketball")


def tab_until(page: Page, target: Locator, at_most: int = 60) -> None:
    for _ in range(at_most):
        page.keyboard.press("Tab")
        if target.evaluate("(element) => element === document.activeElement"):
            return
    pytest.fail("the keyboard does not get there")


# --- phones -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("context", [PHONE, SMALL_PHONE], indirect=True, ids=["360px", "320px"])
def test_a_phone_never_scrolls_sideways(page: Page) -> None:
    page.goto("/")
    expect(cards(page)).to_have_count(24)
    expect(page.get_by_role("button", name="Take a photo")).to_be_visible()
    no_sideways_scroll(page)
    page.get_by_role("button", name="Filters").tap()
    page.get_by_text("Options").tap()
    expect(page.get_by_label("How to match")).to_be_visible()
    no_sideways_scroll(page)
    page.get_by_text("Brand", exact=True).tap()
    choice(page, "Brand", "Nike").tap()
    expect(page.locator("#count")).to_have_text("3 products")
    page.get_by_role("button", name="Show the results").tap()
    expect(page.get_by_label("How to match")).to_be_hidden()
    no_sideways_scroll(page)
    page.get_by_role("button", name="Clear filters").tap()
    drop(page, photo_of("allstar-sneakers"))
    expect_first(page, "allstar-sneakers")
    search(page, "white sneakers with a very long description")
    expect(page.get_by_role("slider")).to_be_visible()
    no_sideways_scroll(page)
    first(page).get_by_role("button", name="More like this").tap()
    expect(page.locator("#results-title")).to_contain_text("More like")
    no_sideways_scroll(page)


def no_sideways_scroll(page: Page) -> None:
    wide = page.evaluate("() => [document.documentElement.scrollWidth, document.documentElement.clientWidth]")
    assert wide[0] <= wide[1]


# --- when things go wrong ---------------------------------------------------------------------------------


def test_a_problem_is_shown_in_the_servers_words(page: Page, watch: Watch) -> None:
    watch.expected.append("Failed to load resource")
    errors = [{"field": "query", "message": "is too strange"}]
    page.route(SEARCH, lambda route: problem(route, 422, title="Invalid search", detail="See below.", errors=errors))
    page.goto("/?q=chair")
    alert = page.get_by_role("alert").filter(has_text="Invalid search")
    expect(alert).to_contain_text("See below.")
    expect(alert).to_contain_text("query: is too strange")
    expect(alert).to_contain_text("r-1")
    page.unroute(SEARCH)
    page.get_by_role("button", name="Try again").click()
    expect(alert).to_be_hidden()
    expect(first(page)).to_be_visible()


@pytest.mark.parametrize("status", [429, 503])
def test_a_busy_server_is_asked_once_more_when_it_says(page: Page, watch: Watch, status: int) -> None:
    watch.expected.append("Failed to load resource")
    seen: list[Request] = []

    def once_busy(route: Route) -> None:
        seen.append(route.request)
        if len(seen) == 1:
            problem(route, status, {"Retry-After": "1"}, title="Busy", detail="Later.")
        else:
            route.fulfill(content_type="application/json", body=answer({"name": "Patience"}))

    page.route(SEARCH, once_busy)
    page.goto("/?q=chair")
    expect(page.locator("#notice")).to_contain_text("Trying again in 1 s")
    expect(first(page)).to_contain_text("Patience")
    expect(page.locator("#notice")).to_be_hidden()
    assert len(seen) == 2


def test_a_server_that_stays_busy_is_not_pestered(page: Page, watch: Watch) -> None:
    watch.expected.append("Failed to load resource")
    seen: list[Request] = []

    def busy(route: Route) -> None:
        seen.append(route.request)
        problem(route, 429, {"Retry-After": "0"}, title="Too many requests", detail="Later.")

    page.route(SEARCH, busy)
    page.goto("/?q=chair")
    expect(page.get_by_role("heading", name="Too many requests")).to_be_visible()
    assert len(seen) == 2


def test_a_server_that_is_gone_is_said(page: Page, watch: Watch) -> None:
    watch.expected.append("Failed to load resource")
    page.route(SEARCH, lambda route: route.abort("connectionrefused"))
    page.goto("/?q=chair")
    expect(page.get_by_role("heading", name="The server can’t be reached")).to_be_visible()


def test_a_degraded_answer_says_why(page: Page) -> None:
    body = answer({}, degraded="searched by words only: no encoder answers")
    page.route(SEARCH, lambda route: route.fulfill(content_type="application/json", body=body))
    page.goto("/?q=chair")
    expect(page.locator("#notice")).to_contain_text("Only the words could be compared")
    expect(page.locator("#notice")).to_contain_text("no encoder answers")
    expect(page.locator("#notice")).not_to_contain_text("photo")
    drop(page, photo_of("tent"))
    expect(page.locator("#notice")).to_contain_text("Your photo was not used.")
    page.unroute(SEARCH)
    late = answer({}, degraded="without facets: late")
    page.route(SEARCH, lambda route: route.fulfill(content_type="application/json", body=late))
    search(page, "tent")
    expect(page.locator("#notice")).to_have_text(
        "Something is missing beside these results just now: without facets: late"
    )


def test_product_data_is_never_markup(page: Page) -> None:
    hostile = {
        "name": "<img src=x onerror=alert(1)>",
        "description": "<b>bold</b>",
        "url": "javascript:alert(1)",
        "image": "javascript:alert(1)",
        "price": 3,
        "currency": "???",
    }
    body = answer(hostile, {"product_id": "two", "name": "Two", "url": "https://shop.example/two"})
    page.route(SEARCH, lambda route: route.fulfill(content_type="application/json", body=body))
    page.goto("/?q=chair")
    expect(first(page).get_by_role("heading")).to_have_text("<img src=x onerror=alert(1)>")
    expect(first(page)).to_contain_text("<b>bold</b>")
    expect(first(page).get_by_role("link")).to_have_count(0)
    expect(first(page).locator("img")).to_be_hidden()
    link = cards(page).nth(1).get_by_role("link", name="Two")
    expect(link).to_have_attribute("href", "https://shop.example/two")
    expect(link).to_have_attribute("rel", "noopener")


def test_a_missing_picture_leaves_the_placeholder(page: Page, watch: Watch) -> None:
    watch.expected.append("Failed to load resource")
    page.route("**/api/v1/products/*/image*", lambda route: route.fulfill(status=404))
    page.goto("/")
    expect(first(page).locator("img")).to_be_hidden()
    expect(first(page).locator(".placeholder")).to_be_visible()


def test_a_key_is_asked_for_once_and_sent_with_everything(page: Page, watch: Watch) -> None:
    watch.expected.append("Failed to load resource")
    keys: list[str | None] = []

    def guard(route: Route) -> None:
        key = route.request.headers.get("authorization")
        keys.append(key)
        if key == "Bearer right":
            route.continue_()
        else:
            problem(route, 401, title="A key is needed", detail="Send one.")

    page.route("**/api/**", guard)
    page.goto("/")
    dialog = page.get_by_role("dialog")
    expect(dialog).to_contain_text("asks for a key")
    enter_key(page, "wrong")
    expect(dialog).to_contain_text("not accepted")
    enter_key(page, "right")
    expect(dialog).to_be_hidden()
    expect(cards(page)).to_have_count(24)
    # A picture cannot be asked for with a key by <img>: it must have come some other way.
    page.wait_for_function("() => document.querySelector('.card img').naturalWidth > 0")
    settled(page)
    assert set(after(keys, "Bearer wrong")) == {"Bearer right"}
    page.reload()
    expect(cards(page)).to_have_count(24)
    expect(dialog).to_be_hidden()


def enter_key(page: Page, key: str) -> None:
    page.get_by_label("API key").fill(key)
    page.keyboard.press("Enter")


def after(keys: Iterable[str | None], last: str) -> list[str | None]:
    """Return what follows the last occurrence."""
    found = list(keys)
    return found[len(found) - found[::-1].index(last) :]


def test_without_a_key_the_refusal_is_shown(page: Page, watch: Watch) -> None:
    watch.expected.append("Failed to load resource")
    page.route("**/api/**", lambda route: problem(route, 401, title="A key is needed", detail="Send one."))
    page.goto("/")
    page.get_by_role("button", name="Cancel").click()
    expect(page.get_by_role("heading", name="A key is needed")).to_be_visible()
