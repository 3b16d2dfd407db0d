"""Reads volumes and masks from NIfTI files, up to a size limit."""

import gzip
import io
import itertools
import math
import zlib
from collections.abc import Collection

import numpy as np

from fedhelp_jax.core.errors import UserError
from fedhelp_jax.data.builders.downloads import KEY
from fedhelp_jax.data.readers.volumes import check_finite

_GZIP = b"\x1f\x8b"
# Limits the bytes of voxels, so that a small file or a wrong header cannot exhaust memory.
_MOST_BYTES = 2**31
# Largest offset between a mask and its volume in voxels; up to it, no voxel moves onto another one.
_APART = 0.5
_FLAT = 1e-6  # smallest volume of a mask's voxel, relative to a voxel of its volume


def check_installed() -> None:
    """Checks that NIfTI files can be read.

    Raises:
      UserError: If nibabel is not installed.
    """
    try:
        import nibabel  # noqa: F401
    except ImportError:
        raise UserError("needs nibabel: pip install 'fedhelp_jax[nifti]'") from None


def read_pair(
    volume: tuple[str, bytes], mask: tuple[str, bytes], labels: Collection[int], modalities: int = 1
) -> tuple[np.ndarray, np.ndarray]:
    """Returns a volume and its mask, both on the axes of the volume's file.

    The volume is not reoriented or resampled; slope and intercept of its header are applied in
    float64. The axes of the mask are permuted and reversed according to the two affines, which map
    voxels to space. A file without an affine (sform and qform codes 0) is assumed to have the
    position and orientation of the other one.

    Args:
      volume: Name and content of a NIfTI file, version 1 or 2, optionally compressed with gzip.
      mask: Name and content of the mask.
      labels: The labels that the mask may have, in 0..255.
      modalities: Number of modalities in the volume's file; several are on the last axis.

    Returns:
      float32 ``[D, H, W]`` or ``[D, H, W, modalities]``, and uint8 ``[D, H, W]``.

    Raises:
      UserError: If a file is not a NIfTI file, is damaged, or is larger than 2 GiB; the volume has
        another shape or voxels that are not finite; the mask has another label or size; or the two
        are more than half a voxel apart.
    """
    (name, volume_data), (mask_name, mask_data) = volume, mask
    values, affine = _read(volume_data, name)
    with np.errstate(over="ignore"):
        values = np.asarray(values, np.float32)
    if values.ndim != 3 + (modalities > 1) or values.shape[3:] not in ((), (modalities,)):
        sides, several = _sides(values.shape), f" x {modalities}" if modalities > 1 else ""
        raise UserError(f"{KEY}: {name} is {sides}; it should be D x H x W{several}")
    check_finite(values, f"{KEY}: {name}")
    classes, mask_affine = _read(mask_data, mask_name)
    classes = _labels(classes, mask_name, labels)
    if affine is not None and mask_affine is not None and classes.ndim == 3:
        classes = _aligned(classes, mask_affine, values.shape[:3], affine, name, mask_name)
    if classes.shape != values.shape[:3]:
        sides = _sides(classes.shape), _sides(values.shape[:3])
        raise UserError(f"{KEY}: {mask_name} is {sides[0]}, but its volume is {sides[1]}")
    return values, classes


def _labels(values: np.ndarray, name: str, labels: Collection[int]) -> np.ndarray:
    with np.errstate(invalid="ignore"):
        mask = values.astype(np.uint8)
    found = np.unique(mask) if np.array_equal(mask, values) else np.unique(values)
    for value in found:
        if value not in labels:
            known = ", ".join(map(str, sorted(labels)))
            raise UserError(f"{KEY}: {name} has label {value:g}; labels are {known}")
    return mask


def _aligned(
    mask: np.ndarray,
    affine: np.ndarray,
    shape: tuple[int, ...],
    volume_affine: np.ndarray,
    name: str,
    mask_name: str,
) -> np.ndarray:
    """Returns the mask with its axes permuted and reversed to match those of the volume."""
    from nibabel.orientations import apply_orientation, inv_ornt_aff, io_orientation

    try:
        # Maps indices in the mask to indices in the volume.
        to_volume = np.linalg.solve(volume_affine, affine)
    except np.linalg.LinAlgError:
        raise UserError(f"{KEY}: the affine of {name} places all voxels on a plane") from None
    if not np.isfinite(to_volume).all() or abs(np.linalg.det(to_volume)) < _FLAT:
        raise UserError(f"{KEY}: the affine of {mask_name} does not tell where its voxels lie")
    orientation = io_orientation(to_volume)
    to_volume = to_volume @ inv_ornt_aff(orientation, mask.shape)
    turned = np.ascontiguousarray(apply_orientation(mask, orientation))
    corners = np.array([*itertools.product(*((0, side - 1) for side in shape))])
    apart = np.abs(corners @ to_volume[:3, :3].T + to_volume[:3, 3] - corners).max()
    if turned.shape == shape and apart > _APART:
        raise UserError(
            f"{KEY}: {mask_name} lies {apart:.1f} voxels from its volume {name}, as the affines of "
            "the two say"
        )
    return turned


def _sides(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


def _read(data: bytes, name: str) -> tuple[np.ndarray, np.ndarray | None]:
    """Returns values and affine of a file; the affine is None if the file does not have one.

    The values have the stored type if the header does not scale them, otherwise float64.
    """
    # Imported here, since few data sets are NIfTI files.
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
        placed = int(header["sform_code"]) > 0 or int(header["qform_code"]) > 0
        affine = np.array(header.get_best_affine(), float) if placed else None
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
        if file.read(1):  # reading to the end also makes gzip verify its checksum
            raise EOFError(f"it goes on after its {size} bytes of voxels")
    except KeyError:
        raise UserError(f"{KEY}: {name} is damaged: its type of voxels is unknown") from None
    except (EOFError, OSError, ValueError, OverflowError, zlib.error, HeaderDataError) as error:
        raise UserError(f"{KEY}: {name} is damaged: {error}") from None
    values = np.frombuffer(voxels, dtype, count, gap).reshape(shape, order="F")
    if (slope or 1, intercept or 0) == (1, 0):
        return values, affine
    values = values * np.float64(1 if slope is None else slope) + np.float64(intercept or 0)
    return values, affine
