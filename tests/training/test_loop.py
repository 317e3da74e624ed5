import itertools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from wsbcn_flax.tasks import Classification
from wsbcn_flax.training import (
    Checkpointer,
    LoopConfig,
    NonFiniteLossError,
    TrainState,
    fit,
    make_train_step,
)
from wsbcn_flax.training.writers import JsonlWriter, read_jsonl

OPTIMIZER = optax.sgd(0.1, momentum=0.9)


def loss_fn(params, batch_stats, batch, *, rng):
    loss = jnp.mean((params["w"][None] - batch["x"]) ** 2)
    return loss, ({"count": batch_stats["count"] + 1}, {})


STEP = jax.jit(make_train_step(loss_fn, OPTIMIZER))


def new_state():
    variables = {"params": {"w": jnp.zeros(3)}, "batch_stats": {"count": jnp.zeros(())}}
    return TrainState.create(variables, OPTIMIZER)


def batches_from(done, poison=None):
    """Yields batches that depend on their number alone; the one at step ``poison`` is NaN."""
    for number in itertools.count(done + 1):
        x = np.random.default_rng(number).normal(size=(4, 3)).astype(np.float32)
        yield {"x": np.full_like(x, np.nan) if number == poison else x}


def config(steps, **options):
    return LoopConfig(steps=steps, show_progress=False, **options)


def test_restored_run_equals_the_uninterrupted_one(tmp_path):
    whole, _ = fit(STEP, new_state(), batches_from, config=config(10))
    with Checkpointer(tmp_path) as checkpointer:
        fit(STEP, new_state(), batches_from, config=config(6), checkpointer=checkpointer)
    with Checkpointer(tmp_path) as checkpointer:
        restored = checkpointer.restore_latest(new_state())
        resumed, _ = fit(
            STEP, restored.state, batches_from, config=config(10), checkpointer=checkpointer
        )
    chex.assert_trees_all_equal(whole, resumed)


@pytest.mark.parametrize("poison", [1, 5, 7, 8])
def test_nan_stops_at_once_and_keeps_the_last_good_checkpoint(tmp_path, poison):
    writer = JsonlWriter(tmp_path / "metrics.jsonl")
    with Checkpointer(tmp_path / "checkpoints") as checkpointer:
        kept = f"checkpoint of step {2 * ((poison - 1) // 2)} is" if poison > 2 else "No checkpoint"
        message = rf"'loss': nan.* at step {poison}\. .*{kept}.*--out NEW --optim.learning-rate"
        with pytest.raises(NonFiniteLossError, match=message):
            fit(
                STEP,
                new_state(),
                lambda done: batches_from(done, poison),
                config=config(20, checkpoint_every=2, log_every=1),
                checkpointer=checkpointer,
                writer=writer,
            )
        assert max(checkpointer.steps, default=0) == 2 * ((poison - 1) // 2)
        restored = checkpointer.restore_latest(new_state())
    writer.close()
    assert [record["step"] for record in read_jsonl(tmp_path / "metrics.jsonl")] == list(
        range(1, poison)
    )
    if restored is not None:
        chex.assert_tree_all_finite(restored.state)


def test_writes_and_evaluates_when_due(tmp_path):
    seen = []

    def evaluate(state):
        seen.append(int(state.step))
        return {"error": float(state.step)}

    writer = JsonlWriter(tmp_path / "metrics.jsonl")
    _, results = fit(
        STEP,
        new_state(),
        batches_from,
        config=config(10, log_every=4, eval_every=3),
        evaluate=evaluate,
        writer=writer,
    )
    writer.close()
    records = read_jsonl(tmp_path / "metrics.jsonl")
    assert seen == [3, 6, 9, 10]
    assert [record["step"] for record in records] == [3, 4, 6, 8, 9, 10]
    assert [record["step"] for record in records if "eval_error" in record] == seen
    assert all({"loss", "grad_norm"} <= set(record) for record in records)
    assert results == {"eval_error": 10.0}


def test_finished_run_is_evaluated_again_but_not_trained():
    state, _ = fit(STEP, new_state(), batches_from, config=config(3))
    again, results = fit(
        STEP, state, batches_from, config=config(3), evaluate=lambda state: {"error": 0.5}
    )
    assert again is state
    assert results == {"eval_error": 0.5}


@pytest.mark.parametrize("steps", [0, 4])
def test_an_evaluation_that_is_not_finite_is_an_error_after_the_steps_are_saved(tmp_path, steps):
    state = new_state()
    if steps:
        state, _ = fit(STEP, state, batches_from, config=config(steps))
    with Checkpointer(tmp_path) as checkpointer:
        with pytest.raises(NonFiniteLossError, match=r"\{'error': nan\} at step 4\. .*labels"):
            fit(
                STEP,
                state,
                batches_from,
                config=config(4, checkpoint_every=3),
                evaluate=lambda state: {"error": jnp.nan, "loss": 1.0},
                checkpointer=checkpointer,
            )
        assert checkpointer.steps == (() if steps else (3, 4))


def test_labels_outside_the_classes_stop_training():
    class Linear(nn.Module):
        @nn.compact
        def __call__(self, images, *, train):
            return nn.Dense(3)(images)

    task = Classification(model=Linear(), label_smoothing=0.1)
    batch = {"image": jnp.ones((4, 2)), "label": jnp.array([0, 1, 2, 3])}
    state = TrainState.create(task.init(jax.random.key(0), batch), OPTIMIZER)
    step = jax.jit(make_train_step(task, OPTIMIZER))
    with pytest.raises(NonFiniteLossError, match=r"at step 1\..*labels outside the classes"):
        fit(step, state, lambda done: itertools.repeat(batch), config=config(5))


def test_batches_must_not_end():
    with pytest.raises(ValueError, match=r"to step 5 .* none for step 3"):
        fit(
            STEP,
            new_state(),
            lambda done: itertools.islice(batches_from(done), 2),
            config=config(5),
        )


def test_metrics_must_be_scalars():
    def step(state, batch):
        return state, {"loss": jnp.ones(4)}

    with pytest.raises(ValueError, match=r"must be scalars.*\{'loss': \(4,\)\}"):
        fit(step, new_state(), batches_from, config=config(1))


def test_refuses_a_state_beyond_the_end():
    state, _ = fit(STEP, new_state(), batches_from, config=config(3))
    with pytest.raises(ValueError, match="ends at step 2, and the state it received is at step 3"):
        fit(STEP, state, batches_from, config=config(2))


def test_closes_the_batches():
    class Batches:
        closed = False

        def __init__(self, done):
            self._batches = batches_from(done)

        def __next__(self):
            return next(self._batches)

        def close(self):
            Batches.closed = True

    fit(STEP, new_state(), Batches, config=config(2))
    assert Batches.closed


def test_step_that_changes_a_dtype_is_refused():
    def widening(params, batch_stats, batch, *, rng):
        return jnp.mean(params["w"]), ({"count": batch_stats["count"].astype(jnp.int32)}, {})

    step = make_train_step(widening, OPTIMIZER)
    with pytest.raises(AssertionError, match="dtype"):
        jax.eval_shape(step, new_state(), {"x": jnp.ones((4, 3))})


@pytest.mark.parametrize("name", ["steps", "log_every", "eval_every", "checkpoint_every"])
def test_refuses_intervals_below_one(name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1"):
        LoopConfig(**{"steps": 1, name: 0})
