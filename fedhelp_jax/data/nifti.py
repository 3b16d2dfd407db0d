"""Volumes and masks out of NIfTI files, read within bounds."""

import gzip
import io
import math
import zlib
from collections.abc import Collection

import numpy as np

from fedhelp_jax.data.downloads import KEY
from fedhelp_jax.errors import UserError

_GZIP = b"\x1f\x8b"
# Of voxels: so that a small file, or one whose header is wrong, cannot take all memory.
_MOST_BYTES = 2**31


def check_installed() -> None:
    """Checks that NIfTI files can be read.

    Raises:
      UserError: If nibabel is not installed.
    """
    try:
        import nibabel  # noqa: F401
    except ImportError:
        raise UserError("needs nibabel: pip install 'fedhelp_jax[nifti]'") from None


def read_volume(data: bytes, name: str) -> np.ndarray:
    """The values of a NIfTI file, float32, on the file's own axes.

    Nothing is turned or resampled; slope and intercept of the header are applied, in float64.

    Args:
      data: The file, version 1 or 2, compressed with gzip or not.
      name: Its name, for the message.

    Raises:
      UserError: If it is no NIfTI file, truncated or otherwise damaged, or larger than 2 GiB.
    """
    with np.errstate(over="ignore"):
        return np.asarray(_read(data, name), np.float32)


def read_mask(data: bytes, name: str, labels: Collection[int]) -> np.ndarray:
    """The labels of a NIfTI file, uint8, on the file's own axes.

    Args:
      data: The file, as of :func:`read_volume`.
      name: Its name, for the message.
      labels: Which there may be, in 0..255.

    Raises:
      UserError: As :func:`read_volume`, or if it has another label.
    """
    values = _read(data, name)
    with np.errstate(invalid="ignore"):
        mask = values.astype(np.uint8)
    found = np.unique(mask) if np.array_equal(mask, values) else np.unique(values)
    for value in found:
        if value not in labels:
            known = ", ".join(map(str, sorted(labels)))
            raise UserError(f"{KEY}: {name} has label {value:g}; labels are {known}")
    return mask


def check_same_shape(volume: tuple[int, ...], mask: tuple[int, ...], name: str) -> None:
    """Checks that a mask has the size of its volume.

    Raises:
      UserError: If it does not.
    """
    if volume != mask:
        sides = " x ".join(map(str, mask)), " x ".join(map(str, volume))
        raise UserError(f"{KEY}: {name} is {sides[0]}, but its volume is {sides[1]}")


def _read(data: bytes, name: str) -> np.ndarray:
    """The values, as they are stored if the header scales nothing, otherwise float64."""
    # Loaded here, since few data sets come as NIfTI files.
    from nibabel.nifti1 import Nifti1Header
    from nibabel.nifti2 import Nifti2Header
    from nibabel.spatialimages import HeaderDataError

    stream = io.BytesIO(data)
    file = gzip.GzipFile(fileobj=stream) if data.startswith(_GZIP) else stream
    try:
        start = file.read(Nifti1Header.sizeof_hdr)
        kind = Nifti1Header if start[344:348] == b"n+1\0" else Nifti2Header
        if kind is Nifti2Header:
            start += file.read(Nifti2Header.sizeof_hdr - len(start))
            if start[4:8] != b"n+2\0" or len(start) < Nifti2Header.sizeof_hdr:
                raise UserError(f"{KEY}: {name} is no NIfTI file")
        header = kind(start, check=False)
        shape, dtype = header.get_data_shape(), header.get_data_dtype()
        slope, intercept = header.get_slope_inter()
        gap = int(header["vox_offset"]) - len(start)
        count = math.prod(shape)
        if dtype.kind not in "iuf" or not shape or min(shape) < 1 or gap < 0:
            raise HeaderDataError(f"its header says {dtype} of shape {shape}")
        size = count * dtype.itemsize
        if size + gap > _MOST_BYTES:
            raise UserError(f"{KEY}: {name} would take {size + gap} bytes; at most 2 GiB are read")
        voxels = file.read(gap + size)
        if len(voxels) < gap + size:
            raise EOFError(f"it ends after {max(len(voxels) - gap, 0)} of {size} bytes of voxels")
        if file.read(1):  # or else it is at its end, where gzip compares the checksum
            raise EOFError(f"it goes on after its {size} bytes of voxels")
    except KeyError:
        raise UserError(f"{KEY}: {name} is damaged: its type of voxels is unknown") from None
    except (EOFError, OSError, ValueError, OverflowError, zlib.error, HeaderDataError) as error:
        raise UserError(f"{KEY}: {name} is damaged: {error}") from None
    values = np.frombuffer(voxels, dtype, count, gap).reshape(shape, order="F")
    if (slope or 1, intercept or 0) == (1, 0):
        return values
    return values * np.float64(1 if slope is None else slope) + np.float64(intercept or 0)
