"""Two CPU devices for every test, so that what is spread over devices is spread here too."""

import jax

jax.config.update("jax_num_cpu_devices", 2)
