"""An evaluation as one HTML file that needs nothing else: tables, and the queries worth looking at with pictures."""

from __future__ import annotations

import asyncio
import base64
import io
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING, Any, Final

from PIL import Image

from catalens.errors import CatalensError
from catalens_standalone.cli_eval import PROXY, Evaluation, first_right, significance
from catalens_standalone.evaluating import MEASURES, most_changed, worst

if TYPE_CHECKING:
    from catalens.client import CatalensClient

_QUERIES: Final = 30
_SIDE: Final = 112
# A thumbnail never needs more; a result's picture may come from any host.
_MAX_PIXELS: Final = 64_000_000
_STYLE: Final = """
body{font:15px/1.45 system-ui,sans-serif;margin:2rem auto;max-width:72rem;padding:0 1rem;color:#1c1c1c;background:#fff}
table{border-collapse:collapse;margin:1rem 0}th,td{padding:.25rem .7rem;text-align:right;border-bottom:1px solid #ddd}
th:first-child,td:first-child,td:nth-child(2){text-align:left}small{color:#666}.note{background:#fff4d6;padding:.6rem}
.bad{background:#fde3e3;padding:.6rem}section{border-top:1px solid #ddd;padding:.8rem 0}
h3{margin:.2rem 0;font-size:1rem}
.row{display:flex;gap:.6rem;align-items:flex-start;margin:.4rem 0}.row>b{width:5.5rem;flex:none}
figure{margin:0;width:7rem;font-size:.75rem;overflow-wrap:anywhere}
img{width:7rem;height:7rem;object-fit:contain;background:#f3f3f3;display:block}
.right img{outline:3px solid #1a8f4c}.right figcaption{font-weight:600}.none{width:7rem;height:7rem;background:#f3f3f3}
"""


async def page(found: Evaluation, clients: Sequence[CatalensClient]) -> str:
    """Return the document; pictures are data URIs, and one that cannot be had is left out."""
    two = len(found.figures) == 2
    rows = most_changed(found.figures[0], found.figures[1], _QUERIES) if two else worst(found.figures[0], _QUERIES)
    sections = [await _section(found, clients, row) for row in rows]
    title = "The queries that changed most" if two else "The queries that are answered worst"
    return "\n".join(
        (
            '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Catalens: evaluation</title>',
            '<meta name="viewport" content="width=device-width"><meta http-equiv="Content-Security-Policy" '
            "content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">",
            f"<style>{_STYLE}</style></head><body><h1>Evaluation</h1>",
            "".join(
                f"<p><b>{letter}</b> <code>{escape(one.name)}</code> <small>{escape(one.url)}</small></p>"
                for letter, one in zip("AB", found.configurations, strict=False)
            ),
            f'<p class="note">{escape(PROXY)}</p>' if found.proxy else "",
            *_troubles(found),
            _table(found),
            "<p><small>Means over queries with 95 % bootstrap intervals; B-A with a two-sided paired randomisation "
            "test.</small></p>",
            f"<h2>{title}</h2>",
            *(sections or ["<p>None.</p>"]),
            "</body></html>",
        )
    )


def _troubles(found: Evaluation) -> list[str]:
    told = []
    for letter, answers in zip("AB", found.answers, strict=False):
        for rows, what in (
            (answers.refused, "were not answered and count as nothing found"),
            (answers.degraded, "were degraded"),
        ):
            if rows:
                first = escape(next(iter(rows.values())))
                told.append(f'<p class="bad">{letter}: {len(rows)} queries {what}: {first}</p>')
    return told


def _table(found: Evaluation) -> str:
    lines = []
    for group in found.groups:
        for letter, intervals in zip("AB", group.intervals, strict=False):
            name = f"{escape(group.name)}, {group.count}" if letter == "A" else ""
            cells = "".join(f"<td>{one.mean:.3f} <small>{one.low:.3f}-{one.high:.3f}</small></td>" for one in intervals)
            lines.append(f"<tr><td>{name}</td><td>{letter}</td>{cells}</tr>")
        if group.changes:
            cells = "".join(
                f"<td>{one.difference:+.3f} <small>{escape(significance(one))}</small></td>" for one in group.changes
            )
            lines.append(f"<tr><td></td><td>B-A</td>{cells}</tr>")
    heads = "".join(f"<th>{escape(one)}</th>" for one in ("queries", "", *MEASURES))
    return f"<table><tr>{heads}</tr>{''.join(lines)}</table>"


async def _section(found: Evaluation, clients: Sequence[CatalensClient], row: int) -> str:
    query = found.queries[row]
    asked = ""
    if query.image is not None and "://" not in query.image:
        try:
            asked = await asyncio.to_thread(_small, await asyncio.to_thread((found.folder / query.image).read_bytes))
        except (OSError, ValueError):
            asked = ""  # the query was refused for it, and the report says so
    head = f"<h3>{escape(query.shown)}</h3>" + (f'<img src="{asked}" alt="">' if asked else "")
    about = ", ".join(part for part in (query.language, query.kind) if part)
    lines = []
    for letter, client, answers, figures in zip("AB", clients, found.answers, found.figures, strict=False):
        results = await asyncio.gather(*(_result(client, hit, query.relevant) for hit in answers.shown[row]))
        ndcg = figures[row, MEASURES.index("nDCG@10")]
        first = first_right(answers.rankings[row], query)
        lines.append(
            f'<div class="row"><b>{letter}<br><small>first right: {first}<br>nDCG {ndcg:.3f}</small></b>'
            f"{''.join(results) or 'nothing found'}</div>"
        )
    return f"<section>{head}<small>{escape(about)}</small>{''.join(lines)}</section>"


async def _result(client: CatalensClient, hit: dict[str, Any], relevant: Any) -> str:
    picture = ""
    if hit.get("image"):
        try:
            async with asyncio.timeout(10):
                picture = await asyncio.to_thread(_small, await client.picture(str(hit["image"])))
        except (CatalensError, OSError, ValueError, TimeoutError):
            picture = ""  # a picture that cannot be shown takes nothing from the figures
    product_id = str(hit["product_id"])
    shown = f'<img src="{picture}" alt="">' if picture else '<div class="none"></div>'
    right = ' class="right"' if relevant.get(product_id) else ""
    name = escape(str(hit.get("name") or ""))
    return f"<figure{right}>{shown}<figcaption>{name}<br>{escape(product_id)}</figcaption></figure>"


def _small(picture: bytes) -> str:
    """Return a small JPEG of it as a data URI; raises OSError or ValueError when it is no picture."""
    with Image.open(io.BytesIO(picture)) as opened:
        if opened.width * opened.height > _MAX_PIXELS:
            raise ValueError("too many pixels for a thumbnail")
        opened.draft("RGB", (2 * _SIDE, 2 * _SIDE))
        image = opened.convert("RGB")
    image.thumbnail((_SIDE, _SIDE))
    out = io.BytesIO()
    image.save(out, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(out.getvalue()).decode()
