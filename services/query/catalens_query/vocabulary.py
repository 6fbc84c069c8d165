"""The words of one catalogue: which of them a misspelt query may have meant, and how a word being typed may go on.

Pure: no clock, no I/O. An edit is a letter left out, put in, exchanged, or swapped with its neighbour.
"""

from __future__ import annotations

import math
import re
import unicodedata
from bisect import bisect_left
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, islice
from typing import TYPE_CHECKING, Final, Literal, TypeAlias

import numpy as np

from catalens.domain import Language, Product, category_prefixes
from catalens.lexical import DESCRIPTION, Written, fields, fold, runs, stems, stop_words, words_of, written

if TYPE_CHECKING:
    from numpy.typing import NDArray

MOST_WORDS: Final = 100_000
"""Different words that are kept, the most frequent; some 15 MB."""
MOST_LABELS: Final = 20_000
"""Brands and categories that are kept, the most frequent."""
LONGEST: Final = 24
"""Letters of the longest word that is kept."""
SHORTEST: Final = 4
"""Letters of the shortest word that is corrected: among shorter ones nearly everything is an edit from something."""
_TWO_EDITS: Final = 8
"""Letters of a word in which two edits are believed."""
_CORRECTIONS: Final = 2
"""Corrections of one word at most, the most frequent."""
MOST_READ: Final = 48
"""Words of a query that are looked up, the first; each may cost a millisecond, and what is pasted has thousands."""
_MOST_COMPARED: Final = 600_000
"""Pairs of letters that are compared for one word: of nine letters with 6,000 others, the most frequent. Among 100,000
words of a language hardly ever more have enough of its letters; where a catalogue is filled with anagrams all have."""
_FAMILY: Final = 32
"""Words that begin with a stem which are asked whether it is theirs."""

LabelKind: TypeAlias = Literal["brand", "category"]
_LETTERS: Final = re.compile(r"[^\W\d_]+")
_CHUNK: Final = re.compile(r"\S+")


@dataclass(frozen=True, slots=True)
class Label:
    """A brand, or a category with the path to it, and how many products have it."""

    kind: LabelKind
    text: str
    count: int
    words: frozenset[str]
    """Folded; of a category those of its last part, so that "sport" isn't everything below Sport."""


@dataclass(frozen=True, slots=True)
class Reading:
    """A text as it was read where words of it seemed misspelt."""

    text: str
    """With the likeliest correction of each."""
    meant: tuple[str, ...]
    """Every correction of every misspelt word, folded."""


class Tally:
    """Counts, product by product, what a Vocabulary is made of, in bounded memory."""

    def __init__(self, languages: tuple[Language, ...], most_words: int = MOST_WORDS) -> None:
        self._languages = languages
        self._most = most_words
        self._words: Counter[str] = Counter()
        self._names: Counter[str] = Counter()
        self._labels: Counter[tuple[LabelKind, str]] = Counter()
        self.products = 0

    def add(self, products: Iterable[Product]) -> None:
        """Count these products; each word, brand and category once a product."""
        for product in products:
            self.products += 1
            texts = [(weight, words_of(text, self._languages)) for text, weight in fields(product) if text]
            self._words.update({word for _, found in texts for word in found if _is_word(word)})
            self._names.update(
                {word for weight, found in texts if weight != DESCRIPTION for word in found if _is_word(word)}
            )
            if product.brand:
                self._labels["brand", product.brand] += 1
            self._labels.update(("category", path) for path in category_prefixes(product.category))
            for counter, most in ((self._words, self._most), (self._names, self._most), (self._labels, MOST_LABELS)):
                _keep(counter, most)

    def vocabulary(self) -> Vocabulary:
        """Return what was counted."""
        counts: Counter[str] = Counter()
        names: Counter[str] = Counter()
        spellings: dict[str, str] = {}
        silent = {fold(word) for word in stop_words(self._languages)}
        for word, count in self._words.most_common(self._most):
            folded = fold(word)
            if folded not in silent:
                counts[folded] += count
                names[folded] += self._names[word]
                spellings.setdefault(folded, word)
        labels = [Label(kind, text, count, _label_words(kind, text)) for (kind, text), count in self._labels.items()]
        return Vocabulary(counts, names, spellings, labels, self._languages, self.products)


