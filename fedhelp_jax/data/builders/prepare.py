"""``fedhelp data``: lists the data sets with a builder here, and describes and prepares data sets.

Other names are looked up in the catalogue of TensorFlow Datasets.

A prepared data set is in ``DATA_DIR/NAME[/CONFIG]/VERSION``, in the layout of TensorFlow Datasets.
Its array_record files can be written and read without TensorFlow. An interrupted preparation leaves
its results in ``DATA_DIR/.unfinished/NAME[/CONFIG]`` and is resumed from there. Downloads are kept
in ``DATA_DIR/downloads/NAME``.
"""

import errno
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import tensorflow_datasets as tfds

from fedhelp_jax.core.errors import UserError, suggest
from fedhelp_jax.core.locks import exclusive_lock
from fedhelp_jax.core.storage import StorageError, storage_fault
from fedhelp_jax.core.terminal import tell
from fedhelp_jax.data.builders import BUILDERS, catalogue
from fedhelp_jax.data.builders.base import QUARANTINE, Builder
from fedhelp_jax.data.builders.fetch import fetch

_UNWRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR)
_EVERY = 5.0  # seconds between two lines of progress


def names() -> list[str]:
    """Returns the names of all data sets with a builder here: ``NAME`` or ``NAME/CONFIG``."""
    return [
        f"{name}/{config.name}" if config else name
        for name, cls in BUILDERS.items()
        for config in cls.BUILDER_CONFIGS or [None]
    ]


def builder(name: str, data_dir: str | None = None) -> Builder:
    """Returns the builder of ``NAME`` or ``NAME/CONFIG``.

    Args:
      name: Its name.
      data_dir: Folder of prepared data sets; None uses TFDS's default, ``$TFDS_DATA_DIR`` or
        ``~/tensorflow_datasets``.

    Raises:
      UserError: If there is no data set of this name.
    """
    base, _, config = name.partition("/")
    if base not in BUILDERS:
        raise UserError(
            f"{name!r} is not a data set{suggest(base, BUILDERS)}; see fedhelp data list"
        )
    configs = [known.name for known in BUILDERS[base].BUILDER_CONFIGS]
    if configs and config not in configs:
        said = (
            f"{config!r} is not a configuration of {base}"
            if config
            else f"{base} needs a configuration"
        )
        close = suggest(config, configs) or f"; it is one of {', '.join(configs)}"
        raise UserError(f"{said}{close} (written {base}/{configs[0]})")
    if config and not configs:
        raise UserError(f"{base} has no configurations; leave out /{config}")
    options = {"config": config} if config else {}
    return BUILDERS[base](data_dir=data_dir, file_format="array_record", **options)


def prepare(
    name: str,
    manual_dir: str | None,
    data_dir: str | None = None,
    say: Callable[[str], None] = tell,
    *,
    allow_repacked: bool = False,
    on_bad_example: str = "refuse",
) -> Path:
    """Prepares a data set, and resumes an earlier attempt that was stopped.

    Args:
      name: ``NAME`` or ``NAME/CONFIG``, which may be of TFDS's catalogue.
      manual_dir: The folder of the download; None fetches it, if it is freely available.
      data_dir: As in :func:`builder`.
      say: Called with progress messages.
      allow_repacked: Whether to accept, with a message, files that differ from their official
        checksum.
      on_bad_example: "refuse" stops at the first example whose files are unusable; "skip" leaves
        such examples out, and lists them in ``quarantine.csv`` in the folder of the prepared set.
        Data sets of TFDS's catalogue are always treated as with "refuse".

    Returns:
      The folder of the prepared data set.

    Raises:
      UserError: If the download is not laid out as its publisher does, it cannot be fetched, or the
        disk is full.
    """
    if _is_of_catalogue(name):
        made = catalogue.builder(name, data_dir, "array_record")
    else:
        made = builder(name, data_dir)
        made.allow_repacked, made.skip_bad = allow_repacked, on_bad_example == "skip"
    folder = Path(made.data_path)
    if folder.exists():
        return _there_already(folder, say)
    _check_manual_dir(name, made, manual_dir)
    # All configurations of a data set share a download folder, so they share a lock.
    lock = Path(made.data_dir_root) / ".unfinished" / f"{made.name}.lock"

    def wait(holder: str) -> None:
        say(f"{holder} prepares {made.name} in {made.data_dir_root}; waiting for it")

    with exclusive_lock(lock, f"--data_dir={made.data_dir_root}", wait):
        if folder.exists():
            return _there_already(folder, say)
        return _make(name, made, manual_dir, say)


