"""``fedhelp data``: lists, describes, prepares and checks data sets."""

import sys
from pathlib import Path

from fedhelp_jax.cli.command import CONFIG, OUTPUT, Command, Flag, Given
from fedhelp_jax.cli.process import printed, settings_of
from fedhelp_jax.core.errors import UserError
from fedhelp_jax.core.terminal import wrapped

_ON_BAD_EXAMPLE = ("refuse", "skip")


def _list(given: Given) -> int:
    from fedhelp_jax.data.builders.prepare import names

    print("\n".join(names()))
    return printed()


def _describe(given: Given) -> int:
    from fedhelp_jax.data.builders.prepare import describe

    print(describe(_one_name(given)))
    return printed()


def _prepare(given: Given) -> int:
    from fedhelp_jax.data.builders.prepare import prepare

    prepare(
        _one_name(given),
        given["manual_dir"],
        given["data_dir"],
        allow_repacked=bool(given["allow_repacked"]),
        on_bad_example=given["on_bad_example"],
    )
    return 0


def _check(given: Given) -> int:
    from fedhelp_jax.experiments.check_data import check_data

    folder = None if given["workdir"] is None else Path(given["workdir"])
    return 0 if check_data(settings_of(given), folder, _say) else 2


def _say(line: str) -> None:
    print(wrapped(line, sys.stdout, len(line) - len(line.lstrip()) + 4))


def _one_name(given: Given) -> str:
    if len(given.rest) != 1:
        raise UserError("name one data set of fedhelp data list, e.g. fed_isic2019")
    return given.rest[0]


_NAME = "NAME[/CONFIG]"
_CATALOGUE = (
    "NAME is one of fedhelp data list, or of the catalogue of TensorFlow Datasets, such as "
    "cifar100."
)

DATA_LIST = Command(
    "data list", "print the data sets that can be prepared", ("fedhelp data list",), _list
)
DESCRIBE = Command(
    "data describe",
    "print what to download for a data set, where it must lie, its licence and citation",
    ("fedhelp data describe fed_isic2019",),
    _describe,
    arguments=_NAME,
    more=_CATALOGUE,
)
PREPARE = Command(
    "data prepare",
    "prepare a data set out of its publisher's download, or fetch it",
    ("fedhelp data prepare fed_isic2019 --manual_dir=DOWNLOAD --data_dir=PREPARED",),
    _prepare,
    (
        Flag(
            "manual_dir",
            "the folder of the download, as its publisher hands it out; archives in it need not be "
            "unpacked. MedMNIST and the catalogue are fetched to DATA_DIR/downloads if left out",
            "folder",
            "FOLDER",
        ),
        Flag(
            "data_dir",
            "where prepared sets lie; $TFDS_DATA_DIR or ~/tensorflow_datasets if left out. An "
            "interrupted preparation goes on from what it has made there",
            "folder",
            "FOLDER",
        ),
        Flag("allow_repacked", "take a file whose checksum is not the published one", "switch"),
        Flag(
            "on_bad_example",
            "skip leaves out examples whose files cannot be used, and lists them in quarantine.csv "
            "in the folder of the prepared set; refuse ends at the first",
            choices=_ON_BAD_EXAMPLE,
        ),
        *OUTPUT,
    ),
    arguments=_NAME,
    more=_CATALOGUE,
)
CHECK = Command(
    "data check",
    "read what a run would read, and print clients, splits, classes, sizes and unusable files",
    (
        "fedhelp data check --config=configs/own_images.py --config.data.path=hospital_x \\\n"
        "    --workdir=sheets",
    ),
    _check,
    (
        CONFIG,
        Flag(
            "workdir",
            "where a sheet of each client's images is drawn, if given",
            "folder",
            "FOLDER",
        ),
    ),
    settings=True,
)
