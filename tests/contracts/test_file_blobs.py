"""What FileBlobStore promises beyond its port: files that are whole or absent."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from catalens.engines.blobs import FileBlobStore, folder_of
from catalens.errors import Misconfigured, StorageFull, Transient

OLD = 1_000_000_000.0


async def test_putting_a_known_blob_makes_it_young_again(tmp_path: Path) -> None:
    store = FileBlobStore(tmp_path)
    reference = await store.put(b"picture")
    os.utime(tmp_path / reference[:2] / reference, (OLD, OLD))
    assert [old async for old in store.references(older_than=OLD + 1)] == [reference]
    await store.put(b"picture")
    assert [old async for old in store.references(older_than=OLD + 1)] == []
    await store.delete(reference, older_than=OLD + 1)
    assert await store.get(reference) == b"picture"


@pytest.mark.parametrize("below", ["", "pictures"])
def test_a_place_that_is_no_folder_is_said_and_not_waited_for(tmp_path: Path, below: str) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(Misconfigured, match="CATALENS_BLOBS__URL"):
        FileBlobStore(tmp_path / "file" / below)


async def test_what_a_killed_process_left_unfinished_is_no_blob_and_is_swept(tmp_path: Path) -> None:
    FileBlobStore(tmp_path)
    (tmp_path / "unfinished" / "half").write_bytes(b"half a pict")
    os.utime(tmp_path / "unfinished" / "half", (OLD, OLD))
    (tmp_path / "unfinished" / "being written").write_bytes(b"by another proce")
    store = FileBlobStore(tmp_path)
    assert [reference async for reference in store.references(older_than=4_000_000_000.0)] == []
    assert [path.name for path in (tmp_path / "unfinished").iterdir()] == ["being written"]


READER = """
import asyncio, concurrent.futures.thread, os, sys
from pathlib import Path
from catalens.engines.blobs import FileBlobStore
from catalens.errors import CatalensError

async def main(root, reference):
    store = FileBlobStore(root, read_only=True)
    print((await store.get(reference)).decode())
    print([found async for found in store.references(older_than=4_000_000_000.0)] == [reference])
    for wish in (store.put(b"another"), store.delete(reference), FileBlobStore, store.close()):
        try:
            await (wish if asyncio.iscoroutine(wish) else asyncio.to_thread(wish, root))
        except CatalensError as error:
            print(type(error).__name__)

if os.geteuid() == 0:
    os.setgid(65534)
    os.setuid(65534)  # to root no folder is closed
asyncio.run(main(Path(sys.argv[1]), sys.argv[2]))
"""


async def test_who_only_reads_needs_no_right_to_write() -> None:
    """As the query service of docker-compose.yml, which has the pictures mounted for reading alone."""
    with TemporaryDirectory() as name:
        root = Path(name) / "pictures"
        store = FileBlobStore(root)
        reference = await store.put(b"picture")
        await store.close()
        closed = [Path(name), *(path for path in root.rglob("*") if path.is_dir()), root]
        for folder in closed:
            folder.chmod(0o555)
        try:
            done = await asyncio.to_thread(
                subprocess.run, [sys.executable, "-c", READER, str(root), reference], capture_output=True, text=True
            )
        finally:
            for folder in closed:
                folder.chmod(0o755)
    assert done.stdout.split() == ["picture", "True", "StorageFull", "StorageFull", "Misconfigured"], done.stderr


async def test_who_only_reads_sees_what_a_writer_brings_later_and_makes_nothing(tmp_path: Path) -> None:
    reader = FileBlobStore(tmp_path / "pictures", read_only=True)
    assert not (tmp_path / "pictures").exists()
    assert [found async for found in reader.references(older_than=4_000_000_000.0)] == []
    reference = await FileBlobStore(tmp_path / "pictures").put(b"picture")
    assert await reader.get(reference) == b"picture"
    with pytest.raises(StorageFull, match="the picture cannot be stored: the disk is full or read-only"):
        await reader.put(b"picture")
    with pytest.raises(StorageFull, match="cannot be deleted"):
        await reader.delete(reference)
    assert await reader.get(reference) == b"picture"


ANOTHER = """
import asyncio, sys
from pathlib import Path
from catalens.engines.blobs import FileBlobStore

async def main(root):
    store = FileBlobStore(root)
    print("ready", flush=True)
    sys.stdin.readline()
    await store.put(b"picture")
    print("stored", flush=True)

asyncio.run(main(Path(sys.argv[1])))
"""


async def test_a_put_of_another_process_and_a_conditional_delete_take_turns(tmp_path: Path) -> None:
    """Or the delete, having seen an old file, would remove what was stored again the moment before."""
    store = FileBlobStore(tmp_path)
    reference = await store.put(b"picture")
    os.utime(tmp_path / reference[:2] / reference, (OLD, OLD))
    other = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", ANOTHER, str(tmp_path)), stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
    )
    assert other.stdin is not None
    assert other.stdout is not None
    assert await other.stdout.readline() == b"ready\n"
    answer = asyncio.create_task(other.stdout.readline(), name="answer")
    with store._turn():
        other.stdin.write(b"put\n")
        await asyncio.wait([answer], timeout=0.3)  # time to do it wrong
        assert not answer.done()
    assert await answer == b"stored\n"
    await store.delete(reference, older_than=OLD + 1)
    assert await store.get(reference) == b"picture"
    await other.wait()
    await store.close()


async def test_a_folder_is_named_by_its_full_path(tmp_path: Path) -> None:
    assert folder_of(f"file://{tmp_path}/shop%20pictures") == tmp_path / "shop pictures"
    for wrong in ("file://", "file:///", "file://relative/pictures", "s3://bucket/x"):
        with pytest.raises(Misconfigured, match="CATALENS_BLOBS__URL"):
            folder_of(wrong)


async def test_a_folder_that_is_gone_is_an_error_that_housekeeping_survives(tmp_path: Path) -> None:
    store = FileBlobStore(tmp_path)
    (tmp_path / "00").rmdir()
    with pytest.raises(Transient, match="cannot be read"):
        [reference async for reference in store.references(older_than=4e9)]


FULL_DISK = """
import asyncio, resource, sys
from pathlib import Path
from catalens.engines.blobs import FileBlobStore
from catalens.errors import StorageFull

async def main(root):
    store = FileBlobStore(root)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        await store.put(b"x" * 200_000)
    except StorageFull:
        print("full")
    print([reference async for reference in store.references(older_than=4e9)], list(store._unfinished.iterdir()))
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    print(len(await store.get(await store.put(b"x" * 200_000))))

asyncio.run(main(Path(sys.argv[1])))
"""


async def test_a_full_disk_leaves_nothing_behind_and_heals(tmp_path: Path) -> None:
    """The file size limit stands for the full disk: it takes as many bytes as fit, then fails the write."""
    child = await asyncio.to_thread(
        subprocess.run, [sys.executable, "-c", FULL_DISK, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert child.stdout.splitlines() == ["full", "[] []", "200000"]
