"""A real Chromium on a real standalone process; every page is watched for errors until the test's end."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
from playwright.sync_api import Browser, BrowserContext, ConsoleMessage, Error, Page, expect, sync_playwright
from tests.browser.shop import chromium, demo_shop, launch
from tests.missing import missing

# Two shared cores with an encoder beside the browser are slow at times; a condition that holds ends the wait.
expect.set_options(timeout=20_000)

# Under its Content Security Policy a page reports what was blocked as an event; as an error it fails the test.
_REPORT_VIOLATIONS = """addEventListener("securitypolicyviolation", (event) =>
  console.error(`CSP blocked ${event.violatedDirective}: ${event.blockedURI} ${event.sample}`))"""


@dataclass
class Watch:
    """Collects what a page complains about; what a test provokes on purpose it names in `expected`."""

    complaints: list[str] = field(default_factory=list)
    expected: list[str] = field(default_factory=list)

    def on(self, page: Page) -> None:
        """Watch a page."""
        page.on("console", self._console)
        page.on("pageerror", self._error)

    def unexpected(self) -> list[str]:
        """Return the complaints that no test asked for."""
        return [text for text in self.complaints if not any(part in text for part in self.expected)]

    def _console(self, message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            self.complaints.append(f"{message.type}: {message.text}")

    def _error(self, error: Error) -> None:
        self.complaints.append(f"uncaught: {error.message}")


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """One Chromium for all tests; each test has a context, hence a profile, of its own."""
    executable = chromium()
    if executable is None:
        missing("no Chromium: run scripts/ensure-chromium, or set CATALENS_CHROMIUM to its path")
    with sync_playwright() as playwright:
        running = launch(playwright, executable)
        yield running
        running.close()


@pytest.fixture(scope="session")
def shop(browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a standalone process that serves the demo catalogue."""
    with demo_shop(tmp_path_factory.mktemp("shop")) as url:
        yield url


@pytest.fixture
def watch() -> Iterator[Watch]:
    """Fail the test if a page complained."""
    watching = Watch()
    yield watching
    assert watching.unexpected() == []


@pytest.fixture
def context(browser: Browser, shop: str, request: pytest.FixtureRequest) -> Iterator[BrowserContext]:
    """A fresh profile on a desktop; `@pytest.mark.parametrize("context", [{…}], indirect=True)` changes it."""
    options: dict[str, object] = {"viewport": {"width": 1280, "height": 860}, "locale": "en-US"}
    options |= getattr(request, "param", {})
    fresh = browser.new_context(base_url=shop, **options)  # type: ignore[arg-type]  # keyword by keyword as documented
    fresh.set_default_timeout(20_000)
    fresh.add_init_script(_REPORT_VIOLATIONS)
    yield fresh
    fresh.close()


@pytest.fixture
def page(context: BrowserContext, watch: Watch) -> Page:
    """An empty page of that profile."""
    fresh = context.new_page()
    watch.on(fresh)
    return fresh