class Vocabulary:
    """The words of a catalogue and its brands and categories, with how many products have each. Never changes."""

    def __init__(
        self,
        counts: Counter[str],
        names: Counter[str],
        spellings: dict[str, str],
        labels: Sequence[Label],
        languages: tuple[Language, ...],
        products: int,
    ) -> None:
        self.languages = languages
        self.products = products
        self._words = sorted(counts)
        self._counts = np.array([counts[word] for word in self._words], np.int32)
        self._names = np.array([names[word] for word in self._words], np.int32)
        self._spellings = {folded: word for folded, word in spellings.items() if folded != word}
        self._lengths = np.array([len(word) for word in self._words], np.int16)
        self._letters = np.array([_letters(word) for word in self._words], np.uint64)
        self._labels = labels
        self._label_words = sorted((word, number) for number, label in enumerate(labels) for word in label.words)

    def __len__(self) -> int:
        return len(self._words)

    def __contains__(self, word: str) -> bool:
        at = bisect_left(self._words, word)
        return at < len(self._words) and self._words[at] == word

    def knows(self, word: str) -> bool:
        """True if the catalogue has the word (folded), or one of the same stem."""
        return self._spread(word) > 0

    def spreads(self, text: str) -> dict[Written, int]:
        """Return for each written word of `text` that says something how many products have it; 0: none.

        By its stem at least, and in whichever way most products have it; only of the first, which take `MOST_READ`
        look-ups together. Codes, numbers and letters are in no vocabulary, nor is what is newer than the reading.
        """
        words = written(text, self.languages)
        looked_up = accumulate(sum(map(len, word.ways)) for word in words)
        return {
            word: max(min(self._spread(fold(one)) for one in way) for way in word.ways)
            for word, so_far in zip(words, looked_up, strict=True)
            if so_far <= MOST_READ
        }

    def lacks(self, word: Written) -> list[str]:
        """Return what no product had at the reading, of all that the word may be looked up as."""
        return [one for way in word.ways for one in way if not self._spread(fold(one))]

    def share_known(self, spreads: Mapping[Written, int]) -> float:
        """Return which share of what these words say the catalogue has words for; 1 where it has none of them.

        A word says the more the fewer products have it, as in BM25. A code or a number that nobody has is left out: the
        vectors know nothing of it either, so it is no reason to believe them more.
        """
        known = sum(self._says(spread) for spread in spreads.values() if spread)
        unknown = sum(self._says(0) for word, spread in spreads.items() if not spread and word.spelt)
        return known / (known + unknown) if known else 1.0

    def covers(self, text: str) -> bool:
        """True if no word of `text` takes its stem to be known or unknown: then it is read in no time."""
        words = (one for word in written(text, self.languages) for way in word.ways for one in way)
        return all(fold(one) in self or not _is_letters(one) for one in words)

    def count(self, word: str) -> int:
        """Return in how many products the word is, descriptions aside."""
        return int(self._names[bisect_left(self._words, word)]) if word in self else 0

    def spelling(self, word: str) -> str:
        """Return a folded word as the catalogue mostly writes it, in small letters."""
        return self._spellings.get(word, word)

    def corrections(self, word: str) -> tuple[str, ...]:
        """Return what an unknown word may have meant, the likeliest first; nothing for one that is known or short.

        One edit, and two where one finds nothing for a long word; of words with one stem only the most frequent.
        """
        if not SHORTEST <= len(word) <= LONGEST or self.knows(word):
            return ()
        for edits in (1, 2) if len(word) >= _TWO_EDITS else (1,):
            near = self._near(word, edits)
            if near.size:
                return tuple(self._apart(near, _CORRECTIONS))
        return ()

    def completions(self, beginning: str, limit: int) -> list[str]:
        """Return the words that begin so, the most frequent first; of those with one stem only the most frequent.

        Words that are in descriptions alone complete nothing.
        """
        first, last = bisect_left(self._words, beginning), bisect_left(self._words, beginning + "\U0010ffff")
        return self._named(np.arange(first, last), limit)

    def near_completions(self, beginning: str, limit: int) -> list[str]:
        """Return the words of which some beginning is one edit from this one, as completions does; none for a short."""
        if not SHORTEST <= len(beginning) <= LONGEST:
            return []
        lacking = np.bitwise_count(np.uint64(_letters(beginning)) & ~self._letters)
        (rough,) = np.nonzero((lacking <= 1) & (self._lengths >= len(beginning) - 1) & (self._names > 0))
        table = _edits(beginning, [self._words[at] for at in rough], len(beginning) + 1)
        close = rough[table.min(axis=0) <= 1]
        return self._named(close, limit)

    def labels(self, beginnings: Sequence[str]) -> list[Label]:
        """Return the brands and categories with a word that begins in one of these ways."""
        found: set[int] = set()
        for beginning in beginnings:
            at = bisect_left(self._label_words, (beginning, -1))
            while at < len(self._label_words) and self._label_words[at][0].startswith(beginning):
                found.add(self._label_words[at][1])
                at += 1
        return [self._labels[number] for number in sorted(found)]

    def _spread(self, word: str) -> int:
        """Return how many products have the word or, if none, the most frequent of the same stem; 0 for an unknown."""
        if not _is_letters(word):  # never kept, and stems cost more than to look
            return 0
        at = bisect_left(self._words, word)
        if at < len(self._words) and self._words[at] == word:
            return int(self._counts[at])
        wanted = stems(word, self.languages)
        family = (at for stem in wanted for at in self._beginning(stem))
        return max(
            (int(self._counts[at]) for at in family if wanted & stems(self._words[at], self.languages)), default=0
        )

    def _says(self, spread: int) -> float:
        return math.log1p((max(self.products, spread) - spread + 0.5) / (spread + 0.5))

    def _beginning(self, stem: str) -> list[int]:
        at = bisect_left(self._words, stem)
        return [at + n for n, word in enumerate(self._words[at : at + _FAMILY]) if word.startswith(stem)]

    def _near(self, word: str, edits: int) -> NDArray[np.intp]:
        """Return where the words are within so many edits, nearer ones and then more frequent ones first."""
        # An edit changes the length by one and two of the letters at most: few words are left to be compared.
        changed = np.bitwise_count(np.uint64(_letters(word)) ^ self._letters)
        (rough,) = np.nonzero((np.abs(self._lengths - len(word)) <= edits) & (changed <= 2 * edits))
        most = _MOST_COMPARED // (len(word) * (len(word) + edits))
        if len(rough) > most:
            rough = rough[np.argpartition(-self._counts[rough], most)[:most]]
        table = _edits(word, [self._words[at] for at in rough], len(word) + edits)
        distances = table[self._lengths[rough], np.arange(len(rough))]
        order = np.lexsort((rough, -self._counts[rough], distances))
        return rough[order[distances[order] <= edits]]

    def _named(self, places: NDArray[np.intp], limit: int) -> list[str]:
        """Return the words there that are in more than descriptions, as completions does."""
        order = places[np.argsort(-self._names[places], kind="stable")]
        return self._apart(order[self._names[order] > 0], limit)

    def _apart(self, order: NDArray[np.intp], limit: int) -> list[str]:
        """Return the first words in that order that have no stem in common."""
        found: list[str] = []
        seen: set[str] = set()
        for at in order:
            if len(found) == limit:
                break
            word = self._words[at]
            family = stems(word, self.languages)
            if not family & seen:
                found.append(word)
            seen |= family
        return found


