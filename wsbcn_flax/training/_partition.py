"""Partition: runs a pure step on many devices by jit over global arrays, shard_map or pmap."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from wsbcn_flax.training._state import TrainState
from wsbcn_flax.training.processes import place

Mode = Literal["jit", "shard_map", "pmap"]
AXIS_NAME = "data"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Partition:
    """Data parallelism over devices: the state on every device, the batch split among them.

    Attributes:
        mode: How devices are used. "shard_map" runs the step on each device's share of the batch
            with ``axis_name``. "pmap" does the same with ``jax.pmap``, which JAX keeps for old
            code; it donates nothing and reshapes every batch. "jit" runs the step on global arrays,
            and XLA inserts the collectives; batch statistics are then those of the whole
            micro-batch.
        devices: Devices to use; defaults to all that JAX knows, including other processes'.
        shard_optimizer: Whether each device keeps and updates only its share of the optimizer's
            state, as ZeRO's first stage does. An array is split along its longest dimension that
            the number of devices divides, if there is one. The step stays the same; the updated
            parameters are gathered once more. For "jit" only.
        compiler_options: Options of XLA, as ``jax.jit`` takes them. On CPU,
            ``{"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}`` runs one operation
            at a time, in the order that holds the least memory. Not for "pmap".

    Raises:
        ValueError: For an unknown mode, ``shard_optimizer`` with another mode than "jit", or
            ``compiler_options`` with "pmap".

    References:
        Rajbhandari et al., ZeRO: Memory Optimizations Toward Training Trillion Parameter Models,
        https://arxiv.org/abs/1910.02054

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from wsbcn_flax.training import Partition
        >>> partition = Partition(mode="shard_map", devices=jax.devices()[:1])
        >>> step = partition.compile(lambda state, batch: (state + 1, {"mean": batch["x"].mean()}))
        >>> state = partition.place_state(jnp.zeros(()))
        >>> state, metrics = step(state, partition.place_batch({"x": jnp.arange(4.0)}))
        >>> float(state), float(metrics["mean"])
        (1.0, 1.5)
    """

    mode: Mode = "shard_map"
    devices: Sequence[Any] | None = None
    shard_optimizer: bool = False
    compiler_options: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        if self.mode not in get_args(Mode):
            raise ValueError(f"mode must be one of {get_args(Mode)}, received {self.mode!r}.")
        if self.shard_optimizer and self.mode != "jit":
            raise ValueError(
                'shard_optimizer needs mode="jit", in which XLA inserts the collectives, received '
                f"{self.mode!r}."
            )
        if self.compiler_options and self.mode == "pmap":
            raise ValueError(
                "jax.pmap takes no compiler_options, received "
                f'{dict(self.compiler_options)}. Use mode="jit" or "shard_map".'
            )

    @functools.cached_property
    def mesh(self) -> Mesh:
        """One axis, "data", over the devices."""
        return Mesh(np.asarray(self.devices or jax.devices()), (AXIS_NAME,))

    @property
    def axis_name(self) -> str | None:
        """The ``axis_name`` for ``make_train_step`` and normalizations; None with "jit"."""
        return None if self.mode == "jit" else AXIS_NAME

    def compile(self, step: Callable[[Any, Any], Any], *, donate_state: bool = True) -> Callable:
        """Compiles ``step(state, batch)``, whose outputs must be the same on every device.

        The result takes what ``place_state`` and ``place_batch`` return, or arrays that are
        committed to no device, such as NumPy's. It raises a ValueError for a batch that the devices
        do not divide or that is split over devices differently, and for a donated state. Except
        with "pmap", it has ``lower``, ``trace`` and ``eval_shape`` like ``jax.jit``.

        Args:
            step: Training or evaluation step made with this partition's ``axis_name``.
            donate_state: Whether the step reuses the memory of the state it receives (never with
                "pmap"). Use False for steps that return no new state.
        """
        compiled = self._compiled(step, donate_state=donate_state)

        @functools.wraps(step, updated=())
        def checked(state, batch):
            _check_alive(state)
            _check_divisible(batch, self.mesh.size)
            if self.mode != "pmap":
                self._check_split(batch)
            return compiled(state, batch)

        for name in ("lower", "trace", "eval_shape", "clear_cache"):
            if hasattr(compiled, name):
                setattr(checked, name, getattr(compiled, name))
        return checked

    def _compiled(self, step: Callable[[Any, Any], Any], *, donate_state: bool) -> Callable:
        if self.mode == "pmap":
            mapped = jax.pmap(
                step,
                axis_name=AXIS_NAME,
                in_axes=(None, 0),
                out_axes=None,
                devices=list(self.mesh.devices.flat),
            )
            return lambda state, batch: mapped(state, jax.tree.map(self._stack, batch))
        if self.mode == "shard_map":
            # With check_vma, gradients are summed where they arise, in an all-reduce for each.
            step = jax.shard_map(
                step,
                mesh=self.mesh,
                in_specs=(P(), P(AXIS_NAME)),
                out_specs=P(),
                check_vma=False,
            )
        if self.mode == "jit":
            step = self._within_mesh(step)
        state, batch = self._sharding(P()), self._sharding(P(AXIS_NAME))
        if self.shard_optimizer:
            # Arrays have shardings of their own, which `_constrained` gives them.
            state, step = None, self._constrained(step)
        return jax.jit(
            step,
            in_shardings=(state, batch),
            out_shardings=state,
            donate_argnums=0 if donate_state else (),
            compiler_options=dict(self.compiler_options) or None,
        )

    def place_state(self, state: Any) -> Any:
        """Copies the state to every device; steps may donate the copy, the original stays valid."""
        # device_put reuses an array's buffer on its own device, even with may_alias=False.
        return jax.tree.map(place, jax.tree.map(jnp.copy, state), self.state_shardings(state))

    def state_shardings(self, state: Any) -> Any:
        """Returns the sharding of every array of a state, or of a pytree that holds one."""
        # Under pmap each process has its own copy instead of a share of a global array.
        mesh = self.mesh.local_mesh if self.mode == "pmap" else self.mesh
        replicated = NamedSharding(mesh, P())

        def shardings(part):
            everywhere = jax.tree.map(lambda _: replicated, part)
            if self.shard_optimizer and isinstance(part, TrainState):
                return everywhere.replace(opt_state=jax.tree.map(self._share, part.opt_state))
            return everywhere

        return jax.tree.map(shardings, state, is_leaf=lambda x: isinstance(x, TrainState))

    def place_batch(self, batch: Any) -> Any:
        """Splits this process's part of the batch, arrays [B, ...], over its devices.

        Raises:
            ValueError: If the number of devices does not divide B, or a leaf has no axis B.
        """
        _check_divisible(batch, self.mesh.local_mesh.size)
        return jax.make_array_from_process_local_data(self._sharding(P(AXIS_NAME)), batch)

    def _check_split(self, batch: Any) -> None:
        """Checks that arrays committed to devices are split as ``place_batch`` splits them."""
        for path, array in jax.tree.leaves_with_path(batch):
            if not _is_concrete(array) or not array.committed:
                continue
            share = (array.shape[0] // self.mesh.size, *array.shape[1:])
            if array.sharding.shard_shape(array.shape) != share:
                raise ValueError(
                    f"A batch must be split over the {self.mesh.size} devices of the partition, "
                    f"received batch{jax.tree_util.keystr(path)} with the sharding "
                    f"{array.sharding}. Pass what place_batch returns, or NumPy arrays."
                )

    def _within_mesh(self, step: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
        """Tells operations, while they are traced, how many devices share their arrays."""

        @functools.wraps(step)
        def within_mesh(state, batch):
            with jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh):
                return step(state, batch)

        return within_mesh

    def _constrained(self, step: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
        def constrain(tree):
            return lax.with_sharding_constraint(tree, self.state_shardings(tree))

        return lambda state, batch: constrain(step(constrain(state), batch))

    def _share(self, array: jax.Array) -> NamedSharding:
        """Returns the sharding along the longest dimension that the devices divide, if any."""
        divisible = [size if size % self.mesh.size == 0 else 0 for size in array.shape]
        if not any(divisible):
            return self._sharding(P())
        axis = divisible.index(max(divisible))
        return self._sharding(P(*[None] * axis, AXIS_NAME))

    def _sharding(self, spec: P) -> NamedSharding:
        return NamedSharding(self.mesh, spec)

    def _stack(self, array: jax.Array) -> jax.Array:
        devices = self.mesh.size
        return array.reshape(devices, array.shape[0] // devices, *array.shape[1:])


def _check_divisible(batch: Any, devices: int) -> None:
    """Checks that every array of a batch has a leading axis that the devices divide."""
    for path, array in jax.tree.leaves_with_path(batch):
        shape = np.shape(array)
        if not shape:
            raise ValueError(
                "Every array of a batch must have a leading batch axis, received "
                f"batch{jax.tree_util.keystr(path)} of shape (). Make a list an array with "
                "np.asarray, repeat a number for every sample, or keep it in the state."
            )
        if shape[0] % devices:
            raise ValueError(
                f"The number of devices must divide the batch, received a batch of {shape[0]} for "
                f"{devices} devices. Change the batch size, or pass fewer devices."
            )


def _check_alive(state: Any) -> None:
    """Raises ValueError for a donated state; XLA might end the process instead."""
    # A step donates all arrays of a state at once, so one that every step uses is enough.
    arrays = [state.step] if isinstance(state, TrainState) else jax.tree.leaves(state)
    if any(_is_concrete(array) and array.is_deleted() for array in arrays):
        raise ValueError(
            "A step needs the newest state, received one whose memory an earlier step has reused. "
            "Keep the state that the step returned, or compile with donate_state=False."
        )


def _is_concrete(array: Any) -> bool:
    return isinstance(array, jax.Array) and not isinstance(array, Tracer)
