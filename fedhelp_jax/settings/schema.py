"""The schema of a run's settings: name, type, default, help and check of each setting.

`fedhelp_jax.experiments.config` assembles these parts into the configuration of a run, and checks
user input against them.
"""

import dataclasses
from typing import Any

from fedhelp_jax.settings.checks import (
    COUNT,
    FRACTION,
    LOCAL,
    PREPARED,
    Check,
    Use,
    at_least,
    either,
    more_than,
    one_of,
    one_of_or,
    some_of,
    unless,
    where,
    whole,
    within,
)
from fedhelp_jax.settings.declare import part, setting

# --- checks --------------------------------------------------------------------------------------


def _are_fractions(values: tuple[float, ...]) -> bool:
    return bool(values) and min(values) > 0 and abs(sum(values) - 1) <= 1e-6


_PART_OR_NONE = Check(lambda value: 0 <= value < 1, "at least 0 and less than 1")
_FRACTIONS = Check(_are_fractions, "positive numbers that add up to 1")
_ASKED = ("open_inference", "hf_zero_shot", "litert", "onnx", "self_trained")
HARMONIZATIONS = ("colour_constancy", "percentile_clip", "z_score")
AUGMENTATIONS = ("flip", "flip_all", "affine", "brightness")
ON_BAD_EXAMPLE = ("refuse", "skip")
COLUMN = "column:"  # prefix of the name of a column whose values become the clients
SHARINGS = ("fractions", "iid", "quantity", "dirichlet", "shards", "clusters")
PIXEL_SCALES = ("uint8", "unit", "signed", "imagenet", "clip")
PIXEL_LAYOUTS = ("nhwc", "nchw")
_WIDTHS = Check(
    lambda value: all(COUNT.passes(width) for width in value), f"numbers of {COUNT.right}"
)
_SIDES = Check(
    lambda value: len(value) == 3 and all(whole(8).passes(side) for side in value),
    f"three sides of {whole(8).right}",
)
_DEVICES = Check(lambda value: 1 <= value <= 1024, "at least 1 and at most 1024")

_ENDPOINTS = ("open_inference", "hf_zero_shot")
_WITH_IMAGES = ("open_inference", "litert", "onnx")  # the format of their pixels is configurable
_FILES = ("folder", "medmnist", "npz_masks", PREPARED)
_PUBLIC_FILES = ("npz", "folder", PREPARED)


def _teacher(*names: str) -> Use:
    # Settings next to an ensemble are the defaults of its members.
    return where("teacher.name", *names, "ensemble")


# --- the schema ---------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class ColumnsConfig:
    """Names of the columns of a table of images; None means the name of the setting itself."""

    image: str | None = setting(None, "column of files in the folder, with their ending or without")
    label: str | None = setting(None, "column of classes, as words or as whole numbers from 0")
    site: str | None = setting(None, "column of hospitals, each of which becomes a client")
    group: str | None = setting(None, "column of patients or lesions, kept on one side of a split")
    split: str | None = setting(None, "column of train, validation or test")
    mask: str | None = setting(None, "column of mask files; masks/ID.png without it")


def _table(section: str) -> Any:
    return setting(
        None,
        "folder: the CSV or Parquet file beside the images; if None the only one in the folder, or "
        "else the folders CLASS or SITE/CLASS tell (docs/own-images.md)",
        LOCAL,
        only=where(f"{section}.name", "folder"),
        identity=False,
    )


