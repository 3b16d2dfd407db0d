"""A linear probe on pixels: every client fits a logistic regression on its own images, alone.

It is the simplest baseline that there is. With few images, networks are often no better. On the
pixels x of an image, standardised by their mean and deviation over the client's training images:

    min over W, b:  mean CE(W x + b, y) + l2/2 |W|^2        (L-BFGS, all images at once)

Notes: seed, networks, optimizer and batches do not matter. For masks there is no such probe.
"""

from fedhelp_jax.algorithms.base import FederatedAlgorithm, Setup
from fedhelp_jax.algorithms.linear_probe import (
    NO_NETWORK,
    NO_STEPS,
    LinearProbeSettings,
    linear_probe,
)
from fedhelp_jax.algorithms.method import method


@method(LinearProbeSettings, unused=(*NO_NETWORK, *NO_STEPS))
def pixel_probe(setup: Setup, settings: LinearProbeSettings) -> FederatedAlgorithm:
    """Linear probe on pixels: every client fits a logistic regression, alone.

    Raises:
      UserError: If the run is about masks.
    """
    return linear_probe(setup, settings, "pixel_probe")
