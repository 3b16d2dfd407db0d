"""Names for types that many signatures share.

To a type checker a pytree is ``Any``, as it is throughout JAX. These names tell readers what is
meant.
"""

from collections.abc import Mapping
from typing import Any, TypeAlias

PyTree: TypeAlias = Any  # any nest of arrays
Params: TypeAlias = PyTree  # what an optimizer updates, or a gradient by it
OptState: TypeAlias = PyTree  # an optax state
Carry: TypeAlias = PyTree  # what a loop over batches updates

ClientState: TypeAlias = PyTree  # what a client keeps between rounds
ServerState: TypeAlias = PyTree  # what the server keeps between rounds
Download: TypeAlias = PyTree  # what the server sends to each client of a role
Upload: TypeAlias = PyTree  # what a client sends to the server

JsonObject: TypeAlias = dict[str, Any]  # a JSON object: a row of a table, or a summary of a run
Record: TypeAlias = Mapping[str, Any]  # the same, to read only