def _label_names(section: str) -> Any:
    return setting(
        (),
        "folder: the classes in their order; if empty, words in the order of the alphabet",
        only=where(f"{section}.name", "folder"),
    )


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The private images, and how they are assigned to the clients."""

    name: str = setting(
        "phantoms",
        "private data set; tfds:NAME is one that fedhelp data has prepared, "
        "package.module:function is one of your own",
    )
    path: str | None = setting(
        None,
        "folder or zip of images (folder), .npz file (medmnist, npz_masks), "
        "folder of prepared sets (tfds:; TFDS's default if None)",
        LOCAL,
        only=where("data.name", *_FILES),
        identity=False,
    )
    table: str | None = _table("data")
    columns: ColumnsConfig = part(ColumnsConfig, only=where("data.name", "folder"))
    label_names: tuple[str, ...] = _label_names("data")
    image_size: int = setting(
        32,
        "side in pixels to which images are resized",
        whole(8),
        only=unless("data.name", "phantom_volumes"),
    )
    volume_size: tuple[int, ...] = setting(
        (24, 32, 24),
        "sides in voxels to which volumes are resized",
        _SIDES,
        only=where("data.name", "phantom_volumes", "npz_masks", PREPARED),
    )
    split: str = setting(
        "grouped",
        "official, or grouped: no lesion or patient on both sides of it",
        one_of("grouped", "official"),
        only=where("data.name", "folder", PREPARED),
    )
    split_by: str | None = setting(
        None,
        "clients: by site, fractions, iid, quantity, dirichlet, shards, clusters or column:NAME "
        "(docs/datasets.md); if None by site where there are sites, else by fractions",
        one_of_or(COLUMN, "site", *SHARINGS),
    )
    num_clients: int = setting(
        6,
        "iid, quantity, dirichlet, shards, clusters: how many clients",
        COUNT,
        only=where("data.split_by", "iid", "quantity", "dirichlet", "shards", "clusters"),
    )
    dirichlet_alpha: float = setting(
        0.5,
        "dirichlet, quantity: concentration; the smaller, the more unlike",
        more_than(0),
        only=where("data.split_by", "dirichlet", "quantity"),
    )
    min_examples: int = setting(
        1,
        "the least a client trains and validates on",
        COUNT,
        only=where("data.name", "folder", "medmnist", PREPARED),
    )
    shards_per_client: int = setting(
        2,
        "shards: pieces a client, each of about one class",
        COUNT,
        only=where("data.split_by", "shards"),
    )
    num_examples: int = setting(
        1600,
        "phantoms: images of all clients and splits",
        COUNT,
        only=where("data.name", "phantoms", "phantom_volumes"),
    )
    fractions: tuple[float, ...] = setting(
        (0.60, 0.20, 0.08, 0.06, 0.04, 0.02),
        "fractions: each client's part of the data",
        _FRACTIONS,
        only=where("data.split_by", "fractions", None),
    )
    scanner_shift: bool = setting(
        False, "npz_masks: simulate a scanner of its own for each client of volumes"
    )
    max_train: int | None = setting(None, "cap on one client's training images", COUNT)
    validation_fraction: float = setting(
        0.1, "part of the training images kept for validation", _PART_OR_NONE
    )
    test_fraction: float = setting(
        0.25,
        "part of a client's images for its test, where there is no official test split",
        within(0, 1, closed=False),
        only=unless("data.name", "medmnist"),
    )
    test_on: str = setting(
        "own",
        "test images of each client: its own, or those of all clients, which tell small "
        "differences better",
        one_of("own", "all"),
    )
    harmonize: tuple[str, ...] = setting(
        (),
        "what is done to every image, private and public: colour_constancy, percentile_clip, "
        "z_score (last), in this order",
        some_of(*HARMONIZATIONS),
    )
    augment: tuple[str, ...] = setting(
        (),
        "how private training batches are changed, masks with them: flip (left-right), flip_all "
        "(all axes), affine, brightness",
        some_of(*AUGMENTATIONS),
    )
    on_bad_example: str = setting(
        "refuse",
        "private and public examples whose files cannot be used: refuse the first, or skip and "
        "list them (quarantine.csv)",
        one_of(*ON_BAD_EXAMPLE),
        only=either(where("data.name", *_FILES), where("public.name", *_PUBLIC_FILES)),
        identity=False,  # the data that were read are compared by content
    )
    cache_dir: str | None = setting(
        None, "where decoded images are kept between runs", LOCAL, identity=False
    )


@dataclasses.dataclass(frozen=True)
class PublicConfig:
    """The public images, which all participants have."""

    name: str = setting(
        "phantoms",
        "public data set, or none; tfds:NAME is any that TFDS or fedhelp data has prepared, "
        "package.module:function is one of your own",
    )
    path: str | None = setting(
        None,
        "npz: the file; folder: of images, or a zip of it; tfds: folder of prepared "
        "sets (TFDS's default if None)",
        LOCAL,
        only=where("public.name", *_PUBLIC_FILES),
        identity=False,
    )
    table: str | None = _table("public")
    columns: ColumnsConfig = part(ColumnsConfig, only=where("public.name", "folder"))
    label_names: tuple[str, ...] = _label_names("public")
    num_examples: int | None = setting(
        None, "how many of them to use; if None all, or 512 phantoms, or 64 phantom volumes", COUNT
    )


@dataclasses.dataclass(frozen=True)
class FoundationConfig:
    """One foundation model: where it is, what its inputs and outputs are, and how it is queried."""

    name: str = setting(
        "simulated",
        "simulated, stored (a file of answers), ensemble, none, or asked by fedhelp teach: "
        "open_inference, hf_zero_shot (endpoints), litert, onnx (files), self_trained; "
        "package.module:function is one of your own",
    )
    path: str | None = setting(
        None,
        "stored: file of answers; litert, onnx: the model file",
        LOCAL,
        only=_teacher("stored", "litert", "onnx"),
        identity=False,
    )
    array: str | None = setting(
        None, "stored: its array; logits, else embeddings, if None", only=_teacher("stored")
    )
    accuracy: float = setting(
        0.85, "simulated: how often it is right", FRACTION, only=_teacher("simulated")
    )
    epochs: int = setting(
        10, "self_trained: epochs on the public images", COUNT, only=_teacher("self_trained")
    )
    url: str | None = setting(
        None,
        "endpoints: https://...; http:// for this machine only",
        only=_teacher(*_ENDPOINTS),
        identity=False,
    )
    model: str | None = setting(
        None, "endpoints: the model's name there", only=_teacher(*_ENDPOINTS)
    )
    version: str | None = setting(
        None, "endpoints: its version; answers are stored under it", only=_teacher(*_ENDPOINTS)
    )
    template: str | None = setting(
        None, "hf_zero_shot: sentence around a label, with {}", only=_teacher("hf_zero_shot")
    )
    scores: str = setting(
        "softmax",
        "hf_zero_shot: what it answers, a softmax over the labels, or a sigmoid of each (SigLIP)",
        one_of("softmax", "sigmoid"),
        only=_teacher("hf_zero_shot"),
    )
    api_key_env: str | None = setting(
        None,
        "endpoints: NAME of the environment variable that holds the key",
        only=_teacher(*_ENDPOINTS),
        identity=False,
    )
    api_key_file: str | None = setting(
        None,
        "endpoints: file of mode 0600 that holds the key",
        LOCAL,
        only=_teacher(*_ENDPOINTS),
        identity=False,
    )
    labels: str | None = setting(
        None,
        "text file of the model's classes, one a line",
        LOCAL,
        only=_teacher("open_inference", "hf_zero_shot", "litert", "onnx"),
        identity=False,
    )
    input: str | None = setting(
        None,
        "name of the input tensor; if None, input (open_inference) or the only one (onnx)",
        only=_teacher("open_inference", "onnx"),
    )
    output: str | None = setting(
        None, "name of the output tensor; the first if None", only=_teacher(*_WITH_IMAGES)
    )
    image_size: int | None = setting(
        None, "side that images are resized to; native if None", COUNT, only=_teacher(*_WITH_IMAGES)
    )
    scale: str = setting(
        "uint8", "pixel values the model takes", one_of(*PIXEL_SCALES), only=_teacher(*_WITH_IMAGES)
    )
    layout: str = setting(
        "nhwc", "axes of the images it takes", one_of(*PIXEL_LAYOUTS), only=_teacher(*_WITH_IMAGES)
    )
    head: str | None = setting(
        None,
        "turns embeddings into logits: probe (fitted on public labels) or class vectors .npz",
        LOCAL,
        only=_teacher(*_ASKED, "stored"),
        identity=False,
    )
    store: str = setting(
        "answers", "folder of the store of answers", LOCAL, only=_teacher(*_ASKED), identity=False
    )
    dtype: str = setting(
        "float32", "of stored answers", one_of("float32", "float16"), only=_teacher(*_ASKED)
    )
    top_k: int | None = setting(
        None, "store only so many of the largest logits", COUNT, only=_teacher(*_ASKED)
    )
    batch_size: int = setting(16, "images a request", COUNT, only=_teacher(*_ASKED), identity=False)
    concurrency: int = setting(
        4, "requests under way at once", COUNT, only=_teacher(*_ASKED), identity=False
    )
    requests_per_second: float | None = setting(
        None, "at most; no limit if None", more_than(0), only=_teacher(*_ASKED), identity=False
    )
    timeout: float = setting(
        30.0, "seconds for a request", more_than(0), only=_teacher(*_ENDPOINTS), identity=False
    )
    max_attempts: int = setting(
        5, "times a request is tried", COUNT, only=_teacher(*_ASKED), identity=False
    )
    max_backoff: float = setting(
        60.0,
        "longest pause in seconds before a try",
        at_least(0),
        only=_teacher(*_ASKED),
        identity=False,
    )
    max_queries: int | None = setting(
        None,
        "most images ever sent to the model, tries counted; no limit if None",
        whole(0),
        only=_teacher(*_ASKED),
        identity=False,
    )
    price_per_query: float | None = setting(
        None, "of an image, for the plan", at_least(0), only=_teacher(*_ASKED), identity=False
    )


@dataclasses.dataclass(frozen=True)
class TeacherConfig(FoundationConfig):
    """The foundation model, or ensemble of them, whose answers on public images are distilled."""

    members: tuple[FoundationConfig, ...] = setting(
        (), "ensemble: dicts of the settings above; what one leaves out is as they are here"
    )
    weights: tuple[float, ...] = setting((), "ensemble: of the members; equal if empty")


@dataclasses.dataclass(frozen=True)
class RolesConfig:
    """Which clients are large."""

    top_n: int = setting(
        2,
        "so many clients with the most training images are large",
        whole(0),
        only=where("roles.large", ()),
    )
    large: tuple[str, ...] = setting((), "names of the large clients; overrides top_n")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The two architectures."""

    small: str = setting("resnet20", "small clients, and the proxy of large ones")
    large: str = setting("resnet110", "large clients")
    small_widths: tuple[int, ...] = setting(
        (), "channels of each level of the small U-Net; those of its name if empty", _WIDTHS
    )
    large_widths: tuple[int, ...] = setting((), "the same of the large one", _WIDTHS)
    norm: str = setting(
        "batch",
        "normalisation of U-Nets; other networks have batch",
        one_of("batch", "group", "none"),
    )
    remat: bool = setting(False, "U-Nets keep fewer activations, and compute them twice")
    compute_dtype: str = setting(
        "float32",
        "of activations; bfloat16 still sums, normalises and keeps parameters in float32, and "
        "saves no time on CPUs",
        one_of("float32", "bfloat16"),
    )
    precision: str = setting(
        "default",
        "of float32 products on accelerators; default: TF32 on NVIDIA GPUs since Ampere, bfloat16 "
        "on TPUs; high: TF32, three bfloat16 passes; highest: float32, six passes",
        one_of("default", "high", "highest"),
    )


