"""Gets the pictures that a request carries or names: side by side, in the time that the request has."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Mapping

from catalens.errors import CatalensError
from catalens.ports import ImageSource
from catalens.problems import Problem, invalid
from catalens_query.models import PictureInput


async def pictures(given: Mapping[str, PictureInput], images: ImageSource, due: float) -> dict[str, bytes]:
    """Return the bytes of the pictures that the fields of a request give; `due` is the loop's time they have.

    `images` says how many are fetched at once. Problem 422 names the first field whose picture can't be had, also when
    another failed sooner; those after it are not waited for.
    """
    got: dict[str, bytes] = {}
    async with asyncio.TaskGroup() as group:
        tasks = {
            field: group.create_task(_picture(one, field, images, due), name=f"picture.{field}")
            for field, one in given.items()
        }
        for field, task in tasks.items():
            picture = await task
            if isinstance(picture, Problem):
                break
            got[field] = picture
        else:
            return got
        for task in tasks.values():
            task.cancel()
    raise picture


async def _picture(picture: PictureInput, field: str, images: ImageSource, due: float) -> bytes | Problem:
    if picture.data is not None:
        try:
            return await asyncio.to_thread(base64.b64decode, picture.data, validate=True)
        except ValueError as error:
            return invalid((f"{field}.data", f"is not base64: {error}"))
    try:
        async with asyncio.timeout_at(due):
            return await images.fetch(picture.url or "")
    except TimeoutError:
        return invalid((f"{field}.url", "was not fetched in the time of a search, CATALENS_HTTP__SEARCH_TIMEOUT"))
    except CatalensError as error:
        return invalid((f"{field}.url", str(error)))
