"""TensorFlow Datasets builders, mostly for data that users must download themselves."""

from fedhelp_jax.data.builders.base import Builder
from fedhelp_jax.data.builders.fed_isic2019 import FedIsic2019
from fedhelp_jax.data.builders.fed_ixi_tiny import FedIxiTiny
from fedhelp_jax.data.builders.lung_masks import LungMasks
from fedhelp_jax.data.builders.medmnist import Medmnist
from fedhelp_jax.data.builders.msd import Msd
from fedhelp_jax.data.builders.nct_crc_he import NctCrcHe
from fedhelp_jax.data.builders.nih_chest_xray_binary import NihChestXrayBinary
from fedhelp_jax.data.builders.skin_masks import SkinMasks

_ALL = (
    FedIsic2019,
    FedIxiTiny,
    LungMasks,
    Medmnist,
    Msd,
    NctCrcHe,
    NihChestXrayBinary,
    SkinMasks,
)

# Builders by the names that TFDS gives them.
BUILDERS: dict[str, type[Builder]] = {cls.name: cls for cls in _ALL}
