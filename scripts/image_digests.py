"""Pins every image that Catalens is built from or runs beside, in Dockerfile and docker-compose.yml, to its digest.

    python scripts/image_digests.py      # make image-digests

The digest is what the registry answers now for the version that stands there; `docker buildx` asks. Where a
registry cannot be reached nothing is written.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parents[1]
FILES: Final = (ROOT / "Dockerfile", ROOT / "docker-compose.yml")
_IMAGE: Final = re.compile(
    r"^(\s*image: |FROM )([a-z0-9./_-]+:[\w.-]+)(?:@sha256:[0-9a-f]{64})?(?= AS \w+$|$)", re.MULTILINE
)
_DIGEST: Final = re.compile(r"sha256:[0-9a-f]{64}")


def foreign(text: str) -> list[str]:
    """Return the images named in `text` with their versions, those left out that are built here."""
    return [match[2] for match in _IMAGE.finditer(text) if not match[2].startswith("catalens-")]


def pinned(text: str, digests: Mapping[str, str]) -> str:
    """Return `text` with each image that `digests` knows pinned to it."""

    def pin(match: re.Match[str]) -> str:
        return f"{match[1]}{match[2]}@{digests[match[2]]}" if match[2] in digests else match[0]

    return _IMAGE.sub(pin, text)


def ask(image: str) -> str:
    """Return the digest that the registry has for `image`; ends the program where it does not answer."""
    command = ["docker", "buildx", "imagetools", "inspect", "--format", "{{.Manifest.Digest}}", image]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        sys.exit("image-digests needs docker with buildx")
    digest = done.stdout.strip()
    if done.returncode or not _DIGEST.fullmatch(digest):
        sys.exit(f"{image}: no digest, nothing was changed: {(done.stderr or done.stdout).strip()}")
    return digest


def main() -> None:
    """Ask for all, then write."""
    texts = {path: path.read_text(encoding="utf-8") for path in FILES}
    images = sorted({image for text in texts.values() for image in foreign(text)})
    digests = {image: ask(image) for image in images}
    for path, text in texts.items():
        path.write_text(pinned(text, digests), encoding="utf-8")
    for image, digest in digests.items():
        print(image, digest)


if __name__ == "__main__":
    main()
