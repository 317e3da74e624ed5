"""An NNX model behind Linen's init and apply, for tasks and the training step."""

import dataclasses
import functools
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
from flax import nnx, traverse_util
from jax.core import Tracer

from wsbcn_flax.layers._step_statistics import CALLS, advance, collected, collecting
from wsbcn_flax.nnx._batch_channel_norm import BatchChannelNorm
from wsbcn_flax.nnx._variables import Path, load_variables, to_variables

_CONSTANT = nnx.Not(nnx.Any(nnx.Param, nnx.BatchStat, nnx.RngState))
_FIXED = nnx.Not(nnx.Any(nnx.BatchStat, nnx.RngState))  # What a call must not change.


@dataclasses.dataclass(frozen=True)
class Functional:
    """A pair of pure functions, ``init`` and ``apply``, made from an NNX model.

    It takes the place of a Linen module in ``wsbcn_flax.tasks``. Parameters and statistics are the
    nested dictionaries of ``to_variables``, so that transforms, optimizers, partitions and
    checkpoints treat them as Linen's. ``load_variables`` puts them back into an NNX model. Each
    ``apply`` calls ``model.train()`` or ``model.eval()``.

    Random streams, such as dropout's, start from the key that ``apply`` receives. Other arrays,
    such as masks and tables, are constants, taken from the model that ``make`` builds from key 0.

    Attributes:
        make: Function ``make(rngs=...)`` that returns the model. The model is called with inputs
            only.

    Example:
        >>> import functools, jax, jax.numpy as jnp, optax
        >>> from wsbcn_flax.nnx import BatchChannelNorm, Functional, WSConv
        >>> from wsbcn_flax.nnx.models import CifarResNet
        >>> from wsbcn_flax.tasks import Classification
        >>> from wsbcn_flax.training import init_state, make_train_step
        >>> norm = functools.partial(BatchChannelNorm, num_groups=4)
        >>> make = functools.partial(CifarResNet, depth=8, width=8, conv=WSConv, norm=norm)
        >>> task, optimizer = Classification(model=Functional(make)), optax.sgd(0.1)
        >>> batch = {"image": jnp.ones((2, 8, 8, 3)), "label": jnp.array([0, 1])}
        >>> state = init_state(task, optimizer, jax.random.key(0), batch)
        >>> state, metrics = jax.jit(make_train_step(task, optimizer))(state, batch)
        >>> int(state.step)
        1
    """

    make: Callable[..., Any]

    def init(self, key: jax.Array, *inputs: Any, train: bool = False) -> dict[str, Any]:
        """Returns the variables of a new model; an NNX model needs no inputs for this."""
        return to_variables(self.make(rngs=nnx.Rngs(key)))

    def apply(
        self,
        variables: Mapping[str, Any],
        *inputs: Any,
        train: bool,
        mutable: Collection[str] = (),
        rngs: Mapping[str, jax.Array] | None = None,
    ) -> Any:
        """Calls the model with ``inputs``; with ``mutable``, also returns the new statistics.

        All calls of a ``BatchChannelNorm`` in one ``apply`` are one update of its statistics.

        Args:
            variables: ``{"params": ..., "batch_stats": ...}`` as ``init`` returns them.
            *inputs: Inputs of the model.
            train: Whether the model is in training mode, else in evaluation mode.
            mutable: Collections to return, ``["batch_stats"]`` for training a model that has
                statistics.
            rngs: Keys of random streams by name. Only "dropout" is used, for all streams.

        Returns:
            The model's output, or with ``mutable`` the output and ``{"batch_stats": ...}``.

        Raises:
            ValueError: For variables that are not the model's, statistics to update without
                ``mutable``, dropout without ``rngs``, or a model that changes anything else.
        """
        stats = variables.get("batch_stats", {})
        if train and stats and "batch_stats" not in mutable:
            raise ValueError(
                "Training updates running statistics, and `apply` was called with batch_stats "
                "immutable. Call `y, updates = model.apply(variables, x, train=True, "
                'mutable=["batch_stats"])`; for evaluation pass train=False.'
            )
        in_step = any(path[-1] == CALLS for path in _flatten(stats))
        given = stats if in_step else collecting(stats)
        leaves = _flatten(given)
        sums = {path[:-1]: leaves.pop(path) for path in list(leaves) if path[-1] == CALLS}
        model = self._model({**variables, "batch_stats": _unflatten(leaves)}, train, rngs)
        for path, layer in nnx.iter_modules(model):
            if isinstance(layer, BatchChannelNorm):
                layer.calls = nnx.BatchStat(sums.pop(tuple(map(str, path))))
        fixed = _fixed_arrays(model)
        outputs = model(*inputs)
        parameters = dict(nnx.to_flat_state(nnx.state(model, nnx.Param)))
        _check_unchanged(fixed, _fixed_arrays(model), parameters)
        if not mutable:
            return outputs
        if not stats:
            return outputs, {}
        # The sums of layers that do not use them come back as they were given.
        returned = _flatten(to_variables(model)["batch_stats"])
        returned = _unflatten(returned | {(*path, CALLS): rest for path, rest in sums.items()})
        if not in_step:
            returned = advance(stats, collected(given, returned))
        return outputs, {"batch_stats": returned}

    def _model(
        self, variables: Mapping[str, Any], train: bool, rngs: Mapping[str, jax.Array] | None
    ) -> Any:
        """Returns a new model with these variables, in this mode."""
        graphdef, shapes = self._structure
        model: Any = nnx.merge(graphdef, shapes, copy=True)
        load_variables(model, variables)
        if nnx.to_flat_state(nnx.state(model, _CONSTANT)):
            nnx.update(model, self._constants())
        if nnx.to_flat_state(nnx.state(model, nnx.RngState)):
            if train and "dropout" not in (rngs or {}):
                raise ValueError(
                    "The model draws random numbers in training, and `apply` received no key for "
                    'them. Pass rngs={"dropout": key}.'
                )
            nnx.update(model, self._streams((rngs or {}).get("dropout", jax.random.key(0))))
        (model.train if train else model.eval)()
        return model

    @functools.cached_property
    def _structure(self) -> tuple[Any, Any]:
        """Returns the graph of the model, and the shapes of its state."""
        return nnx.split(nnx.eval_shape(lambda: self.make(rngs=nnx.Rngs(0))))

    # These two are compiled, which drops the rest of the model that they make.
    @functools.cached_property
    def _streams(self) -> Callable[[jax.Array], Any]:
        return jax.jit(lambda key: nnx.state(self.make(rngs=nnx.Rngs(key)), nnx.RngState))

    @functools.cached_property
    def _constants(self) -> Callable[[], Any]:
        return jax.jit(lambda: nnx.state(self.make(rngs=nnx.Rngs(0)), _CONSTANT))


