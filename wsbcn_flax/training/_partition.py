"""Running a pure step on many devices, by jit over global arrays, shard_map or pmap."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

Mode = Literal["jit", "shard_map", "pmap"]
AXIS_NAME = "data"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Partition:
    """Data parallelism over devices: the state on every device, the batch split among them.

    Attributes:
        mode: "shard_map" runs the step on each device's share of the batch with ``axis_name``;
            "pmap" is the same by ``jax.pmap``, for code that has it already; "jit" runs it on
            global arrays, and XLA inserts the collectives (batch statistics are then those of the
            whole micro-batch on all devices).
        devices: all that JAX knows, those of other processes included, if None.

    Raises:
        ValueError: for an unknown mode.

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

    def __post_init__(self):
        if self.mode not in get_args(Mode):
            raise ValueError(f"mode must be one of {get_args(Mode)}, received {self.mode!r}.")

    @functools.cached_property
    def mesh(self) -> Mesh:
        """One axis, "data", over the devices."""
        return Mesh(np.asarray(self.devices or jax.devices()), (AXIS_NAME,))

    @property
    def axis_name(self) -> str | None:
        """What ``make_train_step`` and normalizations take as ``axis_name``."""
        return None if self.mode == "jit" else AXIS_NAME

    def compile(self, step: Callable[[Any, Any], Any], *, donate_state: bool = True) -> Callable:
        """Compiles ``step(state, batch)``, whose outputs must be the same on every device.

        Args:
            step: a training or evaluation step made with this partition's ``axis_name``.
            donate_state: reuses the memory of the state given to it (not with "pmap"); False for
                steps that do not return a new one.
        """
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
            # Unchecked: checking would sum gradients where they arise, one all-reduce for each.
            step = jax.shard_map(
                step,
                mesh=self.mesh,
                in_specs=(P(), P(AXIS_NAME)),
                out_specs=P(),
                check_vma=False,
            )
        return jax.jit(
            step,
            in_shardings=(self._sharding(P()), self._sharding(P(AXIS_NAME))),
            out_shardings=self._sharding(P()),
            donate_argnums=0 if donate_state else (),
        )

    def place_state(self, state: Any) -> Any:
        """Copies the state to every device; steps may donate the copy, the original stays."""
        # device_put reuses the buffer of the device the array is on, may_alias=False or not.
        return jax.device_put(jax.tree.map(jnp.copy, state), self._sharding(P()))

    def place_batch(self, batch: Any) -> Any:
        """Splits arrays [B, ...] of this process's part of the batch over its devices.

        Raises:
            ValueError: if the number of devices does not divide B.
        """
        local = self.mesh.local_mesh.size
        for array in jax.tree.leaves(batch):
            if array.shape[0] % local:
                raise ValueError(
                    f"The number of devices must divide the batch, received a batch of "
                    f"{array.shape[0]} for {local} devices. Change the batch size, or pass fewer "
                    "devices."
                )
        return jax.make_array_from_process_local_data(self._sharding(P(AXIS_NAME)), batch)

    def _sharding(self, spec: P) -> NamedSharding:
        return NamedSharding(self.mesh, spec)

    def _stack(self, array: jax.Array) -> jax.Array:
        devices = self.mesh.size
        return array.reshape(devices, array.shape[0] // devices, *array.shape[1:])
