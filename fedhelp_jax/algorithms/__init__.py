"""Provides the federated methods, one file each.

``fh.algorithms.NAME(small=..., large=..., **options)`` makes one for a `fedhelp_jax.Simulation`.
Configs use the same name. To add a method, decorate a function with `method`; configs then refer to
it as ``package.module:function`` (docs/extending.md).
"""

from typing import Any

from fedhelp_jax.algorithms.base import ClientAlgorithm, FederatedAlgorithm, Setup
from fedhelp_jax.algorithms.centralized import centralized
from fedhelp_jax.algorithms.configured import Algorithm, Given, configure, make_settings
from fedhelp_jax.algorithms.ditto import ditto
from fedhelp_jax.algorithms.fedavg import fedavg
from fedhelp_jax.algorithms.fedbn import fedbn
from fedhelp_jax.algorithms.feddf import feddf
from fedhelp_jax.algorithms.federated_probe import federated_probe
from fedhelp_jax.algorithms.fedgh import fedgh
from fedhelp_jax.algorithms.fedhelp import fedhelp
from fedhelp_jax.algorithms.fedkd import fedkd
from fedhelp_jax.algorithms.fedmd import fedmd
from fedhelp_jax.algorithms.fedncm import fedncm
from fedhelp_jax.algorithms.fedpft import fedpft
from fedhelp_jax.algorithms.fedproto import fedproto
from fedhelp_jax.algorithms.fedprox import fedprox
from fedhelp_jax.algorithms.fedtype import fedtype
from fedhelp_jax.algorithms.fml import fml
from fedhelp_jax.algorithms.foundation_probe import foundation_probe
from fedhelp_jax.algorithms.local import local
from fedhelp_jax.algorithms.lp_ft import lp_ft
from fedhelp_jax.algorithms.method import Method, method, settings_of
from fedhelp_jax.algorithms.per_fedavg import per_fedavg
from fedhelp_jax.algorithms.pfedme import pfedme
from fedhelp_jax.algorithms.pixel_probe import pixel_probe
from fedhelp_jax.algorithms.scaffold import scaffold
from fedhelp_jax.core.registry import Registry


def _lacks(found: Any) -> str:
    return "" if isinstance(found, Method) else "is no method; is @method missing above it?"


_OURS = (
    *(fedhelp, local, pixel_probe, foundation_probe, federated_probe, fedncm, fedpft),
    *(centralized, fedavg, lp_ft, fedprox, fedbn, scaffold, ditto),
    *(per_fedavg, pfedme, fml, fedmd, feddf, fedproto, fedgh, fedkd, fedtype),
)
ALGORITHMS = Registry("algorithms", {found.name: found for found in _OURS}, _lacks)

__all__ = [
    "ALGORITHMS",
    "Algorithm",
    "ClientAlgorithm",
    "FederatedAlgorithm",
    "Given",
    "Method",
    "Setup",
    "centralized",
    "configure",
    "ditto",
    "fedavg",
    "fedbn",
    "feddf",
    "federated_probe",
    "fedgh",
    "fedhelp",
    "fedkd",
    "fedmd",
    "fedncm",
    "fedpft",
    "fedproto",
    "fedprox",
    "fedtype",
    "fml",
    "foundation_probe",
    "local",
    "lp_ft",
    "make_settings",
    "method",
    "per_fedavg",
    "pfedme",
    "pixel_probe",
    "scaffold",
    "settings_of",
]
