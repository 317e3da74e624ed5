import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from wsbcn_flax.models import CifarResNet
from wsbcn_flax.training import OptimizerConfig, TrainState, kernel_mask, make_train_step


@pytest.mark.parametrize(("decays_everything", "scale_decay"), [(False, 0.0), (True, 0.01)])
def test_follows_pytorchs_sgd(decays_everything, scale_decay):
    """The learning rate multiplies the momentum buffer, and decay is added to the gradient."""
    config = OptimizerConfig(
        schedule="step",
        milestones=(1.0,),
        weight_decay=0.01,
        decays_everything=decays_everything,
    )
    optimizer = config.make(config.make_schedule(steps_per_epoch=2, epochs=3))
    params = {"kernel": jnp.array([[2.0]]), "scale": jnp.array([2.0])}
    state = optimizer.init(params)
    expected = dict.fromkeys(params, 2.0)
    buffers = dict.fromkeys(params, 0.0)
    for step in range(5):
        gradients = {name: jnp.full_like(p, 0.5 + step) for name, p in params.items()}
        updates, state = optimizer.update(gradients, state, params)
        params = jax.tree.map(jnp.add, params, updates)
        rate = 0.1 if step < 2 else 0.01
        for name, decay in (("kernel", 0.01), ("scale", scale_decay)):
            buffers[name] = 0.9 * buffers[name] + 0.5 + step + decay * expected[name]
            expected[name] -= rate * buffers[name]
    for name, value in expected.items():
        np.testing.assert_allclose(params[name].item(), value, rtol=1e-6)


def test_detectors_treat_biases_apart_and_freeze():
    """Biases have twice the learning rate and do not decay; frozen parameters stay."""
    config = OptimizerConfig(
        schedule="constant",
        weight_decay=0.01,
        decays_everything=True,
        decays_biases=False,
        bias_factor=2.0,
        frozen=("backbone/stem_*",),
    )
    optimizer = config.make(config.make_schedule(steps_per_epoch=2, epochs=3))
    layer = {name: jnp.array([2.0]) for name in ("kernel", "scale", "bias", "batch_bias")}
    params = {"backbone": {"stem_conv": layer, "conv": layer}, "stem_of_a_head": layer}
    update = jax.jit(optimizer.update)
    state, buffers = optimizer.init(params), dict.fromkeys(layer, 0.0)
    expected = dict.fromkeys(layer, 2.0)
    for _ in range(3):
        updates, state = update(jax.tree.map(jnp.ones_like, params), state, params)
        params = jax.tree.map(jnp.add, params, updates)
        for name in layer:
            factor, decay = (2.0, 0.0) if "bias" in name else (1.0, 0.01)
            buffers[name] = 0.9 * buffers[name] + 1 + decay * expected[name]
            expected[name] -= 0.1 * factor * buffers[name]
    moved = {name: np.float32([value]) for name, value in expected.items()}
    chex.assert_trees_all_close(
        params, {"backbone": {"stem_conv": layer, "conv": moved}, "stem_of_a_head": moved}
    )


def test_refuses_to_freeze_what_is_not_there():
    config = OptimizerConfig(frozen=("backbone/*",))
    with pytest.raises(ValueError, match=r"frozen must match .* received 'backbone/\*' .* 'conv/k"):
        config.make(optax.constant_schedule(0.1)).init({"conv": {"kernel": jnp.ones(1)}})


def test_weight_decay_reaches_kernels_only():
    model = CifarResNet(depth=8, width=4)
    images = jnp.ones((1, 8, 8, 1))
    params = jax.eval_shape(lambda: model.init(jax.random.key(0), images, train=False))["params"]
    mask = kernel_mask(params)
    chex.assert_trees_all_equal_structs(mask, params)
    flat = jax.tree_util.tree_leaves_with_path(mask)
    assert {path[-1].key for path, decays in flat if decays} == {"kernel"}
    assert {path[-1].key for path, decays in flat if not decays} == {"scale", "bias"}


