"""Fed-IXITiny in a small copy, prepared and compared to FLamby's transforms in float64."""

import gzip
import re
import sys
import zipfile
from math import ceil, floor

import nibabel
import numpy as np
import pytest

from fedhelp_jax.core.errors import UserError
from fedhelp_jax.data.builders.fed_ixi_tiny import FedIxiTiny, area_resize, normalise
from fedhelp_jax.data.builders.prepare import prepare

# As the publisher names them; the last one is not in the table.
SUBJECTS = ("IXI002-Guys-0828", "IXI012-HH-1211", "IXI035-IOP-0873", "IXI013-HH-1212")
EXTRA = "IXI099-Guys-0748"
TABLE = "Patient ID,Manufacturer,Split\n2,0,test\n12,1,test\n35,2,train\n13,1,train"
SHAPE = (48, 60, 48)


def source(subject):
    """A volume and its mask at 83 x 44 x 55, as stored; in one, at a scale of the header."""
    rng = np.random.default_rng(int(subject[3:6]))
    volume = rng.integers(0, 900, (83, 44, 55)).astype(np.int16)
    mask = np.zeros((83, 44, 55), np.uint8)
    low, high = rng.integers(3, 12, 3), rng.integers(30, 40, 3)
    mask[low[0] : high[0], low[1] : high[1], low[2] : high[2]] = 1
    return volume, mask


def slope_of(subject):
    return (0.3, -7.5) if subject == SUBJECTS[1] else (1, 0)


def packed(array, slope=1.0, intercept=0.0):
    image = nibabel.Nifti1Image(array, np.diag([-2, 4, 3.27, 1]))
    data = bytearray(image.to_bytes())
    data[112:120] = np.array([slope, intercept], "<f4").tobytes()  # scl_slope, scl_inter
    return gzip.compress(bytes(data), 1)


def files_of(subject):
    volume, mask = source(subject)
    folder = f"IXI_sample/{subject}"
    return {
        f"{folder}/T1/{subject}_image.nii.gz": packed(volume, *slope_of(subject)),
        f"{folder}/T2/{subject}_image.nii.gz": b"of no use here",
        f"{folder}/label/{subject}_label.nii.gz": packed(mask),
    }


@pytest.fixture(scope="module")
def published():
    """What the archive holds, by name, and what a Mac adds to it."""
    files = {"IXI_sample/IXI.xls": b"demographics"}
    for subject in (*SUBJECTS, EXTRA):
        files |= files_of(subject)
    litter = {
        f"__MACOSX/{name.replace('/IXI0', '/._IXI0')}": b"\0\5\x16\7" for name in list(files)[:2]
    }
    return {**files, **litter, "IXI_sample/.DS_Store": b"\0"}


@pytest.fixture
def manual(tmp_path, published):
    """The download unpacked: a dictionary of its files, written by `write`."""
    return Manual(tmp_path, dict(published))


class Manual:
    def __init__(self, tmp_path, files):
        self.folder, self.data_dir = tmp_path / "manual", tmp_path / "data"
        self.files, self.table = files, TABLE

    def prepare(self, zipped=False):
        self.folder.mkdir(exist_ok=True)
        (self.folder / "metadata_tiny.csv").write_text(self.table)
        if zipped:
            with zipfile.ZipFile(self.folder / "7kd5wj7v7p-3.zip", "w") as archive:
                for name, data in self.files.items():
                    archive.writestr(name, data)
        else:
            for name, data in self.files.items():
                path = self.folder / "7kd5wj7v7p-3" / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data)
        said = []
        prepare("fed_ixi_tiny", str(self.folder), str(self.data_dir), said.append)
        return said

    def read(self, split):
        made = FedIxiTiny(data_dir=str(self.data_dir), file_format="array_record")
        return {e["id"].decode(): e for e in made.as_data_source(split=split)}

    def refused(self, message):
        with pytest.raises(UserError, match=re.escape(message)) as error:
            self.prepare()
        assert "\n" not in str(error.value)


def area(volume, shape):
    """Adaptive average pooling, voxel by voxel, in float64."""
    resized = np.zeros(shape)
    windows = [
        [slice(floor(i * n / out), ceil((i + 1) * n / out)) for i in range(out)]
        for n, out in zip(volume.shape, shape, strict=True)
    ]
    for i, a in enumerate(windows[0]):
        for j, b in enumerate(windows[1]):
            for k, c in enumerate(windows[2]):
                resized[i, j, k] = volume[a, b, c].astype(np.float64).mean()
    return resized


