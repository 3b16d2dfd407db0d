"""Classifies skin lesions of real centres into 8 classes: the Fed-ISIC2019 task of the paper.

Paper: arXiv:2412.19654, sec. 4; the split is FLamby's (Ogier du Terrail et al., NeurIPS 2022). The
paper's public set and foundation model are replaced by PathMNIST and a MobileNetV2 trained on
ImageNet. The image size, 64, is our choice.

    export FEDHELP_DATA_DIR=/path/to/data
    fedhelp teach --config=configs/fed_isic2019.py                          # once
    fedhelp train --config=configs/fed_isic2019.py --workdir=runs/isic      # paper's scale: a GPU
    fedhelp train --config=configs/fed_isic2019.py:cpu --workdir=runs/isic  # two CPU cores

`:cpu` is smaller: 32x32 images, ResNet-32 as the large model, at most 600 training images per
client, batches of 16, 25 rounds.

`:two_layers` is for studies: like `:cpu`, but with networks of two layers and a fifth of the
training images kept for validation.

`:sixteen` is for the study `scarcity`: like `:two_layers`, but lesions of all centres are shared
out at random, in the proportions of `pneumonia.py:sixteen`, among hospitals that are thus alike.
All are tested on the same images, and train on at most 1,000.

Files, in FEDHELP_DATA_DIR or given by --config.data.path and so on: `ham10000_200x150.zip`
(images), `fed_isic2019_ham_split.csv` (official split), `pathmnist_1000_clip.npz` (public images),
`models/mobilenet_v2_1.0_224_quant.tflite` and `models/imagenet_labels.txt` (foundation model).

The results are in docs/results.md. The paper's scale has not been measured.
"""

import os

from ml_collections import config_dict

from fedhelp_jax.experiments.config import default_config


def get_config(scale: str = "paper") -> config_dict.ConfigDict:
    """Returns the settings; `scale` is "paper" (the defaults), "cpu", "two_layers" or "sixteen"."""
    if scale not in ("paper", "cpu", "two_layers", "sixteen"):
        raise ValueError(f"{scale!r} must be paper, cpu, two_layers or sixteen")
    config = default_config()
    config.data.name = "folder"
    config.data.columns.update(
        image="image_id", label="target", site="center", group="lesion_id", split="fold"
    )
    config.data.label_names = ("MEL", "NV", "BCC", "AK", "BKL", "DF", "VASC", "SCC")
    config.data.image_size = 64
    config.public.name = "npz"
    config.teacher.name = "litert"
    config.teacher.output = "MobilenetV2/Logits/Squeeze1"  # before the softmax
    config.teacher.image_size = 224
    folder = os.environ.get("FEDHELP_DATA_DIR")
    if folder:
        config.data.path = os.path.join(folder, "ham10000_200x150.zip")
        config.data.table = os.path.join(folder, "fed_isic2019_ham_split.csv")
        config.public.path = os.path.join(folder, "pathmnist_1000_clip.npz")
        models = os.path.join(folder, "models")
        config.teacher.path = os.path.join(models, "mobilenet_v2_1.0_224_quant.tflite")
        config.teacher.labels = os.path.join(models, "imagenet_labels.txt")

    if scale != "paper":
        config.rounds = 25
        config.batch_size = 16
        config.public_batch_size = 16
        config.data.image_size = 32
        config.data.max_train = 600
        config.roles.large = ("center_1", "center_2")  # named, as the cap makes others as large
        config.model.large = "resnet32"
    if scale in ("two_layers", "sixteen"):
        config.data.validation_fraction = 0.2
        config.model.small = "cnn_small"
        config.model.large = "cnn_large"
        config.evaluate_every = 5
        config.interpolate = (0.25, 0.5, 0.75)
        config.learning_rate = 3e-3
    if scale == "sixteen":
        config.data.columns.site = None
        config.data.split_by = "fractions"
        config.data.fractions = 2 * (0.3,) + 2 * (0.1,) + 4 * (0.03,) + 8 * (0.01,)
        config.data.max_train = 1000
        config.data.test_on = "all"
        config.roles.large = ("client_0", "client_1")
    return config
