"""Opens, decodes and resizes the files of a data set prepared by TensorFlow Datasets.

A data set has an ``image`` or ``volume``, a ``label`` or ``mask``, and optionally ``site``,
``group`` and other columns, named as in `fedhelp_jax.data.builders`. The files must have the format
array_record, which can be read without TensorFlow.
"""

import contextlib
import itertools
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fedhelp_jax.core.errors import UserError, suggest
from fedhelp_jax.data.bad_examples import Bad
from fedhelp_jax.data.decode import DECODE_ERRORS, decode_picture
from fedhelp_jax.data.partition.clients import GROUP, SITE
from fedhelp_jax.data.readers.images import native, resize
from fedhelp_jax.data.readers.masks import class_masks, same_aspect, stored_values, unnamed_classes
from fedhelp_jax.data.readers.volumes import check_finite, resize_mask, resize_volume
from fedhelp_jax.data.types import image_sha256

_AT_ONCE = 256  # examples read before they are decoded


class StoredSet:
    """An open prepared data set, and what is requested from it.

    Args:
        name: NAME or NAME/CONFIG.
        data_dir: Folder of prepared data sets; None uses TFDS's default.
        key: The configuration key that names the data set, for messages.
        masks: Whether labels are masks rather than classes.
        image_size: Height and width of images.
        volume_size: Sides of volumes.

    Raises:
        UserError: The data set is unknown, not prepared or damaged, or lacks what is requested.
    """

    def __init__(
        self,
        name: str,
        data_dir: str | None,
        key: str,
        masks: bool,
        image_size: int,
        volume_size: tuple[int, ...],
    ):
        import tensorflow_datasets as tfds  # imported here, since it takes a second

        self.name, self.key, self.masks = name, key, masks
        self._made = _opened(name, data_dir, key)
        self.folder = Path(self._made.data_path)
        self.files = sorted(path.name for path in self.folder.iterdir())
        self.features: dict[str, Any] = dict(sorted(self._made.info.features.items()))
        order = {split: _split_order(split) for split in self._made.info.splits}
        self.splits = sorted(order, key=lambda split: order[split])
        self._counts = {split: self._made.info.splits[split].num_examples for split in self.splits}
        self.count = sum(self._counts.values())
        self.picture = next((k for k in ("image", "volume") if k in self.features), None)
        if self.picture is None:
            raise UserError(
                f"{key}: {name} has no image or volume; it has {', '.join(self.features)}"
            )
        if not self.count:
            raise UserError(f"{key}: {name} in {self.folder} is empty")
        self.volumes = self.picture == "volume"
        if self.volumes and not masks:
            raise UserError(
                f"{key}: {name} holds volumes, and no network here tells classes of volumes"
            )
        self._size = tuple(volume_size) if self.volumes else (image_size, image_size)
        for feature in ("image", "mask"):
            kind = self.features.get(feature)
            if kind is None or (feature == "mask" and self.volumes):
                continue
            grey = feature == "mask" and kind.shape[-1] != 1
            if not isinstance(kind, tfds.features.Image) or kind.np_dtype != np.uint8 or grey:
                raise UserError(
                    f"{key}: {feature} of {name} must be an image of 8 bits"
                    f"{' and one channel' if feature == 'mask' else ''}, got {kind}"
                )
        target = "mask" if masks else "label"
        kind = self.features.get(target)
        labelled = kind is not None and (masks or isinstance(kind, tfds.features.ClassLabel))
        self.target = target if labelled else None
        self.what = f"prepared 3 {self.picture} {target} {'x'.join(map(str, self._size))}"
        skip = {
            column: tfds.decode.SkipDecoding()
            for column, kind in self.features.items()
            if isinstance(kind, tfds.features.Image)
        }
        try:
            self._sources = {
                split: self._made.as_data_source(split, decoders=skip) for split in self.splits
            }
        except NotImplementedError:
            raise UserError(
                f"{key}: {name} in {self.folder} is not in array_record files, which are read here "
                "without TensorFlow; prepare it with file_format=array_record"
            ) from None

    def columns(self) -> dict[str, Sequence[str] | None]:
        """Returns the metadata columns and the names of their values, None for texts and integers.

        Raises:
            UserError: Sites or groups have an unsupported type; they must not be overlooked.
        """
        import tensorflow_datasets as tfds

        found: dict[str, Sequence[str] | None] = {}
        for column, kind in self.features.items():
            if isinstance(kind, tfds.features.ClassLabel):
                found[column] = kind.names
            elif isinstance(kind, tfds.features.Tensor):  # texts are tensors too
                dtype: Any = kind.np_dtype
                whole = isinstance(kind, tfds.features.Text) or np.issubdtype(dtype, np.integer)
                if whole and kind.shape == () and column != "id":
                    found[column] = None
        for column in (SITE, GROUP):
            if column in self.features and column not in found:
                raise UserError(
                    f"{self.key}: {column} of {self.name} must be a class, a text or a whole "
                    f"number, got {self.features[column]}"
                )
        return found

    def kinds(self, count: int) -> dict[str, tuple[str, tuple[int | None, ...]]]:
        """Returns type and shape of pictures and targets, for the cache."""
        dtype = "float32"
        if not self.volumes or self.features["volume"].np_dtype == np.uint8:
            dtype = "uint8"
        kinds: dict[str, tuple[str, tuple[int | None, ...]]] = {
            "images": (dtype, (count, *self._size, None))
        }
        if self.target is not None:
            kinds["targets"] = (
                ("uint8", (count, *self._size)) if self.masks else ("int32", (count,))
            )
        return kinds

    def all(self) -> list[tuple[str, int]]:
        """Returns the split of each example, and its position in that split."""
        return [(split, i) for split in self.splits for i in range(self._counts[split])]

    def rows(
        self, places: Sequence[tuple[str, int]], *, hashed: bool, skip: bool
    ) -> Iterator[dict[str, Any]]:
        """Yields the examples at these positions, decoded and resized.

        If `skip` is True, a bad example has an `error` in place of the entries that it concerns.
        """
        columns = self.columns()

        def row(one: tuple[tuple[str, int], dict[str, Any]]) -> dict[str, Any]:
            (split, i), example = one
            identity = _identity(split, i, example)
            found: dict[str, Any] = {"split": split, "id": identity}
            where = f"{self.key}: example {identity} of {self.name}"
            found["columns"] = {
                column: _text(example[column]) if names is None else int(example[column])
                for column, names in columns.items()
            }
            try:
                picture = self._native(example, where)
                found["image"] = self._resized(picture)
                if hashed:
                    found["sha256"] = image_sha256(picture)
                if self.target is not None:
                    found["target"] = self._target(example, picture.shape, where)
            except UserError as error:
                if not skip:
                    raise
                found["error"] = error
            return found

        with ThreadPoolExecutor(os.cpu_count()) as pool, self._undamaged():
            for split, part in itertools.groupby(places, key=lambda place: place[0]):
                while some := list(itertools.islice(part, _AT_ONCE)):
                    examples = self._sources[split].__getitems__([i for _, i in some])
                    yield from pool.map(row, zip(some, examples, strict=True))

    def tell(self, rows: Sequence[dict[str, Any]], bad: Bad) -> None:
        """Reports the rows that have an error to `bad`."""
        for place, row in enumerate(rows):
            if "error" in row:
                bad.found(place, row["error"])
        bad.check(len(rows), f"{self.key}: {self.name}")

    def original(self, place: tuple[str, int]) -> np.ndarray:
        """Returns a picture at its native size."""
        split, i = place
        with self._undamaged():
            example = self._sources[split][i]
            where = f"{self.key}: example {_identity(split, i, example)} of {self.name}"
            return self._native(example, where)

    @contextlib.contextmanager
    def _undamaged(self) -> Iterator[None]:
        try:
            yield
        except DECODE_ERRORS as error:
            said = " ".join(str(error).split())
            raise UserError(
                f"{self.key}: {self.name} in {self.folder} cannot be read: {said}; if it is "
                "damaged, remove it and prepare it anew"
            ) from error

    def labels(
        self, targets: np.ndarray, ids: Sequence[str], where: str, bad: Bad, *, least: int = 0
    ) -> tuple[np.ndarray, tuple[str, ...]]:
        """Returns checked classes (at least ``least``) or masks, and the classes' names."""
        if not self.masks:
            names = tuple(self.features["label"].names)
            for place in np.flatnonzero((targets < least) | (targets >= len(names))).tolist():
                said = f"{where}: label {targets[place]} of example {ids[place]}"
                bad.found(place, UserError(f"{said} is not in 0..{len(names) - 1}"))
            return targets, names
        names = self.mask_names
        if names is None:
            values = stored_values(bad.drop(targets), where)
            names = unnamed_classes(values, ("foreground",), f"{where}: masks", "metadata")
        return class_masks(targets, names, ids, where, bad), names

    @property
    def mask_names(self) -> tuple[str, ...] | None:
        """Names of the classes of masks; None if the classes are known only from the masks."""
        from fedhelp_jax.data.builders import BUILDERS

        known = (self._made.info.metadata or {}).get("labels")
        if isinstance(known, dict):
            return tuple(name for _, name in sorted((int(i), name) for i, name in known.items()))
        ours = BUILDERS.get(base_name(self.name))
        if ours is not None and ours.mask_names:
            return ours.mask_names
        return None

    def _native(self, example: dict[str, Any], where: str) -> np.ndarray:
        if not self.volumes:
            return native(decode_picture(example["image"], where))
        volume = example["volume"]
        if volume.dtype != np.uint8:
            with np.errstate(over="ignore"):
                volume = volume.astype(np.float32, copy=False)
        check_finite(volume, where)
        return volume

    def _resized(self, picture: np.ndarray) -> np.ndarray:
        if self.volumes:
            return resize_volume(picture, self._size)
        return resize(Image.fromarray(picture).convert("RGB"), self._size[0])

    def _target(self, example: dict[str, Any], shape: tuple[int, ...], where: str) -> np.ndarray:
        if not self.masks:
            return np.asarray(example["label"], np.int32)
        mask = example["mask"]
        if isinstance(mask, bytes):
            mask = np.asarray(decode_picture(mask, f"{where}, its mask,").convert("L"))
        mask = mask.reshape(mask.shape[: len(self._size)])
        if not same_aspect(mask.shape, shape[: len(self._size)]):
            sides = [" x ".join(map(str, sides)) for sides in (mask.shape, shape)]
            raise UserError(f"{where} has a mask of {sides[0]}, of another aspect than {sides[1]}")
        return resize_mask(mask, self._size)