def read(text: str, vocabulary: Vocabulary, most: int = MOST_READ) -> Reading | None:
    """Return how to read a text with words that the catalogue does not know; None if it stands as it is.

    Only words of letters, never a part of something with digits, and the first `most` of them: the others stand as they
    are. Where more words are unknown than known it may be another language: then one slip is believed, in a word that
    is not of the shortest; of more, nothing is corrected.
    """
    text = unicodedata.normalize("NFKC", text)
    telling = list(islice(_telling(text, stop_words(vocabulary.languages)), most))
    unknown = sorted(word for word in telling if not vocabulary.knows(word))
    foreign = len(unknown) > max(1, len(telling) - len(unknown))
    found: dict[str, tuple[str, ...]] = {}
    for word in unknown:
        if (not foreign or len(word) > SHORTEST) and (corrections := vocabulary.corrections(word)):
            if foreign and found:
                return None
            found[word] = corrections
    if not found:
        return None

    def corrected(match: re.Match[str]) -> str:
        corrections = found.get(fold(match[0].casefold()))
        return vocabulary.spelling(corrections[0]) if corrections else match[0]

    def chunk(match: re.Match[str]) -> str:
        code = any(character.isdigit() for character in match[0])
        return match[0] if code else _LETTERS.sub(corrected, match[0])

    meant = tuple(dict.fromkeys(word for corrections in found.values() for word in corrections))
    return Reading(_CHUNK.sub(chunk, text), meant)


