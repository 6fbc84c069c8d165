"""Judged queries and what a ranking is worth: measures, their intervals and a paired test; pure and seeded."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Final, Self

import numpy as np
from pydantic import Field, ValidationError, model_validator
from pydantic_core import from_json

from catalens.domain import Value
from catalens.errors import CatalensError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Figures = NDArray[np.float64]
    """One row a query, one column of MEASURES."""

MEASURES: Final = ("recall@1", "recall@5", "recall@10", "MRR", "nDCG@10")
DEPTH: Final = 100
"""How many results of each query are looked at: what the first relevant one is below counts 0 in the MRR."""
RESAMPLES: Final = 2_000
PERMUTATIONS: Final = 10_000
_SEED: Final = 20_240_916
_AT_ONCE: Final = 500_000
_Gain = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Query(Value):
    """What is searched, and which products are right: how much each is worth, 1 if only named."""

    query: Annotated[str, Field(min_length=1)] | None = None
    image: Annotated[str, Field(min_length=1)] | None = None
    """An address, or a path from the folder of the file."""
    language: str = ""
    kind: str = ""
    relevant: Mapping[str, _Gain]

    @model_validator(mode="before")
    @classmethod
    def _named_only(cls, given: object) -> object:
        if isinstance(given, dict) and isinstance(named := given.get("relevant"), list):
            if not all(isinstance(one, str) for one in named):
                raise ValueError("relevant: the ids of products are texts")
            return {**given, "relevant": dict.fromkeys(named, 1.0)}
        return given

    @model_validator(mode="after")
    def _judged(self) -> Self:
        if self.query is None and self.image is None:
            raise ValueError("give query, image or both")
        if not any(self.relevant.values()):
            raise ValueError("relevant names no product that is right")
        return self

    @property
    def shown(self) -> str:
        """The query in words, for a person."""
        return " + ".join(part for part in (self.image, self.query) if part)


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean over queries and the bounds of its 95 % interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Change:
    """A difference of two means and how likely one as large is where the two are the same."""

    difference: float
    p: float


def queries(lines: Iterable[bytes]) -> list[Query]:
    """Return the judged queries of JSON lines; raises CatalensError naming the line that is none."""
    found = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            found.append(Query.model_validate(from_json(line)))
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(str(part) for part in first["loc"])
            told = first["msg"].removeprefix("Value error, ")
            raise CatalensError(f"line {number}: {place}: {told}" if place else f"line {number}: {told}") from error
        except ValueError as error:
            raise CatalensError(f"line {number}: not JSON: {error}") from error
    if not found:
        raise CatalensError("there is no query in it")
    return found


def from_titles(products: Iterable[Mapping[str, object]], count: int) -> list[Query]:
    """Return `count` queries made of the products' names, the same of the same catalogue; all of that name are right.

    Easy and lexical by nature: a name finds its own words. Good for comparing settings, not for judging a search.
    """
    named: defaultdict[str, dict[str, float]] = defaultdict(dict)
    languages: dict[str, str] = {}
    for product in products:
        name, product_id, locale = product.get("name"), product.get("product_id"), product.get("locale")
        if isinstance(name, str) and isinstance(product_id, str):
            named[name][product_id] = 1.0
            languages.setdefault(name, locale if isinstance(locale, str) else "")
    chosen = sorted(named, key=lambda name: hashlib.sha256(name.encode()).digest())[:count]
    return [Query(query=name, language=languages[name], kind="title", relevant=named[name]) for name in chosen]


def measure(ranking: Sequence[str], relevant: Mapping[str, float]) -> tuple[float, ...]:
    """Return MEASURES of one ranking of product ids.

    Recall is the share of all right products that is found; nDCG takes the gains as they are (Järvelin and Kekäläinen,
    2002, with log2 of the rank + 1).
    """
    right = {product for product, gain in relevant.items() if gain > 0}
    first = next((rank for rank, product in enumerate(ranking, start=1) if product in right), None)
    best = _gained(sorted(relevant.values(), reverse=True)[:10])
    recalls = (len(right.intersection(ranking[:depth])) / len(right) for depth in (1, 5, 10))
    gained = _gained([relevant.get(product, 0.0) for product in ranking[:10]])
    return (*recalls, 0.0 if first is None else 1 / first, gained / best)


def intervals(figures: Figures) -> tuple[Interval, ...]:
    """Return each measure's mean and its 95 % interval: percentiles of bootstrap resamples of the queries."""
    random = np.random.default_rng(_SEED)
    count = len(figures)
    means = np.concatenate(
        [figures[random.integers(0, count, (rounds, count))].mean(axis=1) for rounds in _rounds(RESAMPLES, count)]
    )
    low, high = np.percentile(means, (2.5, 97.5), axis=0)
    return tuple(
        Interval(float(mean), float(below), float(above))
        for mean, below, above in zip(figures.mean(axis=0), low, high, strict=True)
    )


