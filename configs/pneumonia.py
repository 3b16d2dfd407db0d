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

`:sixteen` is for the studies `scarcity`, `relevance`, `ablations` and `baselines`: the images are
shared out at random among two large hospitals with 1,570 images each, and small ones with 523
(two), 157 (four) and 52 (eight), of which a fifth is kept for validation. All are tested on the
same 624 test images, since the 6 to 62 of their own would tell nothing. The networks have two
layers, for two CPU cores.

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
    """Returns the settings; `scale` is "paper" (the defaults), "cpu" or "sixteen"."""
    if scale not in ("paper", "cpu", "sixteen"):
        raise ValueError(f"{scale!r} must be paper, cpu or sixteen")
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
    elif scale == "sixteen":
        config.data.split_by = "fractions"
        config.data.fractions = 2 * (0.3,) + 2 * (0.1,) + 4 * (0.03,) + 8 * (0.01,)
        config.data.validation_fraction = 0.2
        config.data.test_on = "all"
        config.roles.large = ("client_0", "client_1")
        config.model.small = "cnn_small"
        config.model.large = "cnn_large"
        config.rounds = 25
        config.evaluate_every = 5
        config.interpolate = (0.25, 0.5, 0.75)
        config.batch_size = 16
        config.public_batch_size = 16
        config.learning_rate = 3e-3
    return config
