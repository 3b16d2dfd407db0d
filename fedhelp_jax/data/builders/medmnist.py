"""MedMNIST: 18 data sets of small biomedical images or volumes, from the publisher's files."""

import importlib.resources
import json
import threading
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from fedhelp_jax.core.errors import UserError
from fedhelp_jax.data.builders.base import About, Builder, Item, png
from fedhelp_jax.data.builders.downloads import KEY, Download, check_size, md5_of
from fedhelp_jax.data.builders.fetch import Remote
from fedhelp_jax.data.builders.resumable_map import Example
from fedhelp_jax.data.cache import NPZ_ERRORS

# By name: source, task, licence, dimensions, channels, official counts, labels, and MD5 by size.
SUBSETS: dict[str, dict[str, Any]] = json.loads(
    importlib.resources.files("fedhelp_jax.data.builders")
    .joinpath("medmnist.json")
    .read_text("utf-8")
)
_URL = "https://zenodo.org/records/10519652/files"
_SPLITS = {"train": "train", "validation": "val", "test": "test"}

_CITATION = """\
@article{medmnistv2, title={{MedMNIST} v2: a large-scale lightweight benchmark for 2{D} and 3{D}
  biomedical image classification}, author={Yang, Jiancheng and Shi, Rui and Wei, Donglai and Liu,
  Zequan and Zhao, Lin and Ke, Bilian and Pfister, Hanspeter and Ni, Bingbing},
  journal={Scientific Data}, volume={10}, number={1}, pages={41}, year={2023},
  doi={10.1038/s41597-022-01721-8}}
@inproceedings{medmnistv1, title={{MedMNIST} Classification Decathlon: A Lightweight {AutoML}
  Benchmark for Medical Image Analysis}, author={Yang, Jiancheng and Shi, Rui and Ni, Bingbing},
  booktitle={IEEE 18th International Symposium on Biomedical Imaging (ISBI)}, pages={191--195},
  year={2021}, doi={10.1109/ISBI48211.2021.9434062}}"""


class Medmnist(Builder):
    """One of MedMNIST's data sets at one of its sizes, with the official splits."""

    BUILDER_CONFIGS = [
        tfds.core.BuilderConfig(name=f"{subset}_{size}", description=facts["source"])
        for subset, facts in SUBSETS.items()
        for size in facts["md5"]
    ]

    about = About(
        description="18 sets of small biomedical images (28, 64, 128 or 224 pixels) or volumes (28 "
        "or 64 voxels), each with its official splits.",
        homepage="https://medmnist.com/",
        licence="CC BY 4.0; DermaMNIST CC BY-NC 4.0",
        citation=_CITATION,
        download="Fetched by itself, or one folder with the set's .npz file (<name>_<size>.npz, or "
        f"<name>.npz for 28) from {_URL}/<file>?download=1.",
        sizes={},
    )

    def __init__(self, *, config: str | tfds.core.BuilderConfig | None = None, **options: Any):
        if config is not None:
            self.about = _about(config if isinstance(config, str) else config.name)
        super().__init__(config=config, **options)

    def features(self) -> dict[str, Any]:
        """Returns the features: a PNG image or a volume, and its class or ChestMNIST's findings."""
        subset, size = _parts(self._config_name)
        facts, n = SUBSETS[subset], int(size)
        label = {"label": tfds.features.ClassLabel(names=facts["labels"])}
        if _many(facts):
            shape = (len(facts["labels"]),)
            label = {"labels": tfds.features.Tensor(shape=shape, dtype=np.uint8)}
        if facts["dimensions"] == 3:
            shape = (n, n, n)
            picture = tfds.features.Tensor(shape=shape, dtype=np.uint8, encoding="zlib")
            return {"volume": picture, **label, "group": tfds.features.Text()}
        image = tfds.features.Image(shape=(n, n, facts["channels"]), encoding_format="png")
        return {"image": image, **label, "group": tfds.features.Text()}

    def remote(self) -> Remote:
        """Returns the file of the data set."""
        subset, size = _parts(self._config_name)
        return Remote(_url(subset, size), _file(subset, size), SUBSETS[subset]["md5"][size])

    def plan(self, download: Download) -> Mapping[str, Sequence[Item]]:
        """Returns the official splits; each id is its own group, as patients are not published."""
        subset, size = _parts(self._config_name)
        facts, n = SUBSETS[subset], int(size)
        name = download.find(_file(subset, size))
        self._stored = _Stored(download.folder / name)
        if not self._stored.path.exists():
            raise UserError(f"{KEY}={download.folder}: {name} lies in an archive; unpack it")
        shape = (n,) * facts["dimensions"] + ((facts["channels"],) if facts["channels"] > 1 else ())
        labels = {split: self._labels(split, facts, shape) for split in _SPLITS}
        self._check_md5(facts["md5"][size])
        items = {}
        for split in _SPLITS:
            items[split] = []
            for i, label in enumerate(labels[split]):
                key = f"{split}_{i:06}"
                known = {"labels": label} if _many(facts) else {"label": int(label[0])}
                items[split].append(Item(key, (name,), {**known, "group": key}))
        return items

    def _labels(self, split: str, facts: dict[str, Any], shape: tuple[int, ...]) -> np.ndarray:
        """Returns a split's labels, ``[N, 1]`` or ``[N, L]``; checks them and the images' shape."""
        name, where = _SPLITS[split], f"{KEY}: {self._stored.path}"
        found, dtype = self._stored.header(f"{name}_images")
        if dtype != np.uint8 or found[1:] != shape:
            raise UserError(
                f"{where}: {name}_images must be uint8 of shape {('N', *shape)}, got {dtype} of "
                f"{found}"
            )
        labels, columns = self._stored.read(f"{name}_labels"), len(facts["labels"])
        right = (found[0], columns if _many(facts) else 1)
        if labels.dtype.kind not in "iu" or labels.shape != right:
            raise UserError(
                f"{where}: {name}_labels must be integers of shape {right}, got {labels.dtype} of "
                f"{labels.shape}"
            )
        classes = 2 if _many(facts) else columns
        bad = np.argwhere((labels < 0) | (labels >= classes))
        if len(bad):
            raise UserError(
                f"{where}: {name}_labels must be in 0..{classes - 1}, got {labels[tuple(bad[0])]} "
                f"at {bad[0][0]}"
            )
        return labels.astype(np.uint8)

    def _check_md5(self, official: str) -> None:
        path = self._stored.path
        md5 = md5_of(path)
        if md5 != official:
            said = f"{path} is not the official file: its md5 is {md5}, not {official}"
            if not self.allow_repacked:
                raise UserError(
                    f"{KEY}: {said}; download it anew, or add --allow_repacked if it was repacked "
                    f"on purpose"
                )
            self.say(said)

    def make(self, download: Download, item: Item) -> Example:
        """Returns the image as a PNG file, or the volume."""
        split, _, number = item.key.rpartition("_")
        picture = self._stored.shared(f"{_SPLITS[split]}_images")[int(number)]
        if "volume" in self.features():
            return {"volume": picture}
        return {"image": png(picture)}

    @property
    def _config_name(self) -> str:
        assert self.builder_config is not None
        return self.builder_config.name


