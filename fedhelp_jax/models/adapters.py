"""Turns networks of Flax Linen, Flax NNX, Equinox or plain functions into a `Model`.

A network returns features, ``[..., D]``. It is given a linear head with `num_classes` outputs,
because methods train, replace or share heads separately. The network's weights are initialised by
its own library.
"""

import functools
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from fedhelp_jax.models.layers import init_linear, linear
from fedhelp_jax.models.model import Model, Variables
from fedhelp_jax.typing import Params, PyTree

if TYPE_CHECKING:
    import equinox as eqx
    from flax import linen as nn
    from flax import nnx


def from_functions(
    init: Callable[[jax.Array, tuple[int, ...]], PyTree],
    features: Callable[[PyTree, jax.Array], jax.Array],
    num_classes: int,
) -> Model:
    """Returns a network of two pure functions and a linear head.

    Args:
      init: ``(key, sample_shape) -> params``, any tree of arrays; ``sample_shape`` is ``(*spatial,
        channels)``.
      features: ``(params, images [B, *spatial, channels]) -> features [B, D]``, or for segmentation
        ``[B, *spatial, D]``.
      num_classes: ``C`` of the head.

    Example:
      >>> def init(key, shape):
      ...     return {"w": 0.1 * jax.random.normal(key, (shape[-1], 16))}
      >>> def features(params, x):
      ...     return jax.nn.relu(jnp.mean(x, axis=(1, 2)) @ params["w"])
      >>> model = from_functions(init, features, num_classes=4)
      >>> model.init(jax.random.key(0), (8, 8, 3))["params"]["head"]["kernel"].shape
      (16, 4)
    """

    def stateless(params: Any, state: Any, x: jax.Array, train: bool, mask: Any) -> Any:
        del train, mask
        return features(params, x), state

    return _with_head(lambda key, shape: (init(key, shape), {}), stateless, num_classes)


def from_linen(module: "nn.Module", num_classes: int) -> Model:
    """Returns a network of a Flax Linen module and a linear head.

    Args:
      module: Called as ``module(images)``, and with ``train`` and ``mask`` as keyword arguments if
        it takes them. ``mask`` (``[B]`` boolean or None) marks the real examples of a padded batch.
        Parameters and the collection ``batch_stats`` are supported; other collections, and random
        numbers in the forward pass, are not.
      num_classes: ``C`` of the head.
    """

    def given(train: bool, mask: Any) -> dict[str, Any]:
        return _taken(module, {"train": train, "mask": mask})

    def init(key: jax.Array, shape: tuple[int, ...]) -> tuple[PyTree, PyTree]:
        variables = module.init(key, jnp.zeros((1, *shape)), **given(False, None))
        return variables.get("params", {}), variables.get("batch_stats", {})

    def apply(params: Any, state: Any, x: jax.Array, train: bool, mask: Any) -> Any:
        collections = {"params": params, "batch_stats": state}
        if not train:
            return module.apply(collections, x, **given(train, mask)), state
        out, updated = module.apply(collections, x, **given(train, mask), mutable=["batch_stats"])
        return out, updated.get("batch_stats", state)

    return _with_head(init, apply, num_classes)


def from_nnx(make: "Callable[[nnx.Rngs], nnx.Module]", num_classes: int) -> Model:
    """Returns a network of a Flax NNX module and a linear head.

    Args:
      make: ``rngs -> module``. The module is called with images ``[B, *spatial, channels]``, and
        with ``train`` and ``mask`` as keyword arguments if it takes them. If it does not take
        ``train``, ``module.train()`` and ``module.eval()`` switch its layers. ``mask`` (``[B]``
        boolean or None) marks the real examples of a padded batch; ``nnx.BatchNorm`` accepts it
        too.
      num_classes: ``C`` of the head.
    """
    from flax import nnx

    @functools.cache
    def structure() -> PyTree:
        return nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))), nnx.Param, ...)[0]

    def parts(module: Any) -> tuple[Any, Any]:
        params, state = nnx.state(module, nnx.Param, ...)
        return nnx.to_pure_dict(params), nnx.to_pure_dict(state)

    def init(key: jax.Array, shape: tuple[int, ...]) -> tuple[PyTree, PyTree]:
        del shape
        return parts(make(nnx.Rngs(key)))

    def apply(params: Any, state: Any, x: jax.Array, train: bool, mask: Any) -> Any:
        module = nnx.merge(structure(), params, state)
        given = _taken(module, {"train": train, "mask": mask})
        if "train" not in given:
            module.train() if train else module.eval()
        out = module(x, **given)
        return out, parts(module)[1] if train else state

    return _with_head(init, apply, num_classes)


def from_equinox(make: "Callable[[jax.Array], eqx.Module]", num_classes: int) -> Model:
    """Returns a network of an Equinox module and a linear head.

    Args:
      make: ``key -> module``; the module is called with one image, ``[*spatial, channels]``, and
        returns its features. Stateful layers are not supported.
      num_classes: ``C`` of the head.
    """
    import equinox as eqx

    @functools.cache
    def static() -> PyTree:
        module = eqx.filter_eval_shape(make, jax.random.key(0))
        return eqx.partition(module, lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct))[1]

    def init(key: jax.Array, shape: tuple[int, ...]) -> PyTree:
        del shape
        return eqx.filter(make(key), eqx.is_array)

    def features(params: Params, x: jax.Array) -> jax.Array:
        return jax.vmap(eqx.combine(params, static()))(x)

    return from_functions(init, features, num_classes)


def _taken(module: Any, given: dict[str, Any]) -> dict[str, Any]:
    """Returns those keyword arguments that a module accepts."""
    parameters = inspect.signature(type(module).__call__).parameters
    return {name: value for name, value in given.items() if name in parameters}


def _with_head(
    init: Callable[[jax.Array, tuple[int, ...]], tuple[PyTree, PyTree]],
    apply: Callable[..., tuple[jax.Array, PyTree]],
    num_classes: int,
) -> Model:
    """Adds a linear head to a network.

    ``init`` returns parameters and state; ``apply`` returns features and the updated state.
    """

    def init_all(key: jax.Array, sample_shape: tuple[int, ...]) -> Variables:
        features_key, head_key = jax.random.split(key)
        params, state = init(features_key, tuple(sample_shape))
        image = jnp.zeros((1, *sample_shape))
        width = jax.eval_shape(lambda: apply(params, state, image, False, None)[0]).shape[-1]
        head = init_linear(head_key, width, num_classes)
        return {"params": {"features": params, "head": head}, "batch_stats": state}

    def features(
        variables: Variables, x: jax.Array, *, train: bool, mask: jax.Array | None = None
    ) -> tuple[jax.Array, Variables]:
        params, state = variables["params"]["features"], variables["batch_stats"]
        return apply(params, state, x, train, mask)

    return Model(init_all, features, linear)