def _telling(text: str, silent: Collection[str]) -> Iterator[str]:
    """Return the words of letters of a text that say something and are not short, folded, each once."""
    seen: set[str] = set()
    for chunk in _CHUNK.finditer(text.casefold()):
        if not any(character.isdigit() for character in chunk[0]):
            for found in _LETTERS.finditer(chunk[0]):
                word = fold(found[0])
                if len(found[0]) >= SHORTEST and found[0] not in silent and word not in seen:
                    seen.add(word)
                    yield word


def _is_letters(word: str) -> bool:
    return len(word) > 1 and word.isalpha()


def _is_word(word: str) -> bool:
    return len(word) <= LONGEST and _is_letters(word)


def _keep(counter: Counter[str] | Counter[tuple[LabelKind, str]], most: int) -> None:
    """Drop the rarest once there are twice as many as are kept: what is frequent comes back, what is rare does not."""
    if len(counter) > 2 * most:
        kept = dict(counter.most_common(most))
        counter.clear()
        counter.update(kept)  # type: ignore[arg-type]  # of its own kind


def _label_words(kind: LabelKind, text: str) -> frozenset[str]:
    return frozenset(runs(text if kind == "brand" else text.rpartition(">")[2]))


def _letters(word: str) -> int:
    """Return which letters a word has, as 64 bits; letters that share one make two words look nearer, never further."""
    bits = 0
    for letter in word:
        bits |= 1 << (ord(letter) & 63)
    return bits


def _edits(word: str, others: Sequence[str], width: int) -> NDArray[np.int8]:
    """Return how many edits are between `word` and the first 0…width letters (rows) of each of the others (columns)."""
    if not others:
        return np.zeros((width + 1, 0), np.int8)
    letters = np.ascontiguousarray(np.array(others, f"<U{width}").view("<u4").reshape(len(others), width).T)
    before = row = np.repeat(np.arange(width + 1, dtype=np.int8)[:, None], len(others), axis=1)
    for number, letter in enumerate(map(ord, word)):
        last, before = before, row
        same = letters == letter
        row = np.empty_like(before)
        row[0] = number + 1
        np.minimum(before[1:] + 1, before[:-1] + ~same, out=row[1:])
        if number:
            swapped = same[:-1] & (letters[1:] == ord(word[number - 1]))
            np.minimum(row[2:], np.where(swapped, last[:-2] + 1, row[2:]), out=row[2:])
        for column in range(1, width + 1):
            np.minimum(row[column], row[column - 1] + 1, out=row[column])
    return row
