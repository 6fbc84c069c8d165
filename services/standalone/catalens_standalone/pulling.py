"""Fetches a model and makes a bundle of it under DATA_DIR/models: whole, proven, or not at all."""

from __future__ import annotations

import errno
import re
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from catalens.encoders.bundle import MANIFEST, Manifest, bundled, load_bundle, read_manifest
from catalens.encoders.known import KNOWN, Known
from catalens.errors import CatalensError, Misconfigured
from catalens.settings import EncoderSettings

if TYPE_CHECKING:
    from catalens.encoders.checkpoints import Checkpoint

Report = Callable[[str], None]
Fetched = tuple[Path, str | None]  # a folder, and the hub's revision of it

_HUB: Final = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9_][\w.-]*")  # not ./a or ../a: a folder that is missing
_NAME: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")
_DISK: Final = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)
# Everything that says what a model is; no code, and no weights yet.
_SMALL: Final = ["*.json", "*.txt", "*.model", "README.md"]


def pull(
    what: str,
    data_dir: Path,
    *,
    name: str | None = None,
    revision: str | None = None,
    image_from: str | None = None,
    force: bool = False,
    report: Report = lambda _: None,
) -> tuple[Path, Manifest]:
    """Make the bundle of a known name, of a hub's owner/name or of a folder; return where it is and what it says.

    Blocking. Raises Misconfigured: a name nobody knows, no hub, the torch extra missing, a checkpoint of a kind that
    is not known; CatalensError: a disk that takes no more. Whatever happens, no half of a bundle has the name.
    """
    known = KNOWN.get(what)
    folder = Path(what).expanduser()
    if known is None and not folder.is_dir() and not _HUB.fullmatch(what):
        raise Misconfigured(
            f"{what} is no folder, no owner/name of a hub and none of the names known here: {', '.join(KNOWN)}"
        )
    chosen = name or (known.name if known else folder.resolve().name)
    target = place_of(chosen, data_dir)
    if target.exists() and not force:
        held = f"revision {read_manifest(target).revision}" if (target / MANIFEST).is_file() else "no bundle"
        raise Misconfigured(f"{target} is there already ({held}): --force makes it again")
    _need_extra(chosen)
    source, found = (folder, revision) if not known and folder.is_dir() else _fetch(what, known, revision, report)
    towers = image_from or (known.image_from if known else None)
    images = None if towers is None else _images(towers, report)
    report(f"reading {source.name if found is None else what}")
    hub = known.hub if known else None if folder.is_dir() else what
    beside = images.name if images and towers and Path(towers).expanduser().is_dir() else towers
    checkpoint = _named(_load(source, images), chosen, known, hub, found, beside)
    try:
        _write(checkpoint, target, report)
    except OSError as error:
        raise CatalensError(f"{target} cannot be written: {error}") from error
    return target, read_manifest(target)


def place_of(name: str, data_dir: Path) -> Path:
    """Return the folder of a new model called `name`; raises Misconfigured for a name that could not be found again."""
    if not _NAME.fullmatch(name):
        raise Misconfigured(f"{name!r} cannot be a model's name: take letters, digits, '.', '_' and '-'")
    if name in bundled().values():
        raise Misconfigured(f"{name} is the name of a model that comes with Catalens: give another one with --name")
    return data_dir / "models" / name