def check(example, subject):
    volume, mask = source(subject)
    slope, intercept = np.float32(slope_of(subject)).astype(np.float64)
    resized = area(volume * slope + intercept, SHAPE)
    expected = (resized - resized.mean()) / resized.std()
    assert example["volume"].dtype == np.float32 and example["mask"].dtype == np.uint8
    np.testing.assert_allclose(example["volume"], expected, rtol=0, atol=2e-6)
    resized = area(mask, SHAPE)
    np.testing.assert_array_equal(example["mask"], np.trunc(resized))
    assert 0 < example["mask"].sum() < (resized > 0).sum()  # thinner than by any other rounding
    assert example["group"].decode() == subject


@pytest.mark.slow
@pytest.mark.parametrize("zipped", [False, True])
def test_it_is_prepared_as_flamby_transforms_it(manual, zipped):
    said = manual.prepare(zipped)
    assert said[-1].endswith("(train 2, test 2)")
    train, test = manual.read("train"), manual.read("test")
    assert set(train) == set(SUBJECTS[2:]) and set(test) == set(SUBJECTS[:2])
    assert {name: int(e["site"]) for name, e in {**train, **test}.items()} == {
        SUBJECTS[0]: 0,
        SUBJECTS[1]: 1,
        SUBJECTS[2]: 2,
        SUBJECTS[3]: 1,
    }
    for subject, example in {**train, **test}.items():
        check(example, subject)
    assert "tensorflow" not in sys.modules


def test_the_archive_beside_what_is_unpacked_of_it_counts_once(manual):
    manual.folder.mkdir()
    with zipfile.ZipFile(manual.folder / "7kd5wj7v7p-3.zip", "w") as archive:
        for name, data in manual.files.items():
            archive.writestr(name, data)
    assert manual.prepare()[-1].endswith("(train 2, test 2)")


def test_official_sizes():
    sizes = FedIxiTiny.about.sizes
    assert sizes == {
        "train guys": 249,
        "test guys": 62,
        "train hh": 145,
        "test hh": 36,
        "train iop": 59,
        "test iop": 15,
    }
    assert sum(sizes.values()) == 566


# --- transforms ---


@pytest.mark.parametrize("shape", [(83, 44, 55), (48, 60, 48), (5, 7, 96), (1, 2, 3)])
def test_area_resize_is_the_mean_of_windows(shape):
    volume = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    np.testing.assert_allclose(area_resize(volume, (12, 9, 48)), area(volume, (12, 9, 48)), 0, 2e-6)


def test_area_resize_equals_pytorch(torch):
    volume = np.random.default_rng(1).normal(size=(83, 44, 55)).astype(np.float32)
    theirs = torch.nn.functional.adaptive_avg_pool3d(torch.from_numpy(volume)[None], SHAPE)[0]
    np.testing.assert_allclose(area_resize(volume, SHAPE), theirs.numpy(), rtol=0, atol=1e-6)
    mask = (volume > -2).astype(np.uint8)
    theirs = torch.nn.functional.adaptive_avg_pool3d(torch.from_numpy(mask)[None].float(), SHAPE)
    ours = area_resize(mask, SHAPE).astype(np.int64)
    np.testing.assert_array_equal(ours, theirs[0].long().numpy())


def test_a_constant_volume_is_normalised_to_zero():
    constant = np.full((3, 4, 5), 0.1, np.float32)
    np.testing.assert_array_equal(normalise(constant), np.zeros((3, 4, 5)))


# --- bad downloads ---

T1 = "IXI_sample/IXI012-HH-1211/T1/IXI012-HH-1211_image.nii.gz"
LABEL = "IXI_sample/IXI012-HH-1211/label/IXI012-HH-1211_label.nii.gz"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("Manufacturer", "Center", "has no column Manufacturer; it has Patient ID, Center, Split"),
        ("2,0,test", "2,3,test", "line 2 (2): Manufacturer must be in 0..2, got '3'"),
        ("2,0,test", "2,0,val", "line 2 (2): Split must be train or test, got 'val'"),
        ("2,0,test", "x,0,test", "line 2 (x): Patient ID must be a number, got 'x'"),
        ("12,1,test", "002,0,test", "has Patient ID IXI002 2 times"),
        (
            "12,1,test",
            "12,0,test",
            "has Manufacturer 0 (Guys) for IXI012, but its folder is called",
        ),
        ("12,1,test", "14,1,test", "1 of 4 T1 volumes are missing: IXI014"),
    ],
)
def test_a_bad_table(manual, old, new, message):
    manual.files = {name: b"" for name in manual.files}
    manual.table = TABLE.replace(old, new)
    manual.refused(message)