def _fixed_arrays(model: Any) -> dict[tuple[Any, ...], Any]:
    """Returns the arrays of a model that are neither statistics nor random state."""
    state = nnx.to_flat_state(nnx.state(model, _FIXED))
    return {path: v.get_raw_value() if isinstance(v, nnx.Variable) else v for path, v in state}


def _check_unchanged(
    before: Mapping[Any, Any], after: Mapping[Any, Any], parameters: Collection[Any]
) -> None:
    """Raises ValueError if a call has replaced an array."""

    # Transforms such as nnx.remat replace traced parameters by traced values equal to them.
    def is_traced_parameter(path: Any) -> bool:
        return path in parameters and isinstance(after.get(path), Tracer)

    replaced = [path for path in before if after.get(path) is not before[path]]
    if changed := [path for path in replaced if not is_traced_parameter(path)]:
        raise ValueError(
            "A call may change nnx.BatchStat only: other changes do not reach the next call. It "
            f"changed {'/'.join(map(str, changed[0]))}: make that an nnx.BatchStat."
        )


def _flatten(tree: Any) -> dict[Path, Any]:
    return traverse_util.flatten_dict(tree, keep_empty_nodes=True)


def _unflatten(leaves: Mapping[Path, Any]) -> Any:
    return traverse_util.unflatten_dict(leaves)
