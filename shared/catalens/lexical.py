"""Words of products and queries as sparse vectors: BM25's term-frequency part here, its idf kept by the index.

Of the languages that the catalogue declares, without knowing which a text is in: a word is indexed as it is written
(case and accents folded) and by its Snowball stems in all of them, and a query spreads one word's weight over these
terms, so that it counts once. BM25 after Robertson & Zaragoza (2009), fields weighted in the term frequency as BM25F
does, average length fixed.
"""

from __future__ import annotations

import re
import threading
import unicodedata
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from itertools import pairwise
from typing import Final

import snowballstemmer  # type: ignore[import-untyped]  # it ships no types

from catalens.domain import DEFAULT_LANGUAGES, Language, Product, SparseVector

K1: Final = 1.2
B: Final = 0.5
"""Half the usual correction: a long description is more often detail than padding."""
AVERAGE_LENGTH: Final = 40.0
"""Words of a typical product. Fixed, because a moving average would change what is already stored."""

NAME, LABEL, ATTRIBUTE, DESCRIPTION = 3.0, 2.0, 1.5, 1.0
"""What one occurrence counts: in the name, in brand or category, in an attribute, in the description."""

EMBEDDED_DESCRIPTION: Final = 300
"""Characters of the description that the text tower sees: it truncates soon after."""

_EXACT_SHARE: Final = 0.3
"""Part of a query word's weight that only the very same spelling earns; the stems share the rest."""
_WHOLE_SHARE: Final = 0.5
"""Part of a compound's weight that the whole earns ("tshirt"); its parts share the rest."""
_MEANT_SHARE: Final = 0.6
"""What a word weighs that may have been meant, where the word that was written weighs 1."""

_APOSTROPHES: Final = str.maketrans(dict.fromkeys("’‘ʼ`´′", "'"))
_ELISION: Final = re.compile(r"\b(?:[cdjlmnst]|qu|jusqu|lorsqu|puisqu|quoiqu)'(?=\w)")
_POSSESSIVE: Final = re.compile(r"'s\b")
_WORD: Final = re.compile(r"\d+[.,]\d+(?!\w)|[^\W_]+(?:[-._/:+&'][^\W_]+)*")
_DECIMAL: Final = re.compile(r"\d+[.,]\d+")
_RUN: Final = re.compile(r"[^\W_]+")
_CHUNK: Final = re.compile(r"\S+")
_SEPARATOR: Final = re.compile(r"[-._/:+&']")
_LETTERS: Final = str.maketrans({"œ": "oe", "æ": "ae", "ø": "o", "đ": "d", "ł": "l", "ı": "i"})
# Words that say nothing; one that means something in another of the languages is not here (or, son, car, but, die).
_STOP: Final[Mapping[Language, str]] = {
    "en": "a an and are at by for from in is it my of on that the this to with your",
    "fr": "à au aux avec ce ces cet cette d de des du elle en est et il l la le les ma mes par pour que qui sur un une "
    "vos votre",
    "de": "das dem den der des ein eine einem einen einer eines für im ist mit oder und vom von zum zur",
    "es": "al con de del el en es la las los o para por que su sus un una unas unos y",
}
_SNOWBALL: Final[Mapping[Language, str]] = {"en": "english", "fr": "french", "de": "german", "es": "spanish"}
_UNIT: Final = re.compile(r"\d\s[^\W\d_]{2}(?![^\W_])")
"""Finds something in every text that has a number and a unit apart."""


@dataclass(frozen=True, slots=True)
class Written:
    """A word of a query as it was written, small and with its accents."""

    text: str
    chunk: str
    """What it stands in between two spaces: a product id, maybe."""
    ways: tuple[tuple[str, ...], ...]
    """How a product may have it, each way the words that it takes: whole, in parts, in one with a neighbour."""

    @property
    def spelt(self) -> bool:
        """True of a word, False of a code, a number or a letter."""
        return len(self.text) > 1 and not any(character.isdigit() for character in self.text)


class _Stemmers(threading.local):
    """A thread's own stemmers: they keep the word at hand in themselves."""

    def __init__(self) -> None:
        self.of = {language: snowballstemmer.stemmer(name) for language, name in _SNOWBALL.items()}


_stemmers = _Stemmers()


def document_vector(product: Product, languages: tuple[Language, ...] = DEFAULT_LANGUAGES) -> SparseVector:
    """Return the product's BM25 term weights without idf; indices ascending, weights positive.

    The product id is a term of its own, and so is every product code, whole. Another language adds terms of its own.
    """
    frequencies: defaultdict[str, float] = defaultdict(float)
    length = 0
    for text, weight in fields(product):
        # A brand, a shelf or a colour is many products'; names and descriptions are each their own.
        words, joined = (_cut if weight in (NAME, DESCRIPTION) else _cut_label)(text, languages)
        length += len(words) + len(joined)
        for word in words + joined:
            frequencies[word] += weight
            if not word.isalnum():
                length += len(_split(word)) - 1
    terms: defaultdict[int, float] = defaultdict(float)
    for word, frequency in frequencies.items():
        for term in _document_terms(word, languages):
            terms[term] += frequency
    terms[_identifier(product.product_id)] += NAME
    norm = K1 * (1 - B + B * length / AVERAGE_LENGTH)
    weights = {tf: tf * (K1 + 1) / (tf + norm) for tf in set(terms.values())}
    indices = sorted(terms)
    return SparseVector(tuple(indices), tuple([weights[terms[term]] for term in indices]))


