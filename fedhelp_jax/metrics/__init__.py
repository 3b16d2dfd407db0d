"""Computes metrics of one client's whole split; they are NaN where undefined.

Classification metrics agree with scikit-learn's where it has them. An example whose logits are not
all finite has no answer. Metrics of answers (accuracy, recall, F1, Dice, IoU) count it as wrong,
and metrics of scores (AUROC, calibration, loss) are undefined for its split.
"""

from fedhelp_jax.metrics.classification import classification_metrics
from fedhelp_jax.metrics.common import finite_examples
from fedhelp_jax.metrics.segmentation import NO_CLASS, predict_masks, segmentation_metrics

# The metrics that runs report, by name; masks of several classes also have Dice and IoU per class.
METRICS = {
    "balanced_accuracy": "classification, the headline: mean recall over the classes there are",
    "accuracy": "classification: share of right answers",
    "macro_f1": "classification: mean F1 over classes",
    "auroc": "classification: one-against-rest area under the ROC curve, mean over classes",
    "ece": "classification: expected calibration error, 15 bins",
    "loss": "classification: mean cross-entropy in nats",
    "dice": "segmentation, the headline: mean Dice over foreground classes and examples",
    "iou": "segmentation: mean intersection over union",
    "hd95": "segmentation, final test: 95th percentile of distances between borders",
    "non_finite": "both: examples whose logits are not all finite",
}

__all__ = [
    "METRICS",
    "NO_CLASS",
    "classification_metrics",
    "finite_examples",
    "predict_masks",
    "segmentation_metrics",
]
