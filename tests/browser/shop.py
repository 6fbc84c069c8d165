"""What the browser tests and the screenshots share: Chromium, and a standalone process with the demo catalogue."""

from __future__ import annotations

import base64
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import Browser, Page, Playwright
from tests.standalone import ROOT, Standalone

DEMO = ROOT / "demo"

# Nothing of this may phone home or depend on the machine's graphics.
_ARGUMENTS = (
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-gpu",
    "--disable-quic",
    "--disable-sync",
    "--no-first-run",
)

# Drops or pastes as the browser itself would: the page sees a DataTransfer with one file.
_TRANSFER = """([kind, data, name, type]) => {
  const bytes = Uint8Array.from(atob(data), (character) => character.charCodeAt(0));
  const transfer = new DataTransfer();
  transfer.items.add(new File([bytes], name, { type }));
  const init = { bubbles: true, cancelable: true, dataTransfer: transfer };
  if (kind === "paste") {
    document.body.dispatchEvent(new ClipboardEvent("paste", { ...init, clipboardData: transfer }));
    return;
  }
  const target = document.querySelector("main");
  for (const type of ["dragenter", "dragover", "drop"]) target.dispatchEvent(new DragEvent(type, init));
}"""


def chromium() -> str | None:
    """Return the path of a Chromium or Chrome, None if there is none."""
    names = (os.environ.get("CATALENS_CHROMIUM", ""), "chromium", "chromium-browser", "google-chrome")
    return next((found for name in names if name and (found := shutil.which(name))), None)


def launch(playwright: Playwright, executable: str) -> Browser:
    """Start a headless browser with a profile of its own."""
    # As root Chromium refuses to run in its sandbox.
    sandbox = () if os.geteuid() else ("--no-sandbox",)
    return playwright.chromium.launch(executable_path=executable, args=[*_ARGUMENTS, *sandbox])


@contextmanager
def demo_shop(folder: Path) -> Iterator[str]:
    """Serve the demo catalogue from an empty folder; yields the address once all of it is searchable.

    With CATALENS_BROWSER_URL set, use what runs there in place of a process of our own.
    """
    if running := os.environ.get("CATALENS_BROWSER_URL"):
        yield running.rstrip("/")
        return
    with Standalone(folder / "data") as server:
        subprocess.run(
            [sys.executable, "-m", "catalens_standalone.cli", "import", "--wait", str(DEMO / "catalog.jsonl")],
            check=True,
            cwd=folder,
            env={**os.environ, "CATALENS_URL": server.url, "CATALENS_DATA_DIR": str(folder / "data")},
            stdout=subprocess.DEVNULL,
        )
        yield server.url


def photo_of(product_id: str) -> bytes:
    """Return the demo catalogue's picture of a product."""
    return (DEMO / "images" / f"{product_id}.jpg").read_bytes()


def drop(page: Page, content: bytes, name: str = "photo.jpg", media_type: str = "image/jpeg") -> None:
    """Drop a file on the page."""
    page.evaluate(_TRANSFER, ["drop", base64.b64encode(content).decode(), name, media_type])


def paste(page: Page, content: bytes, name: str = "photo.jpg", media_type: str = "image/jpeg") -> None:
    """Paste a file into the page."""
    page.evaluate(_TRANSFER, ["paste", base64.b64encode(content).decode(), name, media_type])
