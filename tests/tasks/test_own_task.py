"""A user's own task works with the same loop, partitions, checkpoints and evaluation."""

import functools

import flax.linen as nn
import jax
import numpy as np
import optax
import pytest
from oracles import relative_difference

from wsbcn_flax import BatchChannelNorm, WeightStandardization
from wsbcn_flax.tasks import Ema, Mean, Task
from wsbcn_flax.training import BatchConfig, Experiment, LoopConfig

TOLERANCE = 5e-6


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, *, train):
        x = nn.Conv(8, (3, 3), use_bias=False)(x)
        x = nn.relu(BatchChannelNorm(4)(x, use_running_average=not train))
        return nn.Conv(1, (1, 1))(x)[..., 0]


class Regression(Task):
    """Least squares for every pixel, where some pixels have no weight."""

    model = Net()

    def init(self, key, batch):
        return self.model.init(key, batch["x"], train=False)

    def loss(self, params, batch_stats, batch, *, rng, extra):
        variables = {"params": params, "batch_stats": batch_stats}
        y, updates = self.model.apply(variables, batch["x"], train=True, mutable=["batch_stats"])
        error = y - batch["y"]
        metrics = {"bias": Mean.of(error, weight=batch["weight"])}
        return Mean.of(error**2, weight=batch["weight"]), (updates["batch_stats"], metrics)

    def evaluate(self, params, batch_stats, batch):
        y = self.model.apply(
            {"params": params, "batch_stats": batch_stats}, batch["x"], train=False
        )
        return {"loss": Mean.of((y - batch["y"]) ** 2, weight=batch["weight"])}


class Noise:
    """Batches that depend on the step alone; whole samples and devices may have no weight."""

    element_spec = {  # noqa: RUF012
        "x": jax.ShapeDtypeStruct((6, 6, 3), np.float32),
        "y": jax.ShapeDtypeStruct((6, 6), np.float32),
        "weight": jax.ShapeDtypeStruct((6, 6), np.float32),
    }

    eval_size = 48

    def train_batches(self, *, batch_size, seed, start_step, host_index, host_count):
        for step in range(start_step, 10**6):
            rng = np.random.default_rng((seed, step))
            batch = {
                k: rng.normal(size=(batch_size, *s.shape)) for k, s in self.element_spec.items()
            }
            batch["weight"] = (
                np.abs(batch["weight"]) * (np.arange(batch_size) % 5 > 1)[:, None, None]
            )
            yield {name: array.astype(np.float32) for name, array in batch.items()}

    def eval_batches(self, *, batch_size, host_index, host_count):
        batches = self.train_batches(
            batch_size=batch_size, seed=9, start_step=0, host_index=0, host_count=1
        )
        return (next(batches) for _ in range(3))

    def facts(self):
        return {"pixels": 36}


# --- tests ------------------------------------------------------------------------------------


def experiment(**batch):
    return Experiment(
        task=Ema(task=Regression(), decay=0.9),
        data=Noise(),
        optimizer=optax.sgd(0.1, momentum=0.9),
        steps=4,
        batch=BatchConfig(size=16, **batch),
        transform=WeightStandardization(where="Conv_0"),
    )


def course(split, steps=2):
    """Returns states and metrics of some steps, and the evaluation of the last state."""
    made = experiment(**split)
    program = made.compile()
    state, seen = program.init(0), []
    for _, batch in zip(range(steps), made.batches(program.partition, 0, 0), strict=False):
        state, metrics = program.train(state, batch)
        seen.append(jax.device_get((state, metrics)))
    return seen, made.evaluate(program, state)


@functools.cache
def whole():
    return course({"devices": 1})


@pytest.mark.parametrize(
    "split",
    [
        {"devices": 1, "micro": 1, "loop": "vmap"},
        {"devices": 1, "micro": 4, "loop": "scan"},
        {"micro": 1, "loop": "unroll"},
        {"mode": "jit", "micro": 8, "loop": "scan"},
        {"mode": "pmap"},
    ],
    ids=lambda split: "-".join(map(str, split.values())),
)
def test_weighted_losses_and_metrics_are_the_whole_batchs(split):
    (expected, evaluated), (actual, evaluated_split) = whole(), course(split)
    assert relative_difference(expected, actual) < TOLERANCE
    assert evaluated_split == pytest.approx(evaluated, rel=TOLERANCE)


def test_a_mean_of_means_is_not():
    """A negative control of the tolerance above."""
    batch = next(
        Noise().train_batches(batch_size=16, seed=0, start_step=0, host_index=0, host_count=1)
    )
    halves = [Mean.of(batch["y"][i::2], weight=batch["weight"][i::2]) for i in (0, 1)]
    exact = float((halves[0] + halves[1]).divide())
    assert abs(np.mean([float(half.divide()) for half in halves]) / exact - 1) > 1e-2


def test_one_all_reduce():
    lowered = experiment(micro=1, loop="scan").lower(jax.devices())
    text = lowered.compile().as_text()
    assert (
        sum(" all-reduce(" in line or " all-reduce-start(" in line for line in text.splitlines())
        == 1
    )
    assert "all-gather" not in text


def test_it_resumes_and_is_evaluated_by_its_average(tmp_path):
    made = experiment(micro=1)
    program = made.compile()

    def run(folder, steps):
        config = LoopConfig(steps=steps, show_progress=False)
        return made.run(tmp_path / folder, config=config, program=program)

    straight, metrics = run("a", 4)
    run("b", 2)
    resumed, again = run("b", 4)
    jax.tree.map(np.testing.assert_array_equal, straight, resumed)
    assert metrics == again
    assert (tmp_path / "a" / "data.json").read_text() == '{\n  "pixels": 36\n}\n'

    # The average computed by hand: the decay at step k is min(0.9, (1 + k) / (10 + k)).
    state = program.init(0)
    average = jax.device_get(state.params)
    for number, batch in zip(range(1, 5), made.batches(program.partition, 0, 0), strict=False):
        state, _ = program.train(state, batch)
        decay = min(0.9, (1 + number) / (10 + number))
        average = jax.tree.map(lambda a, p: decay * a + (1 - decay) * p, average, state.params)  # noqa: B023
    averaged = made.task.for_evaluation(state)
    assert relative_difference(average, averaged.params) < 1e-5
    assert relative_difference(average, jax.device_get(state.params)) > 1e-2