def test_boxed_parameters_are_those_inside():
    """As `nn.with_partitioning` makes them."""
    plain = {"conv": {"kernel": jnp.ones((3, 3, 2, 2)), "bias": jnp.ones(2)}}
    boxed = jax.tree.map(lambda x: nn.Partitioned(x, (None,) * x.ndim), plain)
    frozen = ("head/kernel", "prelu/value")
    config = OptimizerConfig(weight_decay=0.1, bias_factor=2.0, frozen=frozen)
    updates = []
    for params in (plain, boxed):
        params = {**params, "head": params["conv"], "prelu": {"value": jnp.ones(2)}}
        optimizer = config.make(optax.constant_schedule(0.1))
        update, _ = optimizer.update(params, optimizer.init(params), params)
        updates.append(nn.unbox(update))
    chex.assert_trees_all_equal(*updates)
    assert float(updates[0]["head"]["kernel"].max()) == 0


def test_an_optimizer_that_needs_the_loss_receives_it():
    def loss_fn(params, batch_stats, batch, *, rng):
        return params["w"] ** 2 + batch["x"].mean(), (batch_stats, {})

    optimizer = optax.chain(
        optax.sgd(0.0), optax.contrib.reduce_on_plateau(factor=0.5, patience=1, atol=1e-6)
    )
    step = jax.jit(make_train_step(loss_fn, optimizer))
    state = TrainState.create({"params": {"w": jnp.ones(())}}, optimizer)
    for _ in range(3):
        state, _ = step(state, {"x": jnp.ones(2)})
    assert float(state.opt_state[1].scale) == 0.25  # Two plateaus.


def test_warmup_then_cosine():
    config = OptimizerConfig(learning_rate=0.4, warmup_epochs=2, schedule="cosine")
    schedule = config.make_schedule(steps_per_epoch=10, epochs=12)
    values = np.array([schedule(step) for step in range(121)])
    np.testing.assert_allclose(values[:21], 0.4 * np.arange(21) / 20, atol=1e-7)
    cosine = 0.2 * (1 + np.cos(np.pi * np.arange(101) / 100))
    np.testing.assert_allclose(values[20:], cosine, atol=1e-6)


def test_warmup_from_a_third():
    """In maskrcnn-benchmark the factor at iteration i of n is (1 - i / n) / 3 + i / n."""
    config = OptimizerConfig(
        learning_rate=0.3, warmup_epochs=1, warmup_start=1 / 3, schedule="constant"
    )
    schedule = config.make_schedule(steps_per_epoch=5, epochs=2)
    share = np.minimum(np.arange(8) / 5, 1)
    np.testing.assert_allclose(
        [schedule(step) for step in range(8)], 0.3 * ((1 - share) / 3 + share), rtol=1e-6
    )


def test_milestones_count_from_the_start_of_training():
    config = OptimizerConfig(schedule="step", milestones=(4.0, 6.0), warmup_epochs=1)
    schedule = config.make_schedule(steps_per_epoch=5, epochs=8)
    values = [round(float(schedule(step)), 6) for step in (5, 19, 20, 29, 30, 39)]
    assert values == [0.1, 0.1, 0.01, 0.01, 0.001, 0.001]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"learning_rate": 0.0}, "learning_rate must be positive"),
        ({"momentum": 1.0}, r"momentum must be in \[0, 1\)"),
        ({"weight_decay": -1.0}, "must not be negative"),
        ({"warmup_start": 2.0}, "warmup_start must be in"),
        ({"bias_factor": 0.0}, "bias_factor positive"),
        ({"schedule": "linear"}, "schedule must be one of"),
        ({"milestones": (3.0,)}, "milestones belong to"),
    ],
)
def test_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        OptimizerConfig(**options)


def test_refuses_warmup_without_training():
    with pytest.raises(ValueError, match="outlast its warm-up"):
        OptimizerConfig(warmup_epochs=2).make_schedule(steps_per_epoch=10, epochs=2)
