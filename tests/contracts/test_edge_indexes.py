"""What only the embedded indexes of a data folder have: their file, and what was there before it."""

from __future__ import annotations

from pathlib import Path

import pytest

from catalens.domain import IndexInfo, ModelSpec
from catalens.engines.edge import EdgeIndex
from catalens.engines.edge_home import EdgeIndexes
from catalens.errors import Conflict, Misconfigured

SPEC = ModelSpec("tiny", "1", "tiny", 4, "a" * 64)
OTHER = IndexInfo("other", ModelSpec("other", "1", "tiny", 4, "b" * 64))


async def test_the_index_of_an_earlier_release_is_the_first_one(tmp_path: Path) -> None:
    await (await EdgeIndex.open(tmp_path / "index", SPEC)).close()
    indexes = EdgeIndexes(tmp_path, "starter")
    assert await indexes.current() == IndexInfo("starter", SPEC)
    await indexes.switch(IndexInfo("starter", SPEC))
    assert await EdgeIndexes(tmp_path, "another").current() == IndexInfo("starter", SPEC)


async def test_state_survives_and_is_of_one_piece(tmp_path: Path) -> None:
    indexes = EdgeIndexes(tmp_path, "starter")
    first = IndexInfo("first", SPEC)
    for info in (first, OTHER):
        await (await indexes.open(info)).close()
    await indexes.set_notes(OTHER, {"phase": "copy"})
    await indexes.hold(True)
    again = EdgeIndexes(tmp_path, "starter")
    assert await again.current() == first
    assert list(await again.all()) == [first, OTHER]
    assert await again.notes(OTHER) == {"phase": "copy"}
    assert await again.held()
    await again.switch(OTHER)
    assert (await again.current(), await again.held()) == (OTHER, False)


async def test_an_open_index_is_shared_and_not_dropped(tmp_path: Path) -> None:
    indexes = EdgeIndexes(tmp_path, "starter")
    await (await indexes.open(IndexInfo("first", SPEC))).close()
    one, two = await indexes.open(OTHER), await indexes.open(OTHER)
    await one.close()
    assert (await two.counts("default")).products == 0, "it is open for the other user"
    with pytest.raises(Conflict, match="in use"):
        await indexes.drop(OTHER)
    await two.close()
    await indexes.drop(OTHER)
    assert not (tmp_path / f"index-{OTHER.name}").exists()
    assert list(await indexes.all()) == [IndexInfo("first", SPEC)]


async def test_which_index_is_current_is_never_guessed(tmp_path: Path) -> None:
    indexes = EdgeIndexes(tmp_path, "starter")
    for info in (IndexInfo("first", SPEC), OTHER):
        await (await indexes.open(info)).close()
    (tmp_path / "indexes.json").unlink()
    with pytest.raises(Misconfigured, match=r"indexes\.json is missing"):
        await EdgeIndexes(tmp_path, "starter").current()
    (tmp_path / "indexes.json").write_text("{", encoding="utf-8")
    with pytest.raises(Misconfigured, match="damaged"):
        await EdgeIndexes(tmp_path, "starter").current()
