"""A stand-in for a foundation model: a network trained on the public labels or masks.

It knows nothing beyond the public set, and is called self-trained wherever it appears.
"""

import hashlib
import json
import threading

import jax
import jax.numpy as jnp
import numpy as np

from fedhelp_jax.algorithms.base import Setup, init_own
from fedhelp_jax.algorithms.client import adam_l2, predict
from fedhelp_jax.algorithms.local_training import train_locally
from fedhelp_jax.core.compilation import jit
from fedhelp_jax.core.errors import UserError
from fedhelp_jax.core.random import client_round_key
from fedhelp_jax.data.federation import ClientData, Pool
from fedhelp_jax.data.types import PublicDataset
from fedhelp_jax.models.resnet import resnet
from fedhelp_jax.models.unet import UNETS, unet
from fedhelp_jax.simulation.vectorize import make_mapping, over_clients
from fedhelp_jax.tasks import classification, segmentation
from fedhelp_jax.teachers.base import Fingerprint, Images
from fedhelp_jax.typing import PyTree

_UNET = "unet_small_cpu"
_BATCH = 32
_MASK_BATCH = 4  # mask sets are small: with 32 volumes, a batch of 32 is one step per epoch
_EVAL_BATCH = 64
_LEARNING_RATE = 1e-3
_WEIGHT_DECAY = 1e-4


class SelfTrained:
    """Two networks, each trained on one half of the public set and asked about the other half.

    The networks are ResNet-20 if the public labels are classes of images, and ``unet_small_cpu`` if
    they are masks.

    On its own training images, a network would repeat their labels with more confidence than it can
    have on any new image. The hash of an image determines its half, so identical images share one.

    Args:
      public: Labelled public images; only these are answered.
      epochs: Number of epochs that each network is trained for, at the first question.
      seed: Seed of the initial weights and of the batches.

    Attributes:
      fingerprint: The settings, and a hash of all training data.
      batch_limit: None, for no limit.

    Raises:
      UserError: If the images have no labels, or all fall into one half.
    """

    batch_limit: int | None = None

    def __init__(self, public: PublicDataset, epochs: int, seed: int):
        if public.labels is None or public.label_names is None:
            raise UserError(
                f"teacher.name: a self_trained teacher needs public labels, and {public.name} has "
                "none; use another teacher"
            )
        self._halves = np.array([int(sha[:8], 16) % 2 for sha in public.sha256])
        if len(set(self._halves.tolist())) < 2:
            raise UserError(
                f"public.num_examples: {len(self._halves)} images of {public.name} are too few for "
                "a self_trained teacher, which answers one half of them after training on the other"
            )
        self._public, self._epochs, self._seed = public, epochs, seed
        size = "x".join(map(str, public.images.shape[1:-1]))
        shapes = [public.sha256, public.images.shape, public.labels.shape]
        labels = np.ascontiguousarray(public.labels).tobytes()
        digest = hashlib.sha256(json.dumps(shapes).encode() + labels).hexdigest()[:12]
        self.fingerprint = Fingerprint(
            f"self-trained {_network_name(public)} on {public.name}",
            f"{epochs} epochs of batches of {_batch_size(public)}, seed {seed}, sha256 {digest}",
            f"resized to {size}, signed",
            public.label_names,
        )
        self._lock = threading.Lock()
        self._answers: dict[str, np.ndarray] = {}

    def open(self) -> None:
        """Does nothing; training starts at the first call of `answer`."""

    def answer(self, images: Images) -> np.ndarray:
        """Returns logits over the public labels, from the network not trained on the image.

        The first call trains both networks.

        Returns:
          float32 ``[B, C]``, or ``[B, *spatial, C]`` for masks.

        Raises:
          UserError: If an image is not in the public set that this was made for.
        """
        known = set(self._public.sha256)
        others = [sha for sha in images.sha256 if sha not in known]
        if others:
            raise UserError(
                f"teacher.name: a self_trained teacher answers images of {self._public.name} only; "
                f"{len(others)} of {len(images)} are others, the first has sha256 {others[0]}"
            )
        with self._lock:
            if not self._answers:
                logits = self._train_and_answer()
                self._answers = dict(zip(self._public.sha256, logits, strict=True))
        return np.stack([self._answers[sha] for sha in images.sha256])

    def request_bytes(self, images: Images) -> int:
        """Returns 0, since nothing leaves this machine."""
        return 0

    def close(self) -> None:
        """Discards the answers."""
        with self._lock:
            self._answers = {}

    def _train_and_answer(self) -> np.ndarray:
        """Returns float32 logits ``[P, C]``, or ``[P, *spatial, C]`` for masks."""
        public = self._public
        assert public.labels is not None and public.label_names is not None
        num_classes = len(public.label_names)
        if public.labels.ndim == 1:
            task, model = classification, resnet(20, num_classes)
        else:
            task, model = segmentation(public.label_names), unet(UNETS[_UNET], num_classes)
        batch_size = _batch_size(public)
        setup = Setup(
            task=task,
            num_classes=num_classes,
            sample_shape=public.images.shape[1:],
            models={"small": model},
            tx=adam_l2(_LEARNING_RATE, _WEIGHT_DECAY),
            batch_size=batch_size,
            public_batch_size=batch_size,
            local_epochs=self._epochs,
            public=None,
        )

        def cross_fitted(shared: tuple[jax.Array, Pool], own: PyTree) -> jax.Array:
            run_key, pool = shared
            half, (fitted, fitted_size), (asked, asked_size) = own
            key = client_round_key(run_key, 0, half)
            variables = init_own(setup, model, run_key, half)
            data = ClientData(pool, None, fitted, fitted_size)
            variables, _ = train_locally(setup, model, key, variables, data)
            return predict(model, variables, pool, asked, asked_size, _EVAL_BATCH)

        rows = [np.flatnonzero(self._halves == half) for half in (0, 1)]
        width = max(map(len, rows))
        index = np.stack([np.pad(row, (0, width - len(row))) for row in rows]).astype(np.int32)
        size = np.array([len(row) for row in rows], np.int32)
        pool = Pool(jnp.asarray(public.images), jnp.asarray(public.labels))
        # The halves run like two clients that share the set, in parallel if there are two devices.
        mapping = make_mapping(num_devices=min(2, jax.device_count()))
        own = (np.arange(2, dtype=np.int32), (index, size), (index[::-1], size[::-1]))
        shared = (jax.random.key(self._seed), pool)
        found = np.asarray(jit(over_clients(cross_fitted, mapping))(shared, own))
        logits = np.empty((len(public.sha256), *found.shape[2:]), np.float32)
        for asked, answers in zip(rows[::-1], found, strict=True):
            logits[asked] = answers[: len(asked)]
        return logits


def _network_name(public: PublicDataset) -> str:
    return "resnet20" if public.labels is None or public.labels.ndim == 1 else _UNET


def _batch_size(public: PublicDataset) -> int:
    return _BATCH if public.labels is None or public.labels.ndim == 1 else _MASK_BATCH
