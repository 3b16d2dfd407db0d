"""Marks of tests, apart from the helpers: commands that tests start import those.

Asking for devices starts the back end, which such a command must set up first.
"""

import jax
import pytest

# Tests run on two CPU devices, see conftest.py; an accelerator may be alone.
two_devices = pytest.mark.skipif(len(jax.devices()) < 2, reason="there is only one device")
