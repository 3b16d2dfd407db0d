"""Detects pneumonia in chest X-rays: the paper's second classification task, on PneumoniaMNIST.

Paper: arXiv:2412.19654, sec. 4 (six clients with .60/.20/.08/.06/.04/.02 of the data, two large).
The images are MedMNIST's, 28x28 (Yang et al., Scientific Data 2023), instead of NIH's. PathMNIST
and a MobileNetV2 trained on ImageNet replace the public set and the foundation model.

    export FEDHELP_DATA_DIR=/path/to/data
    fedhelp teach --config=configs/pneumonia.py                                   # once
    fedhelp train --config=configs/pneumonia.py --workdir=runs/pneumonia          # a GPU
    fedhelp train --config=configs/pneumonia.py:cpu --workdir=runs/pneumonia_cpu  # two CPU cores

`:cpu` is smaller: ResNet-32 as the large model, at most 400 training images per client, batches of
16, 8 rounds.

Files, in FEDHELP_DATA_DIR or given by --config.data.path and --config.public.path:
`pneumoniamnist_rebuilt.npz` or MedMNIST's own `pneumoniamnist.npz`, `pathmnist_1000_clip.npz`
(public images), and `models/mobilenet_v2_1.0_224_quant.tflite` and `models/imagenet_labels.txt`
(foundation model).

The results are in docs/results.md. The paper's scale has not been measured.
"""

import os

from ml_collections import config_dict

from fedhelp_jax.experiments.config import default_config


def get_config(scale: str = "paper") -> config_dict.ConfigDict:
    """Returns the settings; `scale` is "paper" or "cpu". The defaults are the paper's."""
    if scale not in ("paper", "cpu"):
        raise ValueError(f"{scale!r} must be paper or cpu")
    config = default_config()
    config.data.name = "medmnist"
    config.data.image_size = 28
    config.public.name = "npz"
    config.teacher.name = "litert"
    config.teacher.output = "MobilenetV2/Logits/Squeeze1"  # before the softmax
    config.teacher.image_size = 224
    folder = os.environ.get("FEDHELP_DATA_DIR")
    if folder:
        config.data.path = os.path.join(folder, "pneumoniamnist_rebuilt.npz")
        config.public.path = os.path.join(folder, "pathmnist_1000_clip.npz")
        models = os.path.join(folder, "models")
        config.teacher.path = os.path.join(models, "mobilenet_v2_1.0_224_quant.tflite")
        config.teacher.labels = os.path.join(models, "imagenet_labels.txt")

    if scale == "cpu":
        config.rounds = 8
        config.batch_size = 16
        config.public_batch_size = 16
        config.data.max_train = 400
        config.roles.large = ("client_0", "client_1")  # named, as the cap makes others as large
        config.model.large = "resnet32"
    return config
