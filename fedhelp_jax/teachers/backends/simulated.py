"""A simulated foundation model for synthetic public images, which knows their labels or masks."""

import numpy as np
from scipy import ndimage

from fedhelp_jax.core.errors import UserError
from fedhelp_jax.data.types import PublicDataset
from fedhelp_jax.teachers.answers import Answers

_LEAD = 2.0


def simulated(public: PublicDataset, accuracy: float = 0.85) -> Answers:
    """Returns logits that favour the true class with probability ``accuracy``, else another one.

    For an image, ``z ~ N(0, 1)`` per class, and the favoured class leads the rest by
    ``2 + |N(0, 1)|``. For a mask, the same holds for each pixel, except that the lead is drawn once
    per image. The wrong pixels, a share of ``1 - accuracy``, lie together where a smooth random
    field is largest. With one foreground class, the logit is plus or minus the lead. The draws
    depend only on the image, so the same image gets the same answer in every run.

    Args:
      public: Public images with labels.
      accuracy: Probability that the true class has the largest logit, in ``(0, 1]``.

    Returns:
      Answers over the public labels, with a fingerprint that says they are simulated. Masks have
      the resolution of the public ones.

    Raises:
      UserError: If the public images have no labels.
    """
    if public.labels is None or public.label_names is None:
        raise UserError(
            f"teacher.name: a simulated teacher needs public labels, and {public.name} has none; "
            "use stored answers"
        )
    num_classes = len(public.label_names)
    draw = _image_logits if public.labels.ndim == 1 else _mask_logits
    logits = np.empty((*public.labels.shape, num_classes), np.float32)
    for row, (sha, label) in enumerate(zip(public.sha256, public.labels, strict=True)):
        logits[row] = draw(label, num_classes, accuracy, np.random.default_rng(int(sha, 16)))
    fingerprint = f"simulated (accuracy {accuracy:g})"
    return Answers(logits, public.sha256, public.label_names, fingerprint)


def _image_logits(
    label: np.ndarray, num_classes: int, accuracy: float, rng: np.random.Generator
) -> np.ndarray:
    named = label
    if num_classes > 1 and rng.random() >= accuracy:
        named = (label + rng.integers(1, num_classes)) % num_classes
    z = rng.normal(size=num_classes)
    z[named] = z.max() + _LEAD + abs(rng.normal())
    return z


def _mask_logits(
    mask: np.ndarray, num_classes: int, accuracy: float, rng: np.random.Generator
) -> np.ndarray:
    """Returns logits ``[*mask, C]``."""
    classes = max(2, num_classes)
    field = ndimage.gaussian_filter(rng.normal(size=mask.shape), [n / 12 for n in mask.shape])
    wrong = field > np.quantile(field, accuracy)
    named = np.where(wrong, (mask + rng.integers(1, classes)) % classes, mask)
    lead = _LEAD + abs(rng.normal())
    if num_classes == 1:
        return np.where(named > 0, lead, -lead)[..., None]
    z = rng.normal(size=(*mask.shape, classes))
    top = z.max(axis=-1) + lead
    np.put_along_axis(z, named[..., None], top[..., None], axis=-1)
    return z
