"""The Open Clip Art Library as Debian packs it: public-domain drawings with titles and keywords."""

from __future__ import annotations

import hashlib
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

from words import fold

PACKAGE = "openclipart-svg"
SKIPPED = (
    "computer/", "geography/", "logos", "shapes/", "special/", "unsorted/duplicates", "decorations",
    "signs_and_symbols", "recreation/games/cards", "transportation/roadsigns", "transportation/aiga",
)  # fmt: skip
NOISE = re.compile(
    r"\b(clip ?arts?|svg|architetto|francesco|rollandin|nicu|buculei|icon|image|public domain|hash|unsorted|various|"
    r"aiga symbol signs|by|amp|apos|quot|\w*\d\w*|[a-z])\b"
)


@dataclass
class Clip:
    """One drawing: its title and its other keywords (English, as people typed them)."""

    key: str
    title: str
    tags: list[str]
    path: Path

    @property
    def split(self) -> str:
        """As for the emoji; by the words of the title, so that all the "red apple"s go together."""
        bucket = int(hashlib.sha256(self.key.encode()).hexdigest(), 16) % 100
        return "holdout" if bucket < 20 else "valid" if bucket < 30 else "train"


def load_clips(cache: Path) -> list[Clip]:
    """Every drawing with a usable title, without icon themes, flags, shapes and logos."""
    root = _unpack(cache)
    clips = []
    for path in sorted(root.rglob("*.svg")):
        folder = path.relative_to(root).parent.as_posix() + "/"
        if folder.startswith(SKIPPED) or path.stat().st_size > 400_000:
            continue
        clip = _read(path, folder)
        if clip is not None:
            clips.append(clip)
    return clips


def _unpack(cache: Path) -> Path:
    folder = cache / PACKAGE
    if not folder.exists():
        cache.mkdir(parents=True, exist_ok=True)
        subprocess.run(["apt-get", "download", PACKAGE], cwd=cache, check=True, capture_output=True)
        packed = next(iter(sorted(cache.glob(f"{PACKAGE}_*.deb"))))
        subprocess.run(["dpkg-deb", "-x", str(packed), str(folder)], check=True)
    return folder / "usr/share/openclipart/svg"


def _read(path: Path, folder: str) -> Clip | None:
    head = path.read_text(errors="replace")
    metadata = re.search(r"<metadata.*?</metadata>", head, re.DOTALL)
    if metadata is None:
        return None
    found = re.search(r"<dc:title>([^<]*)</dc:title>", metadata[0])
    title = _clean(found[1]) if found else ""
    if not title or len(title) > 50:
        title = _clean(path.stem.replace("_", " "))
    if not re.search(r"[a-z]{3}", title):
        return None
    tags = [_clean(tag) for tag in re.findall(r"<rdf:li>([^<]*)</rdf:li>", metadata[0])]
    places = [_clean(part) for part in folder.strip("/").split("/") if part != "unsorted"]
    key = " ".join(sorted(set(fold(title).split())))
    return Clip(key, title, list(dict.fromkeys(tag for tag in [*tags, *places] if tag and tag != title)), path)


def _clean(text: str) -> str:
    text = re.sub(r"[\W_]+", " ", text.lower())
    return re.sub(r"\s+", " ", NOISE.sub(" ", text)).strip()


def standard_svg(path: Path) -> bytes:
    """The drawing's SVG with a viewBox and no size of its own, so that it renders at any size."""
    source = path.read_text(errors="replace")
    found = re.search(r"<svg\b[^>]*>", source, re.DOTALL)
    if found is None:
        return b""
    tag = found[0]
    sizes = [re.search(rf'\s{side}\s*=\s*"([\d.]+)', tag) for side in ("width", "height")]
    plain = re.sub(r'\s(width|height)\s*=\s*"[^"]*"', "", tag)
    if "viewBox" not in tag and all(sizes):
        width, height = (size[1] for size in sizes if size)
        plain = f'{plain[:-1]} viewBox="0 0 {width} {height}">'
    return source.replace(tag, plain, 1).encode()
