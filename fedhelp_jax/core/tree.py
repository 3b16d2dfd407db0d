"""Provides small functions on pytrees."""

from collections.abc import Callable, Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp

from fedhelp_jax.typing import PyTree


def weighted_mean(trees: Sequence[PyTree], weights: Sequence[jax.Array]) -> PyTree:
    """Returns the mean of stacked trees over their leading axes, ``sum_i a_i w_i / sum_i a_i``.

    Args:
      trees: One tree per group of clients, leaves ``[K_g, ...]``, all of the same structure.
      weights: One ``[K_g]`` array of non-negative weights per group; 0 leaves a client out, even if
        its leaves are not finite.

    Returns:
      A tree of the same structure without the leading axis; zeros where all weights are 0.
    """
    chex.assert_trees_all_equal_structs(trees[0], *trees)  # chex needs two trees
    for tree, w in zip(trees, weights, strict=True):
        chex.assert_tree_shape_prefix(tree, w.shape)
    total = jnp.sum(jnp.concatenate(weights))
    total = jnp.where(total > 0, total, 1)

    def mean(*stacks: jax.Array) -> jax.Array:
        parts = [_weighted_sum(s, w.astype(s.dtype)) for s, w in zip(stacks, weights, strict=True)]
        return sum(parts[1:], parts[0]) / total.astype(stacks[0].dtype)

    return jax.tree.map(mean, *trees)


def _weighted_sum(stack: jax.Array, weights: jax.Array) -> jax.Array:
    weights = weights.reshape(-1, *(1,) * (stack.ndim - 1))
    return jnp.sum(jnp.where(weights > 0, stack * weights, 0), axis=0)


def means(sums: PyTree, totals: jax.Array) -> PyTree:
    """Divides weighted sums ``[D, ...]`` by their total weights ``[D]``; 0 where the total is 0."""

    def mean(leaf: jax.Array) -> jax.Array:
        total = jnp.where(totals > 0, totals, 1).astype(leaf.dtype)
        return leaf / total.reshape(-1, *(1,) * (leaf.ndim - 1))

    return jax.tree.map(mean, sums)


def all_finite(tree: PyTree) -> jax.Array:
    """Returns whether no leaf holds NaN or infinity, as a boolean scalar."""
    leaves = [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    return jnp.all(jnp.array([jnp.isfinite(leaf).all() for leaf in leaves], bool))


def choose(condition: jax.Array, first: PyTree, second: PyTree) -> PyTree:
    """Returns the first tree if a boolean scalar is true, else the second, of equal structure."""
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), first, second)


def zeros_of(shapes: PyTree) -> PyTree:
    """Returns zeros of the shapes and dtypes of a tree; works on ``jax.eval_shape`` results too."""
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)


def select(tree: PyTree, keep: Callable[[tuple[str, ...]], bool]) -> PyTree:
    """Replaces leaves by None unless ``keep`` accepts their path, a tuple of names."""

    def one(path: tuple[Any, ...], leaf: Any) -> Any:
        names = tuple(jax.tree_util.keystr((key,), simple=True) for key in path)
        return leaf if keep(names) else None

    return jax.tree_util.tree_map_with_path(one, tree)


def merge(first: PyTree, second: PyTree) -> PyTree:
    """Merges two trees of :func:`select`, each with None where the other has a leaf."""
    return jax.tree.map(
        lambda a, b: b if a is None else a, first, second, is_leaf=lambda leaf: leaf is None
    )


def num_bytes(tree: PyTree) -> int:
    """Returns the bytes of all leaves; works on ``jax.eval_shape`` results too."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