def stacked(rows: Sequence[dict[str, Any]], name: str) -> np.ndarray:
    """Returns the entries `name` of all rows as one array, blank for rows without this entry."""
    blank = np.zeros_like(next(row[name] for row in rows if name in row))
    return np.stack([row.get(name, blank) for row in rows])


def _opened(name: str, data_dir: str | None, key: str) -> Any:
    """Returns the builder of the data set: one of our own, or of any set that TFDS has prepared."""
    from google.protobuf.json_format import ParseError
    from tensorflow_datasets.core import read_only_builder, registered

    from fedhelp_jax.data.builders import BUILDERS
    from fedhelp_jax.data.builders.prepare import builder

    if base_name(name) in BUILDERS:
        made = builder(name, data_dir)
        if not Path(made.data_path).exists():
            source = "" if made.remote() else " --manual_dir=DOWNLOAD"
            raise UserError(
                f"{key}: {name} is not prepared in {made.data_dir_root}: fedhelp data prepare "
                f"{name}{source} --data_dir={made.data_dir_root}"
            )
        return made
    try:
        return read_only_builder.builder_from_files(name, data_dir=data_dir)
    except registered.DatasetNotFoundError:
        root = data_dir or "TFDS's folder"
        raise UserError(
            f"{key}: {name} is not prepared in {root}, and is none of fedhelp data list"
            f"{suggest(base_name(name), BUILDERS)}"
        ) from None
    except (ValueError, ParseError) as error:
        said = " ".join(str(error).split())
        raise UserError(f"{key}: {name} cannot be opened: {said}") from None


def base_name(name: str) -> str:
    """Returns NAME of NAME[/CONFIG][:VERSION]."""
    return name.partition("/")[0].partition(":")[0]


def file_name(name: str) -> str:
    """Returns the name of a data set in a form that is usable as a file name."""
    return name.replace("/", "_").replace(":", "_")


def _identity(split: str, place: int, example: dict[str, Any]) -> str:
    return _text(example.get("id", f"{split} {place:09}"))


def order_of(row: dict[str, Any]) -> tuple[Any, ...]:
    """Returns the sort key of a row: its site, or split if there are no sites, and then its id."""
    site = row["columns"].get(SITE)
    return _split_order(row["split"]) if site is None else site, row["id"]


def _split_order(split: str) -> tuple[int, str]:
    place = {"train": 0, "validation": 2, "test": 3}
    return place.get(split, 1), split


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
