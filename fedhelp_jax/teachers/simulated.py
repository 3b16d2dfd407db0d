"""A simulated foundation model for synthetic public images; it knows their labels."""

import numpy as np

from fedhelp_jax.data.types import PublicDataset
from fedhelp_jax.errors import UserError
from fedhelp_jax.teachers.answers import Answers

_LEAD = 2.0


def simulate_answers(public: PublicDataset, accuracy: float) -> Answers:
    """Logits that name the true class with probability ``accuracy``, else another one.

    ``z ~ N(0, 1)`` per class, and the named class leads the rest by ``2 + |N(0, 1)|``. The draws
    depend on the image alone, so the same image gets the same answer in every run.

    Args:
      public: Public images with labels.
      accuracy: Chance that the largest logit is the label's, in ``(0, 1]``.

    Returns:
      Answers over the public labels, with a fingerprint that says they are simulated.

    Raises:
      UserError: If the public images have no labels.
    """
    if public.labels is None or public.label_names is None:
        raise UserError(
            f"teacher.name: a simulated teacher needs public labels, and {public.name} has none; "
            "use stored answers"
        )
    num_classes = len(public.label_names)
    logits = np.empty((len(public.labels), num_classes), np.float32)
    for row, (sha, label) in enumerate(zip(public.sha256, public.labels, strict=True)):
        rng = np.random.default_rng(int(sha, 16))
        named = label
        if num_classes > 1 and rng.random() >= accuracy:
            named = (label + rng.integers(1, num_classes)) % num_classes
        z = rng.normal(size=num_classes)
        z[named] = z.max() + _LEAD + abs(rng.normal())
        logits[row] = z
    fingerprint = f"simulated (accuracy {accuracy:g})"
    return Answers(logits, public.sha256, public.label_names, fingerprint)
