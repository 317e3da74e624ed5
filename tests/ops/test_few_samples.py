"""A barrier precedes the normalization exactly where a chip holds few samples."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from wsbcn_flax.ops import RunningStats, batch_channel_norm
from wsbcn_flax.training import Partition


def has_barrier(function, samples):
    return "optimization_barrier" in str(jax.make_jaxpr(function)(jnp.ones((samples, 2, 2, 6))))


def forward(x):
    return batch_channel_norm(x, RunningStats.fresh(6), num_groups=2)[0]


@pytest.mark.parametrize(
    ("samples", "few"), [(1, False), (2, True), (4, True), (5, False), (32, False)]
)
def test_on_one_device(samples, few):
    assert has_barrier(forward, samples) == few


@pytest.mark.parametrize(("samples", "few"), [(8, False), (16, True), (32, True), (40, False)])
def test_on_eight_devices(samples, few, mesh8):
    """Under shard_map the batch is a device's own; under jit it spans all devices."""
    manual = jax.shard_map(forward, mesh=mesh8, in_specs=P("data"), out_specs=P("data"))
    assert has_barrier(manual, samples) == few
    partition = Partition(mode="jit", devices=list(mesh8.devices.flat))
    automatic = partition.compile(lambda state, batch: forward(batch["x"]).sum() + state)
    assert has_barrier(lambda x: automatic(jnp.zeros(()), {"x": x}), samples) == few