def _check_manual_dir(name: str, made: tfds.core.DatasetBuilder, manual_dir: str | None) -> None:
    if manual_dir is not None:
        if not (Path(manual_dir).is_dir() and os.listdir(manual_dir)):
            raise UserError(f"--manual_dir={manual_dir}: there is no such folder, or nothing in it")
    elif isinstance(made, Builder):
        if not made.remote():
            raise UserError(
                "--manual_dir is missing: the folder of the download; see fedhelp data describe "
                f"{name}"
            )
    elif made.MANUAL_DOWNLOAD_INSTRUCTIONS:
        said = " ".join(made.MANUAL_DOWNLOAD_INSTRUCTIONS.split())
        raise UserError(f"--manual_dir is missing: {said}")


def _there_already(folder: Path, say: Callable[[str], None]) -> Path:
    say(f"{folder} is there already; remove it to prepare it anew")
    return folder


def _make(
    name: str,
    made: tfds.core.DatasetBuilder,
    manual_dir: str | None,
    say: Callable[[str], None],
) -> Path:
    if isinstance(made, Builder):
        _prepare(name, made, manual_dir, say)
    else:
        catalogue.prepare(name, made, manual_dir, say)
    counts = ", ".join(f"{split} {info.num_examples}" for split, info in made.info.splits.items())
    say(f"written: {made.data_path} ({counts})")
    return Path(made.data_path)


def _is_of_catalogue(name: str) -> bool:
    # Our builders are checked first, because TFDS needs a moment to look through its modules.
    return name.partition("/")[0] not in BUILDERS and catalogue.has(name)


def _prepare(name: str, made: Builder, manual_dir: str | None, say: Callable[[str], None]) -> None:
    remote = made.remote() if manual_dir is None else None
    if remote:
        manual_dir = str(Path(made.data_dir_root) / "downloads" / made.name)
    assert manual_dir is not None
    made.scratch = Path(made.data_dir_root) / ".unfinished" / name
    made.say = say
    tfds.disable_progress_bar()  # it does not show the remaining time
    progress = _Progress(say)
    made.planned, made.done = progress.begin, progress.add
    config = tfds.download.DownloadConfig(manual_dir=manual_dir)
    try:
        if remote:
            fetched = _Progress(say, "MB", 1e6)
            fetch(remote, Path(manual_dir), say, fetched.begin, fetched.add)
        made.download_and_prepare(download_dir=made.scratch / "downloads", download_config=config)
    except (OSError, RuntimeError, StorageError) as error:
        if fault := storage_fault(error):
            said = f"{fault}; what is made so far is kept in {made.scratch}"
        elif isinstance(error, OSError) and error.errno in _UNWRITABLE:
            said = f"cannot be written: {error}"
        else:
            raise
        raise UserError(f"{made.data_dir_root}: {said}") from None
    if made.bad:
        listed = Path(made.data_path) / QUARANTINE
        say(f"{len(made.bad)} examples that cannot be used are left out, listed in {listed}")
    shutil.rmtree(made.scratch)


def describe(name: str) -> str:
    """Returns a short description of a data set for users."""
    made = catalogue.builder(name) if _is_of_catalogue(name) else builder(name)
    about = made.about if isinstance(made, Builder) else catalogue.about(made)
    sizes = ", ".join(f"{part} {size}" for part, size in about.sizes.items())
    kinds = made.info.features
    kinds = kinds if isinstance(kinds, tfds.features.FeaturesDict) else {"example": kinds}
    features = "".join(f"\n  {key}: {kind}" for key, kind in kinds.items())
    return (
        f"{name}\n\n{about.description}\n\nhomepage: {about.homepage}\nlicence: {about.licence}\n"
        f"official sizes: {sizes or 'none published'}\n"
        f"features:{features}\n\ndownload:\n{about.download}\n\ncite:\n{about.citation}"
    )


class _Progress:
    """Reports how much is done, and the estimated remaining time."""

    def __init__(self, say: Callable[[str], None], unit: str = "examples", scale: float = 1):
        self._say, self._total, self._count = say, 0, 0
        self._unit, self._scale = unit, scale
        self._started = self._said = time.monotonic()

    def begin(self, total: int) -> None:
        self._total, self._started = total, time.monotonic()
        self._say(f"{self._number(total)} {self._unit}")

    def add(self, count: int) -> None:
        self._count += count
        now = time.monotonic()
        if now - self._said > _EVERY and self._count < self._total:
            self._said = now
            left = (now - self._started) / self._count * (self._total - self._count)
            counts = f"{self._number(self._count)} of {self._number(self._total)}"
            self._say(f"{counts} {self._unit}  left {left:.0f} s")

    def _number(self, count: int) -> str:
        return str(count) if self._scale == 1 else f"{count / self._scale:.1f}"
