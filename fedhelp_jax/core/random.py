"""Derives random keys by folding in only the seed, round, client and purpose.

Therefore no result depends on how clients are grouped, chunked, ordered or sharded, and every
algorithm sees the same batches.
"""

import enum

import jax


class Purpose(enum.IntEnum):
    """What a key is for. The numbers determine a run's results: never change or reuse one."""

    SERVER_INIT = 0
    CLIENT_INIT = 1
    PARTICIPATION = 2
    PRIVATE_BATCHES = 3
    PUBLIC_BATCHES = 4
    ROUNDS = 5
    SERVER = 6
    AUGMENTATION = 7


def for_purpose(key: jax.Array, purpose: Purpose) -> jax.Array:
    """Returns the key for one purpose, derived from ``key``."""
    return jax.random.fold_in(key, int(purpose))


def server_round_key(key: jax.Array, round: jax.Array | int) -> jax.Array:
    """Returns the key of the server in a round; ``key`` is the run's."""
    return jax.random.fold_in(for_purpose(key, Purpose.SERVER), round)


def client_round_key(key: jax.Array, round: jax.Array | int, client: jax.Array | int) -> jax.Array:
    """Returns the key of a client in a round; ``key`` is the run's, from its seed."""
    return jax.random.fold_in(jax.random.fold_in(for_purpose(key, Purpose.ROUNDS), round), client)