def query_vector(
    text: str, languages: tuple[Language, ...] = DEFAULT_LANGUAGES, *, meant: Collection[str] = ()
) -> SparseVector:
    """Return the query's term weights: each word weighs 1, spread over its terms; empty if there is no word.

    Words that say nothing ("the", "de") are left out unless there is no other. `meant` are words, folded, that may have
    been meant by some of the text: they weigh less.
    """
    words = _words(text, languages)
    telling = [(word, share) for word, share in words if word not in stop_words(languages)]
    terms: defaultdict[int, float] = defaultdict(float)
    for word, share in [*(telling or words), *((word, _MEANT_SHARE) for word in meant)]:
        for term, part in _terms(word, languages):
            terms[term] += share * part
    for chunk in text.split():
        terms[_identifier(chunk)] += 1.0
    indices = sorted(terms)
    return SparseVector(tuple(indices), tuple([terms[term] for term in indices]))


def query_words(text: str, languages: tuple[Language, ...] = DEFAULT_LANGUAGES) -> list[tuple[SparseVector, float]]:
    """Return the words that `query_vector` adds up, each on its own, and how much it counts; product ids are none."""
    words = _words(text, languages)
    telling = [(word, share) for word, share in words if word not in stop_words(languages)] or words
    found = [(sorted(_terms(word, languages)), share) for word, share in dict(telling).items()]
    return [
        (SparseVector(tuple(term for term, _ in terms), tuple(share * part for _, part in terms)), share)
        for terms, share in found
    ]


def text_for_embedding(product: Product) -> str:
    """Return what the text tower sees: name, brand unless the name has it, category, start of the description."""
    name = _plain(product.name)
    brand = _plain(product.brand or "")
    if brand.casefold() in name.casefold():
        brand = ""
    category = _plain(", ".join(part.strip() for part in (product.category or "").split(">")))
    description = _plain(product.description)
    if len(description) > EMBEDDED_DESCRIPTION:
        description = description[: EMBEDDED_DESCRIPTION + 1].rpartition(" ")[0] or description[:EMBEDDED_DESCRIPTION]
    return ". ".join(
        part for part in (", ".join(part for part in (name, brand, category) if part), description) if part
    )


def fields(product: Product) -> Iterator[tuple[str, float]]:
    """Return each text of the product that is searched, and what one occurrence in it counts; the description last."""
    yield product.name, NAME
    yield product.brand or "", LABEL
    yield product.category or "", LABEL
    for key, value in product.attributes.items():
        if isinstance(value, bool):
            # A flag is told by its name: "waterproof", never "true".
            yield (key if value else ""), ATTRIBUTE
        elif isinstance(value, list):
            yield " ; ".join(value), ATTRIBUTE
        else:
            yield str(value), ATTRIBUTE
    yield product.description, DESCRIPTION


def words_of(text: str, languages: tuple[Language, ...]) -> set[str]:
    """Return the words of a text, in small letters with their accents; compounds whole and in parts."""
    return {word for word, _ in _words(text, languages)}


def written(text: str, languages: tuple[Language, ...]) -> list[Written]:
    """Return the words of a text that say something, one for each that was written, however it is looked up."""
    text, stop = _plainly(text), stop_words(languages)
    joined: defaultdict[int, list[str]] = defaultdict(list)
    for before, after in _neighbours(text, stop):
        for word in (before, after):
            joined[word.start()].append(before[0] + after[0])
    found = []
    for chunk in _CHUNK.finditer(text):
        for word in _WORD.finditer(text, *chunk.span()):
            if word[0] not in stop:
                whole, *parts = [part for part, _ in _split(word[0])]
                ways = [(whole,), tuple(part for part in parts if part not in stop)]
                ways += [(both,) for both in joined[word.start()]]
                found.append(Written(word[0], chunk[0], tuple(way for way in ways if way)))
    return found


def vector_of_any(words: Iterable[str], product_id: str, languages: tuple[Language, ...]) -> SparseVector:
    """Return what finds products that have one of these words, and the product with that id."""
    terms = sorted({_identifier(product_id), *(term for word in words for term, _ in _terms(word, languages))})
    return SparseVector(tuple(terms), (1.0,) * len(terms))


def runs(text: str) -> list[str]:
    """Return the runs of letters and digits in order, folded, without elisions ("l'été" is ete)."""
    return [fold(run) for run in _RUN.findall(_plainly(text))]


@lru_cache(maxsize=16)
def stop_words(languages: tuple[Language, ...]) -> frozenset[str]:
    """Return the words that say nothing in these languages."""
    return frozenset(word for language in languages for word in _STOP[language].split())


