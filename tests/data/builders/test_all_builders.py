"""What holds of every builder."""

import pytest

from fedhelp_jax.data.builders import BUILDERS
from fedhelp_jax.data.builders.prepare import builder, names


@pytest.mark.parametrize("name", sorted(BUILDERS))
def test_classes_of_masks_have_names(name):
    """Those of the decathlon are known from the download only."""
    made = builder(next(known for known in names() if known.partition("/")[0] == name))
    named = {"skin_masks": "lesion", "lung_masks": "lung", "fed_ixi_tiny": "brain"}
    assert made.mask_names == ((named[name],) if name in named else ())
    assert ("mask" in made.features()) == (name in named or name == "msd")
