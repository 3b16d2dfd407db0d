"""The base class of all builders, which makes examples in parallel.

Builders write array_record files and work without TensorFlow. TFDS would need TensorFlow to encode
arrays as images, so builders always pass images that are already encoded.
"""

import contextlib
import csv
import io
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from fedhelp_jax.core.errors import UserError
from fedhelp_jax.data.bad_examples import QUARANTINE, BadExample, refuse_too_many
from fedhelp_jax.data.builders.downloads import KEY, Download
from fedhelp_jax.data.builders.fetch import Remote
from fedhelp_jax.data.builders.resumable_map import SIZE, Example, made
from fedhelp_jax.data.decode import decode_picture


class About(NamedTuple):
    """What a user must know about a data set.

    Attributes:
      description: What the data are.
      homepage: Where the data come from.
      licence: Terms of use.
      citation: BibTeX entries to cite.
      download: What to download, and where to put it.
      sizes: Official numbers of examples, by split, by split and client, or by class. A mismatch is
        reported.
    """

    description: str
    homepage: str
    licence: str
    citation: str
    download: str
    sizes: Mapping[str, int]


class Item(NamedTuple):
    """One example before its files are read.

    Attributes:
      key: Its name, unique in the data set.
      files: Names of its files in the download.
      fields: The features that are already known, such as label or site.
    """

    key: str
    files: tuple[str, ...]
    fields: Mapping[str, Any]


# The only feature of an example that could not be made; its value is the reason.
_BAD = "bad"


