"""Write docs/images/*: the storefront page of a standalone process with the demo catalogue, in a real browser."""

from __future__ import annotations

import io
import re
import sys
import tempfile
from pathlib import Path

from PIL import Image
from playwright.sync_api import Browser, Page, ViewportSize, expect, sync_playwright

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.browser.shop import chromium, demo_shop, drop, launch, photo_of  # noqa: E402  # needs the path above

FOLDER = ROOT / "docs" / "images"
LARGEST = 400_000
DESKTOP: ViewportSize = {"width": 1280, "height": 860}


def main() -> int:
    """Take every picture; returns the exit status."""
    executable = chromium()
    if executable is None:
        print("no Chromium: run scripts/ensure-chromium, or set CATALENS_CHROMIUM to its path", file=sys.stderr)
        return 1
    expect.set_options(timeout=30_000)
    FOLDER.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory() as folder,
        sync_playwright() as playwright,
        demo_shop(Path(folder)) as shop,
    ):
        browser = launch(playwright, executable)
        take_home(browser, shop)
        take_search(browser, shop)
        take_photo(browser, shop)
        take_phone(browser, shop)
        browser.close()
    return 0


def take_home(browser: Browser, shop: str) -> None:
    """The catalogue, before anything is asked."""
    page = browser.new_page(base_url=shop, viewport=DESKTOP, locale="en-US")
    page.goto("/")
    save(page, "home")


def take_search(browser: Browser, shop: str) -> None:
    """Words and a filter, in the dark theme."""
    page = browser.new_page(base_url=shop, viewport=DESKTOP, locale="en-US", color_scheme="dark")
    page.goto("/?q=running+shoe&category=Sports+%26+Outdoor")
    save(page, "search")


def take_photo(browser: Browser, shop: str) -> None:
    """A photo and words together, with the slider between them."""
    page = browser.new_page(base_url=shop, viewport=DESKTOP, locale="en-US")
    page.goto("/?q=chair")
    drop(page, photo_of("leather-sofa"))
    expect(page.locator("#results-title")).to_contain_text("your photo")
    save(page, "photo")


def take_phone(browser: Browser, shop: str) -> None:
    """A photo alone, on a phone."""
    page = browser.new_page(
        base_url=shop,
        viewport={"width": 390, "height": 844},
        device_scale_factor=2,
        is_mobile=True,
        has_touch=True,
        locale="en-US",
    )
    page.goto("/")
    drop(page, photo_of("hanging-plant"))
    expect(page.locator("#results-title")).to_contain_text("your photo")
    save(page, "phone")


def save(page: Page, name: str) -> None:
    """Wait for the results and their pictures and write docs/images/NAME.png."""
    expect(page.locator(".card:not(.skeleton)").first).to_be_visible()
    expect(page.locator("#results")).not_to_have_attribute("aria-busy", "true")
    expect(page.locator("#facets .choice").first).to_be_attached()
    expect(page.locator("#footer-model")).to_have_text(re.compile("Model"))
    page.wait_for_function("""() => [...document.querySelectorAll(".picture img")]
      .filter((image) => image.getBoundingClientRect().top < innerHeight && !image.hidden)
      .every((image) => image.complete && getComputedStyle(image).opacity === "1")""")
    # A palette keeps photographs good enough for a README and the file small.
    with Image.open(io.BytesIO(page.screenshot())) as shot:
        colours = shot.convert("RGB")
    picture = colours.quantize(palette=colours.quantize(256), dither=Image.Dither.FLOYDSTEINBERG)
    file = FOLDER / f"{name}.png"
    picture.save(file, optimize=True)
    if file.stat().st_size > LARGEST:
        raise RuntimeError(f"{file.name} has {file.stat().st_size:,} bytes, more than {LARGEST:,}")
    print(f"{file.relative_to(ROOT)}  {picture.width} × {picture.height}  {file.stat().st_size // 1000} kB")


if __name__ == "__main__":
    sys.exit(main())
