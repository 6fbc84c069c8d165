"""Which words are taken for which, what is left alone, and that memory is bounded."""

from __future__ import annotations

from collections import Counter
from itertools import islice, permutations

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from catalens.domain import DEFAULT_LANGUAGES, Product
from catalens.lexical import fold, stems
from catalens_query.vocabulary import LONGEST, MOST_READ, SHORTEST, Tally, Vocabulary, read

WORDS = st.text("abcdeé", min_size=1, max_size=12)


def vocabulary(*names: str, description: str = "", most_words: int = 1000) -> Vocabulary:
    tally = Tally(DEFAULT_LANGUAGES, most_words)
    tally.add(
        Product(product_id=str(number), name=name, description=description, version=1)
        for number, name in enumerate(names)
    )
    return tally.vocabulary()


class Counting(Vocabulary):
    """A vocabulary that notes which words it was asked to correct."""

    def __init__(self, *names: str) -> None:
        self.asked: list[str] = []
        vars(self).update(vars(vocabulary(*names)))

    def corrections(self, word: str) -> tuple[str, ...]:
        self.asked.append(word)
        return super().corrections(word)


def strange(number: int) -> list[str]:
    """Return so many words of five letters that are near to no word and to none of each other."""
    return ["q" + "".join(letters) for letters in islice(permutations("bcdfghjk", 4), number)]


def edits(one: str, other: str) -> int:
    """Return the edits between two words: the textbook's table, for comparison."""
    table = [[max(row, column) for column in range(len(other) + 1)] for row in range(len(one) + 1)]
    for row in range(1, len(one) + 1):
        for column in range(1, len(other) + 1):
            table[row][column] = min(
                table[row - 1][column] + 1,
                table[row][column - 1] + 1,
                table[row - 1][column - 1] + (one[row - 1] != other[column - 1]),
            )
            if one[max(0, row - 2) : row] == other[max(0, column - 2) : column][::-1] and min(row, column) > 1:
                table[row][column] = min(table[row][column], table[row - 2][column - 2] + 1)
    return table[-1][-1]


def some_edits(one: str, other: str) -> int:
    """Return the edits between a word and that beginning of another which is nearest."""
    return min(edits(one, other[:length]) for length in range(len(other) + 1))


@given(words=st.lists(WORDS, min_size=1, max_size=12), asked=WORDS)
@settings(max_examples=300)
def test_corrections_are_near_and_known_and_a_known_word_has_none(words: list[str], asked: str) -> None:
    known, asked = vocabulary(*words), fold(asked)
    corrections = known.corrections(asked)
    kept = {fold(word) for word in words if len(word) > 1 and fold(word) in known}
    assert set(corrections) <= kept
    if known.knows(asked) or asked in kept:
        assert not corrections
        return
    most = 2 if len(asked) >= 8 else 1
    nearest = min((edits(asked, word) for word in kept), default=99)
    assert {edits(asked, word) for word in corrections} <= set(range(nearest, most + 1))
    if len(asked) >= SHORTEST:
        assert bool(corrections) == (nearest <= most)


@given(words=st.lists(WORDS, min_size=1, max_size=12), asked=WORDS)
@settings(max_examples=200)
def test_completions_begin_as_asked_or_nearly_so_and_miss_no_stem(words: list[str], asked: str) -> None:
    known, asked = vocabulary(*words), fold(asked)
    kept = {fold(word) for word in words if fold(word) in known}
    found = known.completions(asked, 100)
    assert set(found) <= {word for word in kept if word.startswith(asked)}
    families = set().union(*(stems(word, DEFAULT_LANGUAGES) for word in found))
    assert all(stems(word, DEFAULT_LANGUAGES) & families for word in kept if word.startswith(asked))
    assume(len(asked) >= SHORTEST)
    near = known.near_completions(asked, 100)
    expected = {word for word in kept if some_edits(asked, word) <= 1}
    assert set(near) <= expected
    families = set().union(*(stems(word, DEFAULT_LANGUAGES) for word in near))
    assert all(stems(word, DEFAULT_LANGUAGES) & families for word in expected)


@pytest.mark.parametrize(
    ("asked", "corrections"),
    [
        ("laptp", ("laptop",)),
        ("lpatop", ("laptop",)),
        ("laptopp", ("laptop",)),
        ("paptop", ("laptop",)),
        ("sneekesr", ("sneakers",)),  # two edits, and long enough for two
        ("loptap", ()),  # two edits, and too short
        ("teh", ()),  # too short
        ("laptops", ()),  # an inflection of what is known
        ("chaussures", ()),
        ("brode", ()),
        ("brodeee", ("brodee",)),
    ],
)
def test_what_is_corrected(asked: str, corrections: tuple[str, ...]) -> None:
    assert vocabulary("Laptop", "Sneakers", "Chaussure brodée", "The tea").corrections(asked) == corrections


def test_the_most_frequent_of_equally_near_words_come_first() -> None:
    known = vocabulary("cold", "bold", "bold", "gold", "gold", "gold", "hold")
    assert known.corrections("xold") == ("gold", "bold")


