"""Federated methods. One file each; adding one takes that file and a line in ``ALGORITHMS``."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from fedhelp_jax.algorithms.base import FederatedAlgorithm
from fedhelp_jax.algorithms.centralized import CentralizedSettings, centralized
from fedhelp_jax.algorithms.ditto import DittoSettings, ditto
from fedhelp_jax.algorithms.fedavg import FedAvgSettings, fedavg
from fedhelp_jax.algorithms.fedbn import FedBNSettings, fedbn
from fedhelp_jax.algorithms.feddf import FedDFSettings, feddf
from fedhelp_jax.algorithms.fedgh import FedGHSettings, fedgh
from fedhelp_jax.algorithms.fedhelp import fedhelp
from fedhelp_jax.algorithms.fedhelp_losses import FedHelpSettings
from fedhelp_jax.algorithms.fedkd import FedKDSettings, fedkd
from fedhelp_jax.algorithms.fedmd import FedMDSettings, fedmd
from fedhelp_jax.algorithms.fedproto import FedProtoSettings, fedproto
from fedhelp_jax.algorithms.fedprox import FedProxSettings, fedprox
from fedhelp_jax.algorithms.fedtype import FedTypeSettings, fedtype
from fedhelp_jax.algorithms.fml import FMLSettings, fml
from fedhelp_jax.algorithms.local import LocalSettings, local
from fedhelp_jax.algorithms.per_fedavg import PerFedAvgSettings, per_fedavg
from fedhelp_jax.algorithms.pfedme import PFedMeSettings, pfedme
from fedhelp_jax.algorithms.scaffold import ScaffoldSettings, scaffold


class Method(NamedTuple):
    """A method by name.

    Attributes:
      build: ``(setup, settings) -> FederatedAlgorithm``.
      settings: The type of its settings.
      uses_public: Whether it learns from the public images.
      uses_teacher: Whether it learns from the foundation model's answers about them.
      pools_data: Whether it needs all clients' data in one place, as no federated method does.
      plain_sgd: Whether its rule takes plain SGD, and no other optimizer.
      unused: Settings, or parts of them, that change nothing in it, besides those that follow from
        the above.
      schedules: ``settings -> bool``, whether anything in it depends on the number of rounds.
    """

    build: Callable[..., FederatedAlgorithm]
    settings: type[Any]
    uses_public: bool = False
    uses_teacher: bool = False
    pools_data: bool = False
    plain_sgd: bool = False
    unused: tuple[str, ...] = ()
    schedules: Callable[[Any], bool] = lambda settings: False

    def ignores(self, key: str) -> bool:
        """Whether a setting, by its dotted key, changes nothing in this method."""
        unused = self.unused
        if not self.uses_public:
            unused += ("public", "public_batch_size")
        if not self.uses_teacher:
            unused += ("teacher",)
        return any(key == name or key.startswith(f"{name}.") for name in unused)


# What is for servers that average the clients' networks, and for large networks.
_AVERAGE = ("server", "client_weights")
_LARGE = ("model.large", "model.large_widths")


ALGORITHMS: Mapping[str, Method] = {
    "fedhelp": Method(fedhelp, FedHelpSettings, uses_public=True, uses_teacher=True),
    "local": Method(local, LocalSettings, unused=_AVERAGE),
    "centralized": Method(centralized, CentralizedSettings, pools_data=True, unused=_AVERAGE),
    "fedavg": Method(fedavg, FedAvgSettings, unused=_LARGE),
    "fedprox": Method(fedprox, FedProxSettings, unused=_LARGE),
    "fedbn": Method(fedbn, FedBNSettings, unused=_LARGE),
    "scaffold": Method(
        scaffold, ScaffoldSettings, plain_sgd=True, unused=("client_weights", *_LARGE)
    ),
    "ditto": Method(ditto, DittoSettings, unused=_LARGE),
    "per_fedavg": Method(per_fedavg, PerFedAvgSettings, plain_sgd=True, unused=_LARGE),
    "pfedme": Method(pfedme, PFedMeSettings, plain_sgd=True, unused=_LARGE),
    "fml": Method(fml, FMLSettings),
    "fedmd": Method(fedmd, FedMDSettings, uses_public=True, unused=("server",)),
    "feddf": Method(feddf, FedDFSettings, uses_public=True, unused=("server",)),
    "fedproto": Method(fedproto, FedProtoSettings, unused=_AVERAGE),
    "fedgh": Method(fedgh, FedGHSettings, unused=_AVERAGE),
    "fedkd": Method(fedkd, FedKDSettings, schedules=lambda s: s.energy_start != s.energy_end),
    "fedtype": Method(fedtype, FedTypeSettings),
}

SETTINGS: Mapping[str, type[Any]] = {name: m.settings for name, m in ALGORITHMS.items()}