class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """A builder of data that the user has downloaded, or that it fetches itself.

    A subclass describes its data (``about``), lists the examples (:meth:`plan`, which reads tables
    and file names, but no images), and makes one example (:meth:`make`, which runs in threads).
    Examples have the feature ``id`` and, depending on the data, ``image`` or ``volume``, ``label``
    or ``mask``, ``site`` (a client) and ``group`` (a patient or lesion, which no split may cut).
    """

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "First release."}

    # Builders have no TFDS metadata files next to their code. Looking for them would need another
    # package.
    code_path = None

    about: About

    # The classes of the feature ``mask``; a single name means one foreground class. Empty if there
    # is no mask, or if only the download has the names, which are then in the metadata.
    mask_names: tuple[str, ...] = ()

    # Examples made at a time. Subclasses reduce it if the examples of two parts would not fit in
    # memory.
    part_size = SIZE

    # Set by the caller that prepares the data set.
    scratch: Path
    allow_repacked: bool = False
    skip_bad: bool = False
    say: Callable[[str], None] = staticmethod(print)
    planned: Callable[[int], None] = staticmethod(lambda count: None)
    done: Callable[[int], None] = staticmethod(lambda count: None)

    @property
    def MANUAL_DOWNLOAD_INSTRUCTIONS(self) -> str:  # noqa: N802  TFDS's own name
        """What to download, and where to put it."""
        return self.about.download

    @abstractmethod
    def features(self) -> dict[str, Any]:
        """Returns the features of an example, except ``id``."""

    def metadata(self) -> tfds.core.MetadataDict | None:
        """Returns metadata of the data set that only the download has; :meth:`plan` fills it in."""
        return None

    def remote(self) -> Remote | None:
        """Returns the only file of the download if it is freely available, otherwise None."""
        return None

    @abstractmethod
    def plan(self, download: Download) -> Mapping[str, Sequence[Item]]:
        """Returns the examples of each split.

        Raises:
          UserError: If the download is incomplete, or not laid out as its publisher does.
        """

    @abstractmethod
    def make(self, download: Download, item: Item) -> Example:
        """Returns the features that are read from an example's files; images are encoded bytes.

        Raises:
          UserError: If a file is damaged, or is not as expected.
        """

    def _info(self) -> tfds.core.DatasetInfo:
        about = self.about
        return tfds.core.DatasetInfo(
            builder=self,
            description=about.description,
            features=tfds.features.FeaturesDict({"id": tfds.features.Text(), **self.features()}),
            homepage=about.homepage,
            citation=about.citation,
            license=about.licence,
            metadata=self.metadata(),
        )

    def download_and_prepare(self, **options: Any) -> None:
        """Prepares the data set as TFDS does, and always closes the archives at the end."""
        self.bad: list[BadExample] = []
        with contextlib.ExitStack() as self._opened:
            super().download_and_prepare(**options)

    def _download_and_prepare(self, *arguments: Any, **options: Any) -> None:
        super()._download_and_prepare(*arguments, **options)
        if self.bad:  # written before TFDS renames the folder, which marks it as complete
            with (Path(self.data_path) / QUARANTINE).open(
                "w", newline="", encoding="utf-8"
            ) as file:
                csv.writer(file, lineterminator="\n").writerows([BadExample._fields, *self.bad])

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        download = self._opened.enter_context(
            Download(Path(dl_manager.manual_dir), self.scratch / "unpacked", self.say)
        )
        plan = self.plan(download)
        for part, count in self._counts(plan).items():
            official = self.about.sizes.get(part, count)
            if count != official:
                self.say(f"{part} has {count} examples, officially {official}")
        self.planned(sum(map(len, plan.values())))
        return {
            split: self._generate_examples(download, split, items) for split, items in plan.items()
        }

    def _counts(self, plan: Mapping[str, Sequence[Item]]) -> Counter[str]:
        """Returns the numbers of examples, with keys as in ``about.sizes``."""
        config, site = self.builder_config, self.features().get("site")
        label = self.features().get("label")
        counts: Counter[str] = Counter()
        for split, items in plan.items():
            counts[split] = len(items)
            if config is not None:
                counts[f"{config.name} {split}"] = len(items)
            if site is not None:
                counts.update(f"{split} {site.names[item.fields['site']]}" for item in items)
            if label is not None:
                counts.update(label.names[item.fields["label"]] for item in items)
        return counts

    # Silences messages about a download size that TFDS does not know.
    def _log_download_bytes(self) -> None: ...

    def _log_download_done(self) -> None: ...

    def _generate_examples(
        self, download: Download, split: str, items: Sequence[Item]
    ) -> Iterator[tuple[str, Example]]:
        # Stamps distinguish examples that were made from older files, or by another version.
        version = str(self.version)
        stamped = [(item, version, *map(download.stamp, item.files)) for item in items]

        def make(one: tuple[Any, ...]) -> Example:
            try:
                return self.make(download, one[0])
            except UserError as error:
                if not self.skip_bad:
                    raise
                return {_BAD: str(error)}

        images = {
            name for name, kind in self.features().items() if isinstance(kind, tfds.features.Image)
        }
        examples = made(stamped, make, self.scratch / split, self.done, self.part_size)
        before = len(self.bad)
        for item, example in zip(items, examples, strict=True):
            if _BAD in example:
                if not self.skip_bad:  # an earlier attempt skipped it
                    raise UserError(example[_BAD])
                site = self.features().get("site")
                client = "" if site is None else site.names[item.fields["site"]]
                files = " ".join(item.files)
                self.bad.append(BadExample(split, client, item.key, files, example[_BAD]))
                continue
            encoded = {name: io.BytesIO(example[name]) for name in images}
            yield item.key, {"id": item.key, **item.fields, **example, **encoded}
        bad = self.bad[before:]
        if bad:
            refuse_too_many(len(bad), len(items), "", f"{split} ", bad[0].reason)


def png(image: np.ndarray) -> bytes:
    """Returns a uint8 image ``[H, W]`` or ``[H, W, 3]`` as a PNG file."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return file.getvalue()


def decoded(data: bytes, name: str) -> Image.Image:
    """Returns an image file of the download, decoded by `decode_picture`.

    Args:
      data: Contents of the file.
      name: Its name, for the message.

    Raises:
      UserError: As in `decode_picture`.
    """
    return decode_picture(data, f"{KEY}: {name}")


def upright(data: bytes, image: Image.Image) -> bytes:
    """Returns an image file unchanged or, if decoding turned it, a JPEG file of the turned image.

    TensorFlow Datasets, and most readers of its data sets, ignore the EXIF orientation.

    Args:
      data: Contents of the file.
      image: The image that `decoded` returned for it.
    """
    if image.format is not None:
        return data
    file = io.BytesIO()
    image.convert("RGB").save(file, "JPEG", quality=95)
    return file.getvalue()