def test_words_are_counted_once_a_product_and_descriptions_complete_nothing() -> None:
    known = vocabulary("shirt shirt", "shirt", description="shiny and soft")
    assert known.count("shirt") == 2
    assert known.completions("shi", 10) == ["shirt"]
    assert known.knows("shiny")
    assert known.corrections("shinny") == ("shiny",)
    assert known.count("shiny") == 0
    assert known.count("absent") == 0


def test_words_are_shown_with_the_accents_that_they_mostly_have() -> None:
    known = vocabulary("Été", "été", "ete")
    assert known.count("ete") == 3
    assert known.spelling("ete") == "été"


def test_brands_and_categories_by_their_words() -> None:
    tally = Tally(DEFAULT_LANGUAGES)
    tally.add(
        Product(product_id=str(number), name="x", brand="New Balance", category="Sport > Running shoes", version=1)
        for number in range(3)
    )
    known = tally.vocabulary()
    assert [(label.kind, label.text, label.count) for label in known.labels(["bal"])] == [("brand", "New Balance", 3)]
    assert [label.text for label in known.labels(["sho", "run"])] == ["Sport > Running shoes"]
    assert [label.text for label in known.labels(["spo"])] == ["Sport"]
    assert known.labels(["hoes"]) == []


def test_memory_is_bounded_and_the_frequent_words_are_kept() -> None:
    rare = [f"rare{chr(97 + n // 26)}{chr(97 + n % 26)}" for n in range(300)]
    known = vocabulary(*(f"common {word}" for word in rare), most_words=20)
    assert len(known) == 20
    assert known.count("common") == 300
    assert "x" * (LONGEST + 1) not in vocabulary("x" * (LONGEST + 1))


@pytest.mark.parametrize(
    ("text", "reading"),
    [
        ("leather sheos", "leather shoes"),
        ("Leather Sheos!", "Leather shoes!"),
        ("sheos", "shoes"),
        ("l’hivre", "l’hiver"),
        ("T-shrit", "T-shirt"),
        ("leather shoes", None),
        ("shoe for leathers", None),
        ("SHEOS-42", None),  # a code
        ("xy42sheos", None),
        ("chaussure pour hommme", None),  # another language: nothing is near, and more is unknown than known
        ("sheos leathr", None),
        ("agneau garanti sheos", "agneau garanti shoes"),  # more is unknown than known, but only one word is near
        ("agneau garanti hiwer", "agneau garanti hiver"),
        ("agneau garanti iver", None),  # another language's short words are near to anything
        ("l’leathr foncé", "l’leather foncé"),
        ("with this sheos", "with this shoes"),  # words that say nothing neither help nor hinder
        ("***", None),
        ("", None),
    ],
)
def test_how_a_query_is_read(text: str, reading: str | None) -> None:
    found = read(text, vocabulary("Leather shoes", "T-shirt", "L'hiver"))
    assert (found and found.text) == reading


