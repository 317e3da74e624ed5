"""The global batch and its split over devices and micro-batches, as one configuration."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import jax

from wsbcn_flax.training._micro_batches import BatchStatsRule, Loop, MicroBatches
from wsbcn_flax.training._partition import Partition


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchConfig:
    """The global batch, and its split over devices and micro-batches.

    Attributes:
        size: Number of samples in a step, over all devices.
        micro: Number of samples in a micro-batch; None makes one micro-batch per device.
        loop: How micro-batches run; see ``MicroBatches``.
        batch_stats: "average" or "carry"; see ``MicroBatches``.
        mode: How devices are used: "shard_map", "jit" or "pmap"; see ``Partition``.
        devices: Number of devices; all if None.
        reduce_dtype: Dtype in which devices add up gradients; see ``make_train_step``. Not for
            mode "jit".
        shard_optimizer: Whether the optimizer's state is split over the devices; only for mode
            "jit".
        compiler_options: Options of XLA; not for mode "pmap".
        evaluation: Number of samples in an evaluation batch; defaults to ``size``.
    """

    size: int = 64
    micro: int | None = None
    loop: Loop = "vmap"
    batch_stats: BatchStatsRule = "average"
    mode: Literal["shard_map", "jit", "pmap"] = "shard_map"
    devices: int | None = None
    reduce_dtype: Literal["bfloat16"] | None = None
    shard_optimizer: bool = False
    compiler_options: dict[str, str] = dataclasses.field(default_factory=dict)
    evaluation: int | None = None

    def __post_init__(self):
        for name in ("size", "micro", "evaluation"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"batch.{name} must be at least 1, received {value}.")

    def partition(self, devices: Sequence[Any] | None = None) -> Partition:
        """Returns the partition over ``devices``, by default the first devices that JAX finds."""
        return Partition(
            mode=self.mode,
            devices=self._devices() if devices is None else devices,
            shard_optimizer=self.shard_optimizer,
            compiler_options=self.compiler_options,
        )

    def micro_batches(self, device_count: int) -> MicroBatches:
        """Returns the split of the batch into micro-batches.

        Raises:
            ValueError: If the batch is not a whole number of micro-batches on every device.
        """
        # Under jit a micro-batch spans all devices; otherwise each device has its own.
        shares = 1 if self.mode == "jit" else device_count
        micro = self.size // shares if self.micro is None else self.micro
        if micro < 1 or self.size % (shares * micro) or self.size % device_count:
            raise ValueError(
                "The batch must be a whole number of micro-batches on every device, received a "
                f"batch of {self.size} for {device_count} devices and micro-batches of {micro}."
            )
        count = self.size // (shares * micro)
        return MicroBatches(count=count, loop=self.loop, batch_stats=self.batch_stats)

    def _devices(self) -> list[Any]:
        devices = jax.devices()
        if jax.process_count() > 1 and self.devices not in (None, len(devices)):
            raise ValueError(
                f"batch.devices is for one process alone: the {jax.process_count()} processes of a "
                f"run use all their {len(devices)} devices, received {self.devices}. Leave it out."
            )
        if self.devices is not None and not 1 <= self.devices <= len(devices):
            raise ValueError(
                f"batch.devices must be from 1 to the {len(devices)} devices here, received "
                f"{self.devices}."
            )
        return devices[: self.devices]