def test_no_table(manual):
    manual.table = ""
    manual.refused("metadata_tiny.csv")
    (manual.folder / "metadata_tiny.csv").unlink()
    with pytest.raises(UserError, match=r"needs a file metadata_tiny\.csv, has none"):
        prepare("fed_ixi_tiny", str(manual.folder), str(manual.data_dir))


def test_missing_masks(manual):
    manual.files = {name: data for name, data in manual.files.items() if "/label/" not in name}
    manual.refused("4 of 4 masks are missing: IXI002, IXI012, IXI035, ...")


def test_an_unknown_site(manual):
    manual.files |= {name.replace("HH", "UCL"): data for name, data in manual.files.items()}
    manual.refused("is of site UCL; sites are Guys, HH, IOP")


def test_two_subjects_of_one_number(manual):
    manual.files[T1.replace("HH", "Guys")] = b""
    manual.refused("IXI012-Guys-1211 and IXI012-HH-1211 are both subject IXI012")


def test_two_volumes_of_a_subject(manual):
    manual.files[T1.replace("_image", "_image_2")] = b""
    manual.refused("are both of IXI012-HH-1211")


def other_mask():
    mask = source(SUBJECTS[1])[1]
    mask[0, 0, 0] = 2
    return packed(mask)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        (T1, lambda data: data[: len(data) // 2], "is damaged: Compressed file ended before"),
        (T1, lambda data: data[:-4], "is damaged: Compressed file ended before"),
        (T1, lambda data: data[:-8] + bytes(8), "is damaged: CRC check failed"),
        (T1, lambda data: data[:500] + b"\xff" * 99 + data[599:], "is damaged: "),
        (T1, lambda data: gzip.decompress(data)[:-1], "it ends after 401719 of 401720 bytes"),
        (T1, lambda data: gzip.decompress(data) + b"0", "it goes on after its 401720 bytes"),
        (T1, lambda data: b"", "is no NIfTI file"),
        (T1, lambda data: b"<html>" * 200, "is no NIfTI file"),
        (T1, lambda data: gzip.compress(b"<html>" * 200), "is no NIfTI file"),
        (T1, lambda data: packed(np.zeros((2, 3), np.int16)), "is 2 x 3; it should be D x H x W"),
        (
            T1,
            lambda data: packed(np.full((83, 44, 55), np.nan, np.float32)),
            "voxels are NaN or infinite",
        ),
        (LABEL, lambda data: packed(np.zeros((83, 55, 44), np.uint8)), "is 83 x 55 x 44, but its"),
        (LABEL, lambda data: other_mask(), "_label.nii.gz has label 2; labels are 0, 1"),
        (LABEL, lambda data: packed(np.full((83, 44, 55), 0.5, np.float32)), "has label 0.5; "),
        (LABEL, lambda data: packed(np.full((83, 44, 55), np.nan, np.float32)), "has label nan; "),
    ],
)
def test_a_bad_volume(manual, name, data, message):
    manual.files[name] = data(manual.files[name])
    manual.refused(message)


@pytest.mark.parametrize("dims", [(32767, 32767, 3), (1024, 1024, 1025)])
def test_a_header_that_promises_too_much(manual, dims):
    data = bytearray(gzip.decompress(manual.files[T1]))
    data[42:48] = np.array(dims, "<i2").tobytes()
    manual.files[T1] = gzip.compress(bytes(data), 1)
    manual.refused("at most 2 GiB are read")


@pytest.mark.parametrize(
    ("place", "value"),
    [(42, "<i2"), (70, "<i2"), (108, "<f4")],  # a side of -1, type -1, voxels from byte -1
)
def test_a_header_of_nonsense(manual, place, value):
    data = bytearray(gzip.decompress(manual.files[T1]))
    field = np.array(-1, value).tobytes()
    data[place : place + len(field)] = field
    manual.files[T1] = gzip.compress(bytes(data), 1)
    manual.refused(f"{T1} is damaged: ")


def test_without_nibabel(manual, monkeypatch):
    monkeypatch.setitem(sys.modules, "nibabel", None)
    manual.refused("needs nibabel: pip install 'fedhelp_jax[nifti]'")