def changes(before: Figures, after: Figures) -> tuple[Change, ...]:
    """Return how each measure changed over the same queries, with a two-sided paired randomisation test.

    Were the two the same, each query's difference could as well have the other sign (Smucker, Allan and Carterette,
    2007): p is the share of random signs that give a difference as large.
    """
    random = np.random.default_rng(_SEED)
    differences = after - before
    observed = np.abs(differences.mean(axis=0))
    reached = np.zeros(differences.shape[1])
    for rounds in _rounds(PERMUTATIONS, len(differences)):
        signs = random.integers(0, 2, (rounds, len(differences))) * 2.0 - 1
        # Less what is rounding noise: signs that give the very same sum must count.
        reached += (np.abs(signs @ differences) / len(differences) >= observed - 1e-12).sum(axis=0)
    return tuple(
        Change(float(difference), float((1 + count) / (1 + PERMUTATIONS)))
        for difference, count in zip(differences.mean(axis=0), reached, strict=True)
    )


def groups(judged: Sequence[Query]) -> Iterator[tuple[str, list[int]]]:
    """Yield all queries, then those of each language and each kind, where there are several."""
    yield "all", list(range(len(judged)))
    for what, values in (("language", [one.language for one in judged]), ("kind", [one.kind for one in judged])):
        if len(set(values)) > 1:
            for value in sorted(set(values)):
                yield f"{what} {value or '(none)'}", [row for row, one in enumerate(values) if one == value]


def most_changed(before: Figures, after: Figures, count: int) -> list[int]:
    """Return the queries whose nDCG@10, then whose reciprocal rank, changed most; none that did not change."""
    ndcg, rank = MEASURES.index("nDCG@10"), MEASURES.index("MRR")
    moved = np.abs(after - before)
    order = sorted(range(len(moved)), key=lambda row: (-moved[row, ndcg], -moved[row, rank], row))
    return [row for row in order if moved[row, ndcg] > 0 or moved[row, rank] > 0][:count]


def worst(figures: Figures, count: int) -> list[int]:
    """Return the queries that are answered worst, by nDCG@10 and then by reciprocal rank; none that is perfect."""
    ndcg, rank = MEASURES.index("nDCG@10"), MEASURES.index("MRR")
    order = sorted(range(len(figures)), key=lambda row: (figures[row, ndcg], figures[row, rank], row))
    return [row for row in order if figures[row, ndcg] < 1][:count]


def _rounds(total: int, count: int) -> Iterator[int]:
    """Yield how many rounds over `count` queries are done at once, so that they fit into memory; `total` in all."""
    most = max(1, _AT_ONCE // count)
    for start in range(0, total, most):
        yield min(most, total - start)


def _gained(gains: Sequence[float]) -> float:
    return float(sum(gain / np.log2(rank + 1) for rank, gain in enumerate(gains, start=1)))
