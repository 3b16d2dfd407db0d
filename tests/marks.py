"""Marks of tests, which must not be in the helpers, since commands started by tests import those.

Querying devices starts the back end, which such a command must set up first.
"""

import jax
import pytest

# Tests run on two CPU devices, see conftest.py, but there may be only one accelerator.
two_devices = pytest.mark.skipif(len(jax.devices()) < 2, reason="there is only one device")
