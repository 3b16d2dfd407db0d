"""A linear probe on what a foundation model answers about the client's own images.

It asks what the foundation model is worth without any federation: every client fits a logistic
regression alone, as in `pixel_probe`, with x the model's logits or embedding of an image instead of
its pixels.

Notes: the model must run at the clients (``teacher.name`` litert or onnx); an API would have to be
sent private images. ``fedhelp teach`` stores the answers on this machine first.
"""

from fedhelp_jax.algorithms.base import FederatedAlgorithm, Setup
from fedhelp_jax.algorithms.linear_probe import (
    NO_NETWORK,
    NO_STEPS,
    LinearProbeSettings,
    linear_probe,
)
from fedhelp_jax.algorithms.method import method


@method(LinearProbeSettings, reads_answers=True, unused=(*NO_NETWORK, *NO_STEPS))
def foundation_probe(setup: Setup, settings: LinearProbeSettings) -> FederatedAlgorithm:
    """Linear probe on a foundation model that runs at the clients, each alone.

    Raises:
      UserError: If the run is about masks.
    """
    return linear_probe(setup, settings, "foundation_probe")