def _need_extra(name: str) -> None:
    """Refuse early, in words, what would fail late at an import."""
    try:
        import huggingface_hub  # noqa: F401, PLC0415  # only whether it is there
        import onnxscript  # noqa: F401, PLC0415  # as above
        import open_clip  # noqa: F401, PLC0415  # as above
        import torch  # noqa: F401, PLC0415  # as above
        import transformers  # noqa: PLC0415  # only when a model is pulled
    except ModuleNotFoundError as error:
        raise Misconfigured(
            f"`catalens model pull` needs {error.name}: install catalens[torch], or pull where it is installed and "
            f"copy the folder DATA_DIR/models/{name} here"
        ) from error
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def _fetch(what: str, known: Known | None, revision: str | None, report: Report) -> Fetched:
    """Return a folder of the hub's files, weights of one format only, and the revision that they are of."""
    from huggingface_hub import HfApi, snapshot_download  # noqa: PLC0415  # with the torch extra only
    from huggingface_hub.errors import (  # noqa: PLC0415  # as above
        GatedRepoError,
        HFValidationError,
        HTTPError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    hub = known.hub if known else what
    try:
        report(f"asking the hub for {hub}")
        about = HfApi().model_info(hub, revision=revision, timeout=20)
        names = [file.rfilename for file in about.siblings or ()]
        report(f"fetching {hub}")
        folder = Path(snapshot_download(hub, revision=about.sha, allow_patterns=_SMALL))
        from catalens.encoders.checkpoints import layout_of  # noqa: PLC0415  # imports torch

        files = layout_of(folder).weights(folder, names)
        snapshot_download(hub, revision=about.sha, allow_patterns=files)
    except GatedRepoError as error:
        raise Misconfigured(f"{hub} wants its terms accepted: do so on its page, then run `hf auth login`") from error
    except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError) as error:
        raise Misconfigured(f"the hub has no {hub}{f' of revision {revision}' if revision else ''}") from error
    except (HTTPError, OSError) as error:
        if isinstance(error, OSError) and error.errno in _DISK:  # one of the network's has another number, or none
            raise CatalensError(f"{hub} cannot be kept here: {error}") from error
        raise Misconfigured(
            f"no model hub answers ({error}): where one does, run `hf download {hub} --local-dir FOLDER`, bring the "
            f"folder here and run `catalens model pull FOLDER --name {known.name if known else 'NAME'}`"
        ) from error
    return folder, about.sha


def _images(towers: str, report: Report) -> Path:
    """Return the folder of the CLIP whose image tower is wanted."""
    folder = Path(towers).expanduser()
    return folder if folder.is_dir() else _fetch(towers, KNOWN.get(towers), None, report)[0]


def _load(folder: Path, images: Path | None) -> Checkpoint:
    from catalens.encoders.checkpoints import load_checkpoint  # noqa: PLC0415  # imports torch

    return load_checkpoint(folder, images)


def _named(
    checkpoint: Checkpoint, name: str, known: Known | None, hub: str | None, revision: str | None, towers: str | None
) -> Checkpoint:
    """Return the checkpoint under the name that answers give, with what is known about it filled in."""
    source = hub or checkpoint.source
    return replace(
        checkpoint,
        id=hub or name,
        revision=revision or checkpoint.revision,
        licence=known.licence if known else checkpoint.licence,
        languages=known.languages if known else checkpoint.languages,
        source=f"{source}; pictures: {towers}" if towers else source,
    )


def _write(checkpoint: Checkpoint, target: Path, report: Report) -> None:
    """Write the bundle beside its place, run it once, and only then put it there."""
    from catalens.encoders import load_runtime  # noqa: PLC0415  # with the encoder extra only
    from catalens.encoders.export import export_bundle  # noqa: PLC0415  # imports torch

    target.parent.mkdir(parents=True, exist_ok=True)
    for left in target.parent.glob(f".{target.name}.*.partial"):  # of a pull that was killed
        if left.name.count(".") == target.name.count(".") + 3:  # and not of another model, whose name begins like this
            shutil.rmtree(left)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.", suffix=".partial") as scratch:
        made = Path(scratch) / "bundle"
        export_bundle(checkpoint, made, lambda step: report(f"writing {step}"))
        report("running it once")
        load_runtime(load_bundle(made), EncoderSettings(), 1, Path(scratch) / "cache")
        replaced = Path(scratch) / "replaced"
        if target.exists():
            target.rename(replaced)
        try:
            made.rename(target)
        except OSError:
            if replaced.exists():
                replaced.rename(target)
            raise
