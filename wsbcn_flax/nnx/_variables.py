"""The state of an NNX model as the variables of its Linen twin."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx, traverse_util

# Collections of Linen, and the kinds of NNX variables that belong in them.
COLLECTIONS = {"params": nnx.Param, "batch_stats": nnx.BatchStat}

Path = tuple[str, ...]


def to_variables(model: nnx.Module) -> dict[str, Any]:
    """Returns the parameters and statistics of a model as Linen's variables.

    Paths are those of the attributes, with numbers in lists as strings. For
    ``wsbcn_flax.nnx.models`` the result is exactly the variables of the model of the same name in
    ``wsbcn_flax.models``. So transforms, optimizers and checkpoints serve both.

    Args:
        model: Model, or its shapes as returned by ``nnx.eval_shape``.

    Returns:
        ``{"params": ..., "batch_stats": ...}``, without batch_stats where there are none.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from flax import nnx
        >>> from wsbcn_flax.nnx import WSConv, to_variables
        >>> conv = WSConv(16, 64, (3, 3), use_bias=False, rngs=nnx.Rngs(0))
        >>> jax.tree.map(jnp.shape, to_variables(conv))
        {'params': {'kernel': (3, 3, 16, 64)}}
    """
    variables = {}
    for name, kind in COLLECTIONS.items():
        leaves = {
            path: variable.get_value() for path, variable in variables_of(model, kind).items()
        }
        if leaves or name == "params":
            variables[name] = traverse_util.unflatten_dict(leaves)
    return variables


def load_variables(model: nnx.Module, variables: Mapping[str, Any]) -> None:
    """Replaces the parameters and statistics of a model by variables of its Linen twin, in place.

    This is the inverse of ``to_variables``: a model trained in Linen, or by ``make_train_step``,
    runs in NNX. Arrays keep their dtypes.

    Args:
        model: Model to change.
        variables: Variables ``{"params": ..., "batch_stats": ...}``. A collection that is left out
            stays as it is.

    Raises:
        ValueError: For variables that the model does not have, that are missing, or of another
            shape. In this case the model has not changed.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import wsbcn_flax
        >>> from flax import nnx
        >>> from wsbcn_flax.nnx import WSConv, load_variables
        >>> x = jnp.ones((1, 8, 8, 16))
        >>> linen = wsbcn_flax.WSConv(64, (3, 3))
        >>> variables = linen.init(jax.random.key(0), x)
        >>> conv = WSConv(16, 64, (3, 3), rngs=nnx.Rngs(0))
        >>> load_variables(conv, variables)
        >>> bool((conv(x) == linen.apply(variables, x)).all())
        True
    """
    pairs = []
    for name in variables:
        if name not in COLLECTIONS:
            raise ValueError(f"Collections must be among {list(COLLECTIONS)}, received {name!r}.")
        own = variables_of(model, COLLECTIONS[name])
        given: dict[Path, Any] = traverse_util.flatten_dict(dict(variables[name]))
        expected = {path: jnp.shape(variable.get_value()) for path, variable in own.items()}
        received = {path: jnp.shape(array) for path, array in given.items()}
        if wrong := sorted({path for path, _ in expected.items() ^ received.items()}):
            path = wrong[0]
            raise ValueError(
                f"Variables must have the paths and shapes of the model's own, received "
                f"{len(wrong)} of {name} that differ, such as {'/'.join(path)} of shape "
                f"{received.get(path, 'none')} for {expected.get(path, 'none')}. Are they of "
                "another architecture or normalization?"
            )
        pairs += [(own[path], array) for path, array in given.items()]
    for variable, array in pairs:
        variable.set_value(array)


def variables_of(model: nnx.Module, kind: Any) -> dict[Path, Any]:
    """Returns the NNX variables of one kind by their paths, whose parts are all strings."""
    state = nnx.to_flat_state(nnx.state(model, kind))
    return {tuple(map(str, path)): variable for path, variable in state}