@dataclasses.dataclass(frozen=True)
class ServerConfig:
    """What the server does with the clients' mean, for all methods that average parameters."""

    optimizer: str = setting(
        "none",
        "none: takes the mean; sgd (FedAvgM), adam (FedAdam), yogi (FedYogi): a step towards it",
        one_of("none", "sgd", "adam", "yogi"),
    )
    learning_rate: float | None = setting(
        None,
        "its rate; 1 for sgd, 0.01 for adam and yogi if None",
        more_than(0),
        only=unless("server.optimizer", "none"),
    )
    momentum: float = setting(
        0.9, "its momentum, or beta_1", _PART_OR_NONE, only=unless("server.optimizer", "none")
    )
    beta2: float = setting(
        0.99,
        "beta_2 of adam and yogi",
        _PART_OR_NONE,
        only=where("server.optimizer", "adam", "yogi"),
    )
    eps: float = setting(
        1e-3,
        "tau of adam and yogi, in the denominator",
        more_than(0),
        only=where("server.optimizer", "adam", "yogi"),
    )


@dataclasses.dataclass(frozen=True)
class MappingConfig:
    """How clients are mapped to devices; this affects only speed and rounding."""

    cpu_devices: int | None = setting(
        None, "CPU devices; one per core (at most 8) if None", _DEVICES, identity=False
    )
    chunk_size: int | None = setting(
        None,
        "clients vectorised at a time on a device; 0: all; None: 1 on CPU, on accelerators as many "
        "as fit in memory",
        whole(0),
        identity=False,
    )
    max_device_bytes: int = setting(
        0,
        "most bytes of private images on a device, the rest waiting on the host; 0: all are there",
        at_least(0),
        identity=False,
    )
