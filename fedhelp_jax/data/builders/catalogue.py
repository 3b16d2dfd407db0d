"""Data sets of the TensorFlow Datasets catalogue, prepared by their own builders."""

import contextlib
import io
import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import tensorflow_datasets as tfds
from tensorflow_datasets.core.download import downloader
from tensorflow_datasets.core.download.download_manager import NonMatchingChecksumError
from tensorflow_datasets.core.download.util import DownloadError

from fedhelp_jax.core.errors import UserError, suggest
from fedhelp_jax.core.storage import storage_fault
from fedhelp_jax.data.builders.base import About

# TFDS starts with a wait of 0.2 s and doubles it before each retry. Its default of 10 retries takes
# minutes without a network.
_RETRIES = 4


def has(name: str) -> bool:
    """Returns whether the catalogue has ``NAME`` or ``NAME/CONFIG``, while loading few modules."""
    return name.partition("/")[0] in tfds.list_builders(with_community_datasets=False)


def builder(
    name: str, data_dir: str | None = None, file_format: str | None = None
) -> tfds.core.DatasetBuilder:
    """Returns the builder of a data set of the catalogue.

    Args:
      name: ``NAME`` or ``NAME/CONFIG``.
      data_dir: Folder of prepared data sets; None uses TFDS's default.
      file_format: Format to write; None uses TFDS's default, or the format of an existing copy.

    Raises:
      UserError: If there is no such configuration, a required package is not installed, or the data
        set already exists in another format.
    """
    base, _, config = name.partition("/")
    with _one_line(name):
        known = [one.name for one in tfds.builder_cls(base).BUILDER_CONFIGS]
        if config and config not in known:
            raise UserError(f"{config!r} is not a configuration of {base}{suggest(config, known)}")
        try:
            return tfds.builder(name, data_dir=data_dir, file_format=file_format)
        except ValueError as error:
            raise _refused(name, error) from None


def prepare(
    name: str, made: tfds.core.DatasetBuilder, manual_dir: str | None, say: Callable[[str], None]
) -> None:
    """Downloads and prepares a data set of the catalogue.

    Downloads are kept in ``DATA_DIR/downloads``.

    Args:
      name: The name that the user gave.
      made: Its builder.
      manual_dir: The folder of files that TFDS cannot download.
      say: Called with progress messages.

    Raises:
      UserError: If something cannot be downloaded or is not the file that TFDS expects, a required
        package is not installed, or the disk is full.
    """
    downloads = Path(made.data_dir_root) / "downloads"
    say(f"{name} is of TFDS's catalogue: prepared by its own builder, downloads in {downloads}")
    if not sys.stderr.isatty():
        tfds.disable_progress_bar()
    config = tfds.download.DownloadConfig(manual_dir=manual_dir)
    with _one_line(name):
        made.download_and_prepare(download_dir=downloads, download_config=config)


def about(made: tfds.core.DatasetBuilder) -> About:
    """Returns TFDS's information about a data set."""
    info = made.info
    return About(
        description=info.description,
        homepage=info.homepage,
        licence=info.as_proto.redistribution_info.license or "see the homepage",
        citation=info.citation or "see the homepage",
        download=made.MANUAL_DOWNLOAD_INSTRUCTIONS or "Downloaded by TFDS itself.",
        sizes={split: part.num_examples for split, part in info.splits.items()},
    )


@contextlib.contextmanager
def _one_line(name: str) -> Iterator[None]:
    """Turns errors of TFDS into messages of one line, and suppresses its own output."""
    before, downloader.MAX_RETRIES = downloader.MAX_RETRIES, _RETRIES
    retrying = logging.getLogger("urllib3.connectionpool")
    level = retrying.level
    retrying.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    except ImportError as error:
        # TFDS raises it again with more context, and then only the text has the package's name.
        if "tensorflow" in (error.name or str(error)):
            raise UserError(
                f"{name} of TFDS's catalogue needs TensorFlow to be prepared: pip install "
                "tensorflow, or prepare it elsewhere with file_format=array_record and copy the "
                "folder; what is downloaded is kept"
            ) from None
        raise _refused(name, error) from None
    except (OSError, DownloadError, NonMatchingChecksumError) as error:
        raise _refused(name, error) from None
    except RuntimeError as error:
        if storage_fault(error):
            raise _refused(name, error) from None
        raise
    finally:
        downloader.MAX_RETRIES = before
        retrying.setLevel(level)


def _refused(name: str, error: Exception) -> UserError:
    said = " ".join(str(error).split())
    return UserError(f"{name} of TFDS's catalogue cannot be prepared: {said}")
