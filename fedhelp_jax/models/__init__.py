"""Networks behind one small interface, :class:`fedhelp_jax.models.model.Model`."""
