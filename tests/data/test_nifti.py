"""A volume and its mask out of NIfTI files."""

import numpy as np
import pytest
from helpers import refusal

nibabel = pytest.importorskip("nibabel")

from nibabel.orientations import axcodes2ornt, inv_ornt_aff, ornt_transform  # noqa: E402

from fedhelp_jax.data.builders.nifti import read_pair  # noqa: E402

RNG = np.random.default_rng(0)
VOLUME = RNG.normal(size=(5, 6, 7)).astype(np.float32)
MASK = RNG.integers(0, 3, (5, 6, 7)).astype(np.uint8)
# Turned a little, of voxels with three sides.
AFFINE = np.array([[2.0, 0.1, 0, -9], [-0.1, 3, 0, 4], [0, 0, 1.5, 7], [0, 0, 0, 1]])


def nifti(array, affine):
    image = nibabel.Nifti1Image(array, None)
    if affine is not None:
        image.header.set_sform(affine, code=1)
    return image.to_bytes()


def read(volume=VOLUME, affine=AFFINE, mask=MASK, mask_affine=AFFINE):
    pair = ("v.nii", nifti(volume, affine)), ("m.nii", nifti(mask, mask_affine))
    return read_pair(*pair, (0, 1, 2))


@pytest.mark.parametrize("codes", ["RAS", "LPS", "PIR", "SLA"])
def test_a_mask_on_other_axes_is_brought_to_those_of_its_volume(codes):
    turn = ornt_transform(axcodes2ornt("RAS"), axcodes2ornt(codes))
    mask = nibabel.orientations.apply_orientation(MASK, turn)
    affine = AFFINE @ inv_ornt_aff(turn, MASK.shape)
    values, labels = read(mask=mask, mask_affine=affine)
    assert np.array_equal(values, VOLUME) and np.array_equal(labels, MASK)


@pytest.mark.parametrize("what", ["shift", "spacing", "rotation"])
def test_a_mask_that_lies_elsewhere_is_refused(what):
    affine = AFFINE.copy()
    if what == "shift":
        affine[0, 3] += 2.5
    elif what == "spacing":
        affine[:3, :3] *= 1.2
    else:
        affine[:3, :3] = affine[:3, :3] @ [[0.95, -0.3, 0], [0.3, 0.95, 0], [0, 0, 1]]
    line = refusal(lambda: read(mask_affine=affine))
    assert line.startswith("--manual_dir: m.nii lies ") and "from its volume v.nii" in line


def test_rounding_and_files_that_do_not_say_where_they_lie_are_no_matter():
    moved = AFFINE.copy()
    moved[:3, 3] += 0.2
    for affine in (moved, None):
        assert np.array_equal(read(mask_affine=affine)[1], MASK)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_voxel_that_is_no_number_is_refused_by_name(value):
    volume = VOLUME.copy()
    volume[1, 2, 3] = value
    line = refusal(lambda: read(volume))
    assert line.startswith("--manual_dir: v.nii: 1 of 210 voxels are NaN or infinite")


def test_a_mask_of_another_size_and_an_affine_of_no_use():
    assert refusal(lambda: read(mask=MASK[1:])) == (
        "--manual_dir: m.nii is 4 x 6 x 7, but its volume is 5 x 6 x 7"
    )
    flat = np.diag([1.0, 1, 0, 1])
    assert "the affine of v.nii places all voxels on a plane" in refusal(lambda: read(affine=flat))
    assert "does not tell where its voxels lie" in refusal(lambda: read(mask_affine=flat))