@pytest.mark.parametrize("unknown", [0, 3, MOST_READ // 2])
def test_of_a_long_text_the_first_words_are_read_and_the_others_stand(unknown: int) -> None:
    known = Counting("leather shoes", *strange(200))
    asked = strange(200)[: MOST_READ - 1 - unknown] + ["zzzzz" + word for word in strange(unknown)]
    reading = read(" ".join(["sheos", *asked, "leathr", "leathr"]), known)
    assert reading is not None
    assert reading.text.split() == ["shoes", *asked, "leathr", "leathr"]
    assert len(known.asked) == 1 + unknown
    assert read("leather sheos", known, 1) is None
    assert read("leather leather sheos", known, 2) is not None  # a word counts once


def test_of_what_may_be_another_language_few_words_are_looked_up() -> None:
    known = Counting("leather shoes", "hiver")
    assert read(" ".join(strange(1_000)), known) is None
    assert len(known.asked) == MOST_READ
    known.asked.clear()
    assert read(" ".join(["aleather", "bleather", *strange(20)]), known) is None
    assert known.asked == ["aleather", "bleather"]  # two slips are one too many, whatever comes after them


def test_a_word_is_compared_with_the_most_frequent_of_those_that_have_its_letters() -> None:
    words = ["".join(letters) for letters in islice(permutations("abcdefghi"), 8_000)]
    counts = Counter({word: 10_000 - number for number, word in enumerate(words)})
    known = Vocabulary(counts, counts, {}, [], DEFAULT_LANGUAGES, 10_000)
    for word in (words[0], words[3_000]):
        assert word in known.corrections(word[1] + word[0] + word[2:] + "x") + known.corrections(word + "x")
    assert words[-1] not in known.corrections(words[-1] + "x")


def test_french_with_its_apostrophe_and_without_its_accents() -> None:
    known = vocabulary("Écharpe rouge", "L'été")
    for text in ("l'echarpe rouje", "l’écharppe rouge", "d’echarpe ruoge"):
        reading = read(text, known)
        assert reading is not None
        assert reading.text.replace("’", "'")[1:] in ("'echarpe rouge", "'écharpe rouge")
    assert read("l'echarpe de l’ete", known) is None


def test_how_much_of_a_query_the_catalogue_knows() -> None:
    known = vocabulary("red shirt", "red shoes", "red robe", "Écharpe brodée")

    def spreads(text: str) -> dict[str, int]:
        return {word.text: spread for word, spread in known.spreads(text).items()}

    assert spreads("The red shirts, XJ-9!") == {"red": 3, "shirts": 1, "xj-9": 0}
    assert spreads("l’écharpe brodé") == {"écharpe": 1, "brodé": 1}

    def share(text: str) -> float:
        return known.share_known(known.spreads(text))

    assert share("the red shirts") == share("l’echarpe brodé") == 1.0
    assert 0 < share("red zzzz") < share("shirt zzzz") < 0.5
    assert share("red shirt zzzz") > share("shirt zzzz yyyy")
    assert share("red shirt XJ-9 4711") == 1.0  # codes that nobody has are nothing that vectors know
    assert share("zzzz") == share("") == 1.0  # what is found all the same is newer than the words


def test_of_a_long_text_the_first_words_say_how_much_the_catalogue_knows() -> None:
    known = vocabulary(*strange(60))
    assert list(known.spreads(" ".join(strange(60))).values()) == [1] * MOST_READ
    # A compound takes as many look-ups as it has parts, and one for the whole.
    assert len(known.spreads("ab-cd-ef " * 30)) == 1
    assert len(known.spreads(" ".join(f"ab-cd-{word}" for word in strange(30)))) == MOST_READ // 4
    assert known.spreads("-".join(strange(MOST_READ))) == {}


@pytest.mark.parametrize(
    ("name", "query"),
    [
        ("WiFi router", "wi-fi router"),
        ("T-shirt", "tshirt"),
        ("Tshirt", "t-shirt"),
        ("noise cancelling headphones", "noise-cancelling headphones"),
        ("red noise and cancelling", "noise-red"),
        ("made in France", "made-in-france"),
    ],
)
def test_a_compound_is_known_in_whichever_way_the_catalogue_writes_it(name: str, query: str) -> None:
    known = vocabulary(name, "other")
    assert all(known.spreads(query).values())
    assert known.share_known(known.spreads(f"{query} zzzz")) < 1
    assert set(known.spreads("zzzz-noise").values()) == {0}


def test_neighbours_that_are_one_word_make_both_known() -> None:
    spreads = vocabulary("XBox").spreads("x box games")
    assert {word.text: spread for word, spread in spreads.items()} == {"x": 1, "box": 1, "games": 0}


def test_what_is_looked_up_of_a_word_is_what_the_catalogue_lacked() -> None:
    known = vocabulary("noise filter")
    (code,), (compound,) = known.spreads("Filter-8"), known.spreads("noise-zzzz")
    assert (known.lacks(code), code.spelt) == (["filter8", "8"], False)
    assert (known.lacks(compound), compound.spelt) == (["noisezzzz", "zzzz"], True)


@pytest.mark.parametrize(
    ("text", "covered"),
    [
        ("red noise 8 8GB RX-1002", True),
        ("12 34 56 78", True),
        ("The NOISE, of: l'été", True),
        ("reds", False),  # known, but only by its stem: not worth finding out twice
        ("", True),
        ("nois", False),
        ("ab cd", False),
        ("noise-red", False),
        ("x red", False),
    ],
)
def test_what_is_read_in_no_time_has_no_word_to_be_stemmed(text: str, covered: bool) -> None:
    assert vocabulary("red noise", "RX noises", "Robe d'été").covers(text) is covered


def test_numbers_and_codes_are_known_to_be_in_no_vocabulary_without_their_stems() -> None:
    known = vocabulary("red noise")
    before = stems.cache_info().misses
    assert not any(known.spreads(" ".join(f"{n} QX{n} 9{n}-{n}" for n in range(70_000, 70_100))).values())
    assert stems.cache_info().misses == before


@given(words=st.lists(WORDS, max_size=8), asked=st.text("abcde '1", max_size=40))
def test_the_share_that_is_known_is_a_share(words: list[str], asked: str) -> None:
    known = vocabulary(*words)
    assert 0 < known.share_known(known.spreads(asked)) <= 1


def test_a_reading_has_every_word_that_may_have_been_meant() -> None:
    reading = read("brown leather bag shos", vocabulary("leather shoes", "shots", "brown bag"))
    assert reading is not None
    assert reading.meant == ("shoes", "shots")
    assert reading.text == "brown leather bag shoes"


@given(words=st.lists(st.sampled_from(["robe", "rouge", "t-shirt", "été", "XJ-900"]), min_size=1), noise=st.text())
def test_what_the_catalogue_knows_is_never_changed(words: list[str], noise: str) -> None:
    known = vocabulary("Robe rouge", "T-shirt", "été XJ-900")
    assert read(" ".join(words), known) is None
    reading = read(noise, known)
    assert reading is None or reading.meant


def test_an_empty_catalogue_knows_and_suggests_nothing() -> None:
    known = vocabulary()
    assert len(known) == 0
    assert known.corrections("shoes") == ()
    assert known.completions("s", 10) == []
    assert known.near_completions("shoes", 10) == []
    assert known.labels(["s"]) == []
    assert read("shoes", known) is None
