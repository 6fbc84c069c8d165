"""One way of running the model, timed in a process of its own: `python -m catalens_standalone.trial FOLDER SECONDS`.

Settings come from the environment, as in any process; one line of JSON goes to stdout.
"""

from __future__ import annotations

import time

_BEGUN = time.perf_counter()  # before anything is imported: the imports are part of the start

import asyncio  # noqa: E402  # after the clock
import itertools  # noqa: E402  # after the clock
import json  # noqa: E402  # after the clock
import statistics  # noqa: E402  # after the clock
import sys  # noqa: E402  # after the clock
from collections.abc import Awaitable, Callable, Iterator, Sequence  # noqa: E402  # after the clock
from pathlib import Path  # noqa: E402  # after the clock
from typing import Final  # noqa: E402  # after the clock

from catalens.encoders import cores, open_encoder  # noqa: E402  # after the clock
from catalens.errors import CatalensError  # noqa: E402  # after the clock
from catalens.ports import Encoder  # noqa: E402  # after the clock
from catalens.settings import EncoderSettings, load_settings  # noqa: E402  # after the clock
from catalens.telemetry import Metrics, configure_logging  # noqa: E402  # after the clock

_SINGLE_PICTURES: Final = 15
_SINGLE_TEXTS: Final = 40
_COLOURS: Final = ("red", "blue", "black", "white", "green", "grey", "brown", "beige")
_THINGS: Final = ("dress", "running shoes", "leather sofa", "coffee mug", "table lamp")


async def run(pictures: Sequence[bytes], seconds: float) -> dict[str, float | None]:
    """Return what `Figures` of tuning.py holds: rates, medians, memory and the time to the first vector."""
    settings = load_settings()
    configure_logging(settings.model_copy(update={"log_level": "error"}))
    encoder_settings = settings.encoder
    async with open_encoder(settings, Metrics()) as encoder:
        first = texts = None
        if encoder_settings.towers != "image":
            await encoder.embed_text("a first text")
        if encoder_settings.towers != "text":
            await encoder.embed_image(pictures[0])
        start = time.perf_counter() - _BEGUN
        if encoder_settings.towers != "text":
            first = await _median(encoder.embed_image, itertools.islice(_endless(pictures), _SINGLE_PICTURES))
        if encoder_settings.towers != "image":
            words = [f"{colour} {thing}" for colour in _COLOURS for thing in _THINGS]
            texts = await _median(encoder.embed_text, iter(words[:_SINGLE_TEXTS]))
        rate = None
        if encoder_settings.towers != "text":
            rate = await _bulk(encoder, pictures, encoder_settings, seconds)
    return {
        "pictures_per_second": rate,
        "picture_ms": first,
        "text_ms": texts,
        "memory_mib": _memory(),
        "start_seconds": start,
    }


async def _bulk(encoder: Encoder, pictures: Sequence[bytes], settings: EncoderSettings, seconds: float) -> float:
    """Return bulk pictures a second, with as many callers as keep every lane busy, once all of them are."""
    callers = 2 * (settings.lanes or cores()) * settings.max_batch
    feed = _endless(pictures)
    done = 0
    loop = asyncio.get_running_loop()
    begun: float | None = None
    end = float("inf")

    async def caller() -> None:
        nonlocal done, begun, end
        while loop.time() < end:
            await encoder.embed_image(next(feed), bulk=True)
            done += 1
            if begun is None and done >= callers:
                begun, done = loop.time(), 0
                end = begun + seconds

    await asyncio.gather(*(caller() for _ in range(callers)))
    return done / (loop.time() - begun) if begun else 0.0


def _endless(pictures: Sequence[bytes]) -> Iterator[bytes]:
    """Yield the pictures over and over, never the same bytes twice: equal ones in one batch are encoded once."""
    yield from pictures
    for turn in itertools.count(1):
        for picture in pictures:
            yield picture + turn.to_bytes(4, "big")  # decoders stop at the picture's own end


async def _median(embed: Callable[..., Awaitable[object]], items: Iterator[bytes] | Iterator[str]) -> float:
    """Return the median milliseconds of one call, each alone."""
    taken = []
    for item in items:
        started = time.perf_counter()
        await embed(item)
        taken.append((time.perf_counter() - started) * 1000)
    return statistics.median(taken)


def _memory() -> float:
    """Return the most memory that this process held, in MiB."""
    if sys.platform == "win32":
        return 0.0
    import resource  # noqa: PLC0415  # not on Windows

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most / (1 << 20 if sys.platform == "darwin" else 1 << 10)


def main() -> None:
    """Print the figures, or what hinders, as JSON."""
    folder, seconds = Path(sys.argv[1]), float(sys.argv[2])
    pictures = [path.read_bytes() for path in sorted(folder.iterdir())]
    try:
        answer: dict[str, object] = dict(asyncio.run(run(pictures, seconds)))
    except CatalensError as error:
        answer = {"error": str(error)}
    sys.stdout.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main()
