"""What all builders have in common: about the data, and examples made in parallel.

Builders write array_record and work without TensorFlow, which would encode arrays as images: here
images are always handed over encoded.
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
    """What a user must know of a data set.

    Attributes:
      description: What it is.
      homepage: Where it comes from.
      licence: On what terms.
      citation: BibTeX of what to cite.
      download: What to download, and where it must lie.
      sizes: Official sizes, by split or by split and client, for who checks theirs.
    """

    description: str
    homepage: str
    licence: str
    citation: str
    download: str
    sizes: Mapping[str, int]


class Item(NamedTuple):
    """One example before its images are read.

    Attributes:
      key: Its name, unique in the data set.
      files: What it is read from, names in the download.
      fields: What is known of it already, features that are no images.
    """

    key: str
    files: tuple[str, ...]
    fields: Mapping[str, Any]


# The only feature of an example that could not be made: why.
_BAD = "bad"


class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """A builder whose data the user has downloaded, or that fetches them itself.

    A subclass says what its data are (``about``), which examples there are (:meth:`plan`, which
    reads tables and names, but no image), and makes one example (:meth:`make`, in threads).
    Examples have the feature ``id``, and by what there is ``image`` or ``volume``, ``label`` or
    ``mask``, ``site`` (a client) and ``group`` (a patient or lesion, which no split may cut).
    """

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "First release."}

    # No files of TFDS's own kind lie beside a builder, and it would need another package to look.
    code_path = None

    about: About

    # The classes of the feature ``mask``: one name for one foreground class. Empty where there is
    # no mask, or where only the download has the names, which are in the metadata then.
    mask_names: tuple[str, ...] = ()

    # Examples made at a time; fewer where those of two parts would not fit in memory.
    part_size = SIZE

    # Set by who prepares.
    scratch: Path
    allow_repacked: bool = False
    skip_bad: bool = False
    say: Callable[[str], None] = staticmethod(print)
    planned: Callable[[int], None] = staticmethod(lambda count: None)
    done: Callable[[int], None] = staticmethod(lambda count: None)

    @property
    def MANUAL_DOWNLOAD_INSTRUCTIONS(self) -> str:  # noqa: N802  TFDS calls it so
        """What to download, and where it must lie."""
        return self.about.download

    @abstractmethod
    def features(self) -> dict[str, Any]:
        """The features of an example but for ``id``."""

    def metadata(self) -> tfds.core.MetadataDict | None:
        """For what only the download tells of the whole set; :meth:`plan` fills it in."""
        return None

    def remote(self) -> Remote | None:
        """The file that is the whole download, where anybody may fetch it without asking."""
        return None

    @abstractmethod
    def plan(self, download: Download) -> Mapping[str, Sequence[Item]]:
        """The examples of each split.

        Raises:
          UserError: If the download is not complete, or not as its publisher lays it out.
        """

    @abstractmethod
    def make(self, download: Download, item: Item) -> Example:
        """The features of an example that come of its files; images encoded, as bytes.

        Raises:
          UserError: If a file is damaged, or not what it should be.
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
        """As TFDS does it; archives are closed at its end, or where it fails."""
        self.bad: list[BadExample] = []
        with contextlib.ExitStack() as self._opened:
            super().download_and_prepare(**options)

    def _download_and_prepare(self, *arguments: Any, **options: Any) -> None:
        super()._download_and_prepare(*arguments, **options)
        if self.bad:  # written before TFDS gives the folder its name, which says that it is whole
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
        """How many examples there are, by the names that ``about.sizes`` has for parts."""
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

    # What TFDS would print instead of a size that it does not know.
    def _log_download_bytes(self) -> None: ...

    def _log_download_done(self) -> None: ...

    def _generate_examples(
        self, download: Download, split: str, items: Sequence[Item]
    ) -> Iterator[tuple[str, Example]]:
        # What was made before the files changed, or by another version, is told apart by these.
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
                if not self.skip_bad:  # an earlier attempt left it out
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
    """An image ``[H, W]`` or ``[H, W, 3]`` of uint8 as a PNG file."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return file.getvalue()


def decoded(data: bytes, name: str) -> Image.Image:
    """An image file of the download, as `decode_picture` returns it.

    Args:
      data: The file.
      name: Its name, for the message.

    Raises:
      UserError: As `decode_picture`.
    """
    return decode_picture(data, f"{KEY}: {name}")


def upright(data: bytes, image: Image.Image) -> bytes:
    """An image file as it is; if it was turned when it was decoded, a JPEG file of the result.

    TensorFlow Datasets, and most who read what it stores, do not look at the EXIF orientation.

    Args:
      data: The file.
      image: What `decoded` made of it.
    """
    if image.format is not None:
        return data
    file = io.BytesIO()
    image.convert("RGB").save(file, "JPEG", quality=95)
    return file.getvalue()
