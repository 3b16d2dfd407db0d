"""Metrics of one client's whole split; NaN where undefined.

Those of classification are scikit-learn's where it has them. An example whose logits are not all
finite has no answer, which is a wrong one: metrics of answers (accuracy, recall, F1, Dice, IoU)
count it as such, and metrics of scores (AUROC, calibration, loss) are undefined beside it.
"""

from fedhelp_jax.metrics.classification import classification_metrics
from fedhelp_jax.metrics.common import finite_examples
from fedhelp_jax.metrics.segmentation import NO_CLASS, predict_masks, segmentation_metrics

__all__ = [
    "NO_CLASS",
    "classification_metrics",
    "finite_examples",
    "predict_masks",
    "segmentation_metrics",
]