class _Stored:
    """An .npz file, read without pickles; only the images of one split are in memory at a time."""

    def __init__(self, path: Path):
        self.path = path
        self._lock = threading.Lock()
        self._shared: tuple[str, np.ndarray] | None = None

    def header(self, name: str) -> tuple[tuple[int, ...], np.dtype]:
        """Returns shape and type of an array without reading it; refuses files of absurd size."""
        try:
            with zipfile.ZipFile(self.path) as archive, archive.open(f"{name}.npy") as file:
                check_size(self.path, archive)
                version = np.lib.format.read_magic(file)
                if version == (1, 0):
                    shape, _, dtype = np.lib.format.read_array_header_1_0(file)
                else:
                    shape, _, dtype = np.lib.format.read_array_header_2_0(file)
                return shape, dtype
        except NPZ_ERRORS as error:
            raise self._refused(name, error) from None

    def read(self, name: str) -> np.ndarray:
        """Returns an array."""
        try:
            # The file is opened here because np.load leaves a damaged file open.
            with self.path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
                return arrays[name]
        except NPZ_ERRORS as error:
            raise self._refused(name, error) from None

    def shared(self, name: str) -> np.ndarray:
        """Returns an array shared by all threads, which is kept until another one is requested."""
        with self._lock:
            if self._shared is None or self._shared[0] != name:
                self._shared = None  # frees its memory before the next array is read
                self._shared = name, self.read(name)
            return self._shared[1]

    def _refused(self, name: str, error: Exception) -> UserError:
        return UserError(
            f"{KEY}: array {name} of {self.path} cannot be read; the file is damaged, or no .npz "
            f"file without pickled objects: {' '.join(str(error).split())}"
        )


def _parts(config: str) -> tuple[str, str]:
    subset, _, size = config.rpartition("_")
    return subset, size


def _file(subset: str, size: str) -> str:
    return f"{subset}.npz" if size == "28" else f"{subset}_{size}.npz"


def _url(subset: str, size: str) -> str:
    return f"{_URL}/{_file(subset, size)}?download=1"


def _many(facts: dict[str, Any]) -> bool:
    return facts["task"].startswith("multi-label")


def _about(config: str) -> About:
    subset, size = _parts(config)
    if size not in SUBSETS.get(subset, {"md5": ()})["md5"]:
        return Medmnist.about  # TFDS will refuse the name
    facts, file = SUBSETS[subset], _file(subset, size)
    said = f"volumes of {size} voxels" if facts["dimensions"] == 3 else f"images of {size} pixels"
    return About(
        description=f"{facts['title']} of MedMNIST v2: {facts['source']}; {said} a side, task "
        f"{facts['task']}, official splits. Patients are not published, so that no split by "
        "patient can be checked or made.",
        homepage="https://medmnist.com/",
        licence=facts["licence"],
        citation=_CITATION,
        download=f"""\
Fetched by itself where --manual_dir is left out. Or else one folder with
- {file} (md5 {facts["md5"][size]}), as it is, from
  {_url(subset, size)}""",
        sizes=dict(zip(_SPLITS, facts["counts"], strict=True)),
    )
