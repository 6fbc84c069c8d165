"""Completes what is being typed: words, brands and categories from the vocabulary, product names from the index."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Final, Literal, TypeAlias

from catalens.domain import Filter, Leg, Product
from catalens.lexical import ATTRIBUTE, fields, fold, query_vector, runs, stems, stop_words, words_of
from catalens.ports import VectorIndex
from catalens_query.vocabularies import Vocabularies
from catalens_query.vocabulary import Vocabulary

Kind: TypeAlias = Literal["words", "brand", "category", "product"]

_ENDINGS: Final = 10
"""Ways in which the last word may go on that are looked up."""
_PRODUCTS: Final = 50
"""Products that are looked at."""
_ORDER: Final[dict[Kind, int]] = {"category": 0, "brand": 1, "words": 2, "product": 3}
"""Which of two equal texts is kept."""


@dataclass(frozen=True, slots=True)
class Suggestion:
    """A text that goes on as what was typed."""

    text: str
    kind: Kind
    count: int | None = None
    """How many products have it; None for a product itself, and for words that were put together."""
    product_id: str | None = None


@dataclass(frozen=True, slots=True)
class Typed:
    """What was typed, as it is looked up: words of the catalogue, the last of them unfinished. All folded."""

    before: tuple[frozenset[str], ...]
    """Of each finished word what it may be: itself, or its corrections if the catalogue does not know it."""
    first: str
    """The finished words, the likeliest of each, as the catalogue writes them."""
    last: str
    endings: tuple[str, ...]
    """Words that the last one may become, the most frequent first."""
    typos: int
    """How many words were taken as misspelt."""

    def fits(self, words: Collection[str], vocabulary: Vocabulary) -> bool:
        """True if every word that was typed is among `words`, or its inflection; the last one may go on."""
        return all(_says(one, words, vocabulary) for one in self.before) and self._ends(words, vocabulary)

    def touches(self, words: Collection[str], vocabulary: Vocabulary) -> bool:
        """True if some word that was typed is among `words`."""
        return any(_says(one, words, vocabulary) for one in self.before) or self._ends(words, vocabulary)

    def _ends(self, words: Collection[str], vocabulary: Vocabulary) -> bool:
        others = set(words).difference(*self.before)
        begun = any(word.startswith(self.last) for word in others)
        return begun or _says({self.last, *self.endings}, others, vocabulary)


class Suggester:
    """Suggests from one index."""

    def __init__(self, index: VectorIndex, vocabularies: Vocabularies) -> None:
        self._index = index
        self._vocabularies = vocabularies

    async def suggest(self, tenant: str, text: str, limit: int) -> list[Suggestion] | None:
        """Return completions of `text`, best first; None while the tenant's words have not been read.

        Raises Transient (index away).
        """
        vocabulary = self._vocabularies.of(tenant)
        if vocabulary is None:
            return None
        typed = await asyncio.to_thread(understand, text, vocabulary)
        if typed is None:
            return []
        wanted = [*(word for one in typed.before for word in one), typed.last, *typed.endings]
        vector = query_vector(" ".join(wanted), vocabulary.languages)
        (hits,) = await self._index.search(tenant, [Leg("lexical", vector, _PRODUCTS)], Filter())
        stored = await self._index.get(tenant, [hit.product_id for hit in hits]) if hits else {}
        products = [stored[hit.product_id].product for hit in hits if hit.product_id in stored]
        return await asyncio.to_thread(complete, typed, vocabulary, products, limit)


def understand(text: str, vocabulary: Vocabulary) -> Typed | None:
    """Return how `text` is looked up; None if there is nothing to look up. One word of it may be misspelt."""
    silent = {fold(word) for word in stop_words(vocabulary.languages)}
    found = runs(text)
    if not found:
        return None
    *finished, last = found
    before: list[frozenset[str]] = []
    first: list[str] = []
    typos = 0
    for word in finished:
        if word in silent:
            first.append(word)
            continue
        corrections = () if typos else vocabulary.corrections(word)
        typos += bool(corrections)
        before.append(frozenset(corrections or (word,)))
        first.append(vocabulary.spelling(corrections[0] if corrections else word))
    endings = [word for word in vocabulary.completions(last, _ENDINGS) if not any(word in one for one in before)]
    if not endings and not typos and not vocabulary.knows(last):
        endings = vocabulary.near_completions(last, _ENDINGS)
        typos += bool(endings)
    return Typed(tuple(before), " ".join(first), last, tuple(endings), typos)


def complete(typed: Typed, vocabulary: Vocabulary, products: Sequence[Product], limit: int) -> list[Suggestion]:
    """Return at most `limit` suggestions: the texts that begin as was typed first, then the more frequent.

    `products` are those that the index found, best first. Half of the places are kept for the other kinds, where there
    are others.
    """
    fitting: list[Product] = []
    together: set[str] = set()
    for product in products:
        own = _own_words(product, typed, vocabulary)
        words = own | set(runs(product.brand or ""))
        if typed.fits(words, vocabulary) and typed.touches(own, vocabulary):
            fitting.append(product)
            together |= words
    candidates = [
        *_labels(typed, vocabulary),
        *_phrases(typed, vocabulary, together),
        *(Suggestion(product.name, "product", product_id=product.product_id) for product in fitting),
    ]
    best: dict[str, Suggestion] = {}
    for one in sorted(candidates, key=lambda one: _ORDER[one.kind]):
        best.setdefault(" ".join(runs(one.text)), one)
    begun = " ".join(filter(None, (fold(typed.first), typed.last)))
    beginnings = (begun, *(" ".join(filter(None, (fold(typed.first), ending))) for ending in typed.endings))
    ranked = [
        one
        for _, one in sorted(best.items(), key=lambda item: (not item[0].startswith(beginnings), -(item[1].count or 0)))
    ]
    return _mixed(ranked, limit)


def _labels(typed: Typed, vocabulary: Vocabulary) -> Iterable[Suggestion]:
    for label in vocabulary.labels([typed.last, *typed.endings]):
        if typed.fits(label.words, vocabulary):
            yield Suggestion(label.text, label.kind, label.count)


def _phrases(typed: Typed, vocabulary: Vocabulary, together: Collection[str]) -> Iterable[Suggestion]:
    """Return the typed words with the last one finished: of several words only what is `together` with the others."""
    for ending in typed.endings:
        spelling = vocabulary.spelling(ending)
        if not typed.before:
            yield Suggestion(" ".join(filter(None, (typed.first, spelling))), "words", vocabulary.count(ending))
        elif ending in together:
            yield Suggestion(f"{typed.first} {spelling}", "words")


def _mixed(ranked: Sequence[Suggestion], limit: int) -> list[Suggestion]:
    """Return the first `limit`, of no kind more than half as long as there are others, in the same order."""
    share = -(-limit // 2)
    taken: dict[Kind, int] = dict.fromkeys(_ORDER, 0)
    chosen: list[int] = []
    for number, one in enumerate(ranked):
        if taken[one.kind] < share:
            taken[one.kind] += 1
            chosen.append(number)
    rest = [number for number in range(len(ranked)) if number not in set(chosen)]
    return [ranked[number] for number in sorted([*chosen, *rest][:limit])]


def _says(any_of: Collection[str], words: Collection[str], vocabulary: Vocabulary) -> bool:
    if not set(any_of).isdisjoint(words):
        return True
    wanted = frozenset().union(*(stems(word, vocabulary.languages) for word in any_of))
    return any(wanted & stems(word, vocabulary.languages) for word in words)


def _own_words(product: Product, typed: Typed, vocabulary: Vocabulary) -> frozenset[str]:
    """Return the folded words of the product's name, and of its codes (what has digits in its id and attributes) those
    that were typed: the beginning of a code says nothing."""
    texts = (product.product_id, *(text for text, weight in fields(product) if weight == ATTRIBUTE))
    codes = [chunk for text in texts for chunk in text.split() if any(character.isdigit() for character in chunk)]
    name, coded = (
        {fold(word) for text in some for word in words_of(text, vocabulary.languages)}
        for some in ([product.name], codes)
    )
    return frozenset(name | coded & {typed.last, *chain.from_iterable(typed.before)})
