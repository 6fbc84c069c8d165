"""The reference page: drawn from the server's document, with nothing inline and nothing from elsewhere."""

from __future__ import annotations

from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Page, Request, expect


def test_the_reference_lists_every_operation(page: Page) -> None:
    page.goto("/docs")
    document = page.request.get("/openapi.json").json()
    operations = [
        (method, path)
        for path, item in document["paths"].items()
        for method in item
        if method in ("get", "put", "post", "patch", "delete")
    ]
    # One that carries several tags is listed under each.
    shown = page.locator(".opblock-summary")
    expect(shown.first).to_be_visible()
    for method, path in operations:
        row = page.locator(f".opblock-{method} .opblock-summary-path[data-path='{path}']")
        expect(row.first).to_be_visible()


def test_an_operation_opens_and_everything_comes_from_here(page: Page, shop: str) -> None:
    elsewhere: list[str] = []

    def note(request: Request) -> None:
        if urlsplit(request.url).scheme in ("http", "https") and not request.url.startswith(shop):
            elsewhere.append(request.url)

    page.on("request", note)
    page.goto("/docs")
    page.locator(".opblock-summary-path[data-path='/api/v1/search']").click()
    expect(page.get_by_text("Request body").first).to_be_visible()
    expect(page.get_by_role("button", name="Execute")).to_be_visible()
    assert elsewhere == []


@pytest.mark.parametrize("context", [{"color_scheme": "dark"}], indirect=True)
def test_the_reference_has_a_dark_theme(page: Page) -> None:
    page.goto("/docs")
    expect(page.locator("html")).to_have_class("dark-mode")