def _words(text: str, languages: tuple[Language, ...]) -> list[tuple[str, float]]:
    """Return the words in order, each with its share of one word's weight.

    A compound gives the whole and its parts ("t-shirt": tshirt, t, shirt); a single letter, or a unit after a number,
    is also joined with its neighbour ("t shirt": tshirt; "500 ml": 500ml), so that all spellings meet.
    """
    found, joined = _cut(text, languages)
    return [*(part for word in found for part in _split(word)), *((word, _WHOLE_SHARE) for word in joined)]


def _cut(text: str, languages: tuple[Language, ...]) -> tuple[list[str], list[str]]:
    """Return the words as they stand, compounds whole, and the neighbours that are also one word."""
    text = _plainly(text)
    words = _WORD.findall(text)
    stop = stop_words(languages)
    lone = 1 in map(len, words) and any(len(word) == 1 and word not in stop for word in words)
    if not lone and _UNIT.search(text) is None:
        return words, []  # most texts; to look at neighbours costs four times as much
    return words, [before[0] + after[0] for before, after in _neighbours(text, stop)]


def _neighbours(text: str, stop: Collection[str]) -> Iterator[tuple[re.Match[str], re.Match[str]]]:
    """Return the words of a plain text that are also one word with the next."""
    for before, after in pairwise(_WORD.finditer(text)):
        apart = after.start() - before.end() == 1 and text[before.end()].isspace()
        if apart and _joins(before[0], after[0], stop):
            yield before, after


def _plainly(text: str) -> str:
    """Return the text in small letters, every letter written in one way, without elisions and possessives."""
    text = unicodedata.normalize("NFKC", text).casefold().translate(_APOSTROPHES)
    return _POSSESSIVE.sub("", _ELISION.sub("", text)) if "'" in text else text


# The words that come again and again; article numbers come once, and a larger memory would fill up with those.
_REMEMBERED: Final = 20_000
_cut_label = lru_cache(maxsize=_REMEMBERED)(_cut)


@lru_cache(maxsize=_REMEMBERED)
def _split(word: str) -> tuple[tuple[str, float], ...]:
    if word.isalnum():
        return ((word, 1.0),)
    if _DECIMAL.fullmatch(word):
        return ((word.replace(",", "."), 1.0),)
    parts = [part for part in _SEPARATOR.split(word) if part]
    whole = word.replace("-", "").replace("'", "")
    return ((whole, _WHOLE_SHARE), *((part, (1 - _WHOLE_SHARE) / len(parts)) for part in parts))


def _joins(before: str, after: str, stop: Collection[str]) -> bool:
    if before in stop or after in stop or not (before.isalnum() and after.isalnum()):
        return False
    return 1 in (len(before), len(after)) or (before.isdecimal() and len(after) == 2 and after.isalpha())


@lru_cache(maxsize=_REMEMBERED)
def _document_terms(word: str, languages: tuple[Language, ...]) -> tuple[int, ...]:
    """Return the term ids of a word and its parts, one as often as it occurs among them."""
    return tuple(term for part, _ in _split(word) for term, _ in _terms(part, languages))


@lru_cache(maxsize=_REMEMBERED)
def _terms(word: str, languages: tuple[Language, ...]) -> tuple[tuple[int, float], ...]:
    """Return the word's term ids, each with its share of the word's weight in a query; the shares sum to 1."""
    exact = _term("=", fold(word))
    if any(character.isdigit() for character in word):  # a number or a code: exact or not at all
        return ((exact, 1.0),)
    found = stems(word, languages)
    share = (1 - _EXACT_SHARE) / len(found)
    return ((exact, _EXACT_SHARE), *((_term("~", stem), share) for stem in sorted(found)))


@lru_cache(maxsize=_REMEMBERED)
def stems(word: str, languages: tuple[Language, ...]) -> frozenset[str]:
    """Return the stems of a word in these languages, folded."""
    folded = fold(word)
    found = {_stemmers.of[language].stemWord(folded) for language in languages}
    # Folding before and after: "brodée", "brodé" and "brodee" have a French stem in common. English has no accents.
    accented = {fold(_stemmers.of[language].stemWord(word)) for language in languages if language != "en"}
    return frozenset(found | accented)


def fold(word: str) -> str:
    """Return a word in small letters without its accents."""
    if word.isascii():
        return word
    decomposed = unicodedata.normalize("NFKD", word.translate(_LETTERS))
    return "".join(character for character in decomposed if not "\u0300" <= character <= "\u036f")


def _identifier(text: str) -> int:
    return _term("#", text.casefold())


def _term(kind: str, text: str) -> int:
    """Return a stable unsigned 32-bit id: part of what is stored, so the hash never changes."""
    return int.from_bytes(blake2b((kind + text).encode(errors="surrogatepass"), digest_size=4).digest(), "little")


def _plain(text: str) -> str:
    if not text.isprintable():
        text = "".join(character if character.isprintable() else " " for character in text)
    return " ".join(text.split())
