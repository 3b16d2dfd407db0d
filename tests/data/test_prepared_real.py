"""Real images in their publishers' layouts, prepared and read back equal.

The images at hand are smaller than what publishers hand out; names, folders and formats are theirs.
"""

import gzip
import io
import json

import nibabel
import numpy as np
from PIL import Image

from fedhelp_jax.data.builders.lung_masks import LungMasks
from fedhelp_jax.data.builders.prepare import prepare
from fedhelp_jax.data.sources import load_federated
from fedhelp_jax.settings.schema import DataConfig


def write_png(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, compress_level=1)


def test_lungs_of_two_hospitals(real, tmp_path):
    """Official sizes by hospital; Montgomery's masks as left and right, merged again."""
    stored = np.load(real / "lung_cxr_seg_128.npz")
    images, masks, names = (stored[key] for key in ("images", "masks", "names"))
    folder, expected = tmp_path / "download", []
    sites = ("CHNCXR", "MCUCXR")
    for i, (image, mask) in enumerate(zip(images, masks, strict=True)):
        white = np.where(mask > 0, np.uint8(255), np.uint8(0))
        name = names[i].removesuffix(".png")
        site = sites.index(name[:6])
        if site == 0:
            write_png(folder / f"ChinaSet_AllFiles/CXR_png/{name}.png", image)
            write_png(folder / f"mask/{name}_mask.png", white)
        else:
            write_png(folder / f"MontgomerySet/CXR_png/{name}.png", image)
            for side, half in (("left", np.s_[:, 64:]), ("right", np.s_[:, :64])):
                part = np.zeros_like(white)
                part[half] = white[half]
                write_png(folder / f"MontgomerySet/ManualMask/{side}Mask/{name}.png", part)
        expected.append((site, name, i))
    said = []
    prepare("lung_masks", str(folder), str(tmp_path / "data"), said.append)
    assert not any("officially" in line for line in said)
    config = DataConfig(
        name="tfds:lung_masks",
        path=str(tmp_path / "data"),
        image_size=128,
        cache_dir=str(tmp_path / "cache"),
    )
    data = load_federated(config, 0, masks=True)
    order = [i for _, _, i in sorted(expected)]
    np.testing.assert_array_equal(data.images, np.repeat(images[order][..., None], 3, axis=-1))
    np.testing.assert_array_equal(data.labels, masks[order] > 0)
    assert data.label_names == ("lung",)
    sizes = {client.name: sum(map(len, client[1:])) for client in data.clients}
    assert {f"train {name}": size for name, size in sizes.items()} == LungMasks.about.sizes


def nifti(array):
    file = io.BytesIO(nibabel.Nifti1Image(array, np.eye(4)).to_bytes())
    return gzip.compress(file.getvalue(), 1)


def test_hippocampi(real, tmp_path):
    """All 260 cases, as floats."""
    stored = np.load(real / "hippocampus_3d_48x64x48.npz")
    volumes, labels = stored["volumes"], stored["labels"]
    folder = tmp_path / "download/Task04_Hippocampus"
    for name in ("imagesTr", "labelsTr"):
        (folder / name).mkdir(parents=True)
    cases = [name.removesuffix(".nii.gz") for name in stored["names"].tolist()]
    for case, volume, mask in zip(cases, volumes, labels, strict=True):
        (folder / f"imagesTr/{case}.nii.gz").write_bytes(nifti(volume))
        (folder / f"labelsTr/{case}.nii.gz").write_bytes(nifti(mask.astype(np.uint8)))
    listed = {
        "name": "Hippocampus",
        "modality": {"0": "MRI"},
        "labels": {"0": "background", "1": "Anterior", "2": "Posterior"},
        "numTraining": 260,
        "training": [
            {"image": f"./imagesTr/{case}.nii.gz", "label": f"./labelsTr/{case}.nii.gz"}
            for case in cases
        ],
        "test": [],
    }
    (folder / "dataset.json").write_text(json.dumps(listed))
    said = []
    download = str(tmp_path / "download")
    prepare("msd/task04_hippocampus", download, str(tmp_path / "data"), said.append)
    assert len(cases) == 260 and not any("officially" in line for line in said)
    config = DataConfig(
        name="tfds:msd/task04_hippocampus",
        path=str(tmp_path / "data"),
        volume_size=volumes.shape[1:],
        fractions=(0.45, 0.45, 0.10),
        cache_dir=str(tmp_path / "cache"),
    )
    data = load_federated(config, 0, masks=True)
    np.testing.assert_array_equal(data.images, volumes[..., None].astype(np.float32))
    np.testing.assert_array_equal(data.labels, labels)
    assert data.label_names == ("background", "Anterior", "Posterior")
    sizes = [sum(map(len, client[1:])) for client in data.clients]
    assert sizes == [117, 117, 26]
