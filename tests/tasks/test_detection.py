"""Detection in training and evaluation: split invariance, padding, and what affects the step."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from oracles import normal, relative_difference
from scenes import GN, scenes, tiny

from wsbcn_flax.ops.detection import AUTHORS
from wsbcn_flax.training import MicroBatches, Partition, init_state, make_train_step

TOLERANCE = 1e-5
OPTIMIZER = optax.sgd(0.02, momentum=0.9)
TASK = tiny(leave_out_padding=True)
LOSSES = {"objectness_loss", "proposal_loss", "class_loss", "box_loss", "mask_loss"}


@functools.cache
def initial_state():
    init = jax.jit(lambda key: init_state(TASK, OPTIMIZER, key, scenes(8)))
    return jax.device_get(init(jax.random.key(0)))


@functools.cache
def compiled(*, devices=1, count=1):
    """Returns the partition and the compiled step of eight images for one split."""
    partition = Partition(devices=jax.devices()[:devices])
    step = make_train_step(
        TASK,
        OPTIMIZER,
        micro_batches=MicroBatches(count=count, loop="vmap"),
        axis_name=partition.axis_name,
    )
    state, batch = partition.place_state(initial_state()), partition.place_batch(scenes(8))
    return partition, partition.compile(step).lower(state, batch).compile()


def run(batch, *, state=None, **split):
    """Takes one step from ``state``, by default the initial one; returns state and metrics."""
    partition, step = compiled(**split)
    state = partition.place_state(initial_state() if state is None else state)
    return jax.device_get(step(state, partition.place_batch(batch)))


@functools.cache
def first_step():
    return run(scenes(8))


EACH_IMAGE_ALONE = {"devices": 4, "count": 2}


def test_every_split_gives_the_same_step():
    """This compares the second step, since statistics and momentum have then moved."""
    state, _ = first_step()
    batch = scenes(8, seed=1)
    whole, alone = run(batch, state=state), run(batch, state=state, **EACH_IMAGE_ALONE)
    assert relative_difference(whole, alone) < TOLERANCE


def test_one_all_reduce():
    text = compiled(**EACH_IMAGE_ALONE)[1].as_text()
    count = lambda name: sum(  # noqa: E731
        f" {name}(" in line or f" {name}-start(" in line for line in text.splitlines()
    )
    assert count("all-reduce") == 1
    for other in ("all-gather", "all-to-all", "collective-permute", "reduce-scatter"):
        assert count(other) == 0


def test_every_parameter_learns_but_the_frozen_ones():
    state, metrics = run(scenes(8), state=first_step()[0])  # The first step moves scales from zero.
    assert set(metrics) > LOSSES
    assert metrics["loss"] == pytest.approx(sum(metrics[name] for name in LOSSES), rel=1e-6)
    (trace,) = [part.trace for part in state.opt_state if hasattr(part, "trace")]
    for path, gradient in jax.tree.leaves_with_path(trace):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        frozen = name.startswith(("backbone/stem", "backbone/stage1"))
        assert np.all(np.isfinite(gradient)), name
        assert np.any(gradient) != frozen, name


@pytest.mark.parametrize("box", [[5, 6, 60, 50], np.nan], ids=str)
def test_what_is_in_other_slots_does_not_matter(box):
    batch = scenes(8)
    rest = ~batch["valid"]
    batch["boxes"][rest] = box
    batch["labels"][rest] = 2
    batch["masks"][rest] = 1
    assert relative_difference(first_step(), run(batch)) == 0


def test_images_without_objects():
    batch = scenes(8)
    batch["valid"][:] = False
    state, metrics = run(batch)
    assert {name for name in LOSSES if metrics[name] != 0} == {"objectness_loss", "class_loss"}
    assert np.isfinite(optax.tree.norm(state.params))


def test_samples_follow_the_step_and_the_image_and_not_its_place():
    batch = scenes(8)
    order = np.array([3, 1, 7, 0, 2, 6, 5, 4])
    expected = first_step()
    turned = run({name: array[order] for name, array in batch.items()})
    assert relative_difference(expected, turned) < TOLERANCE
    others = run({**batch, "id": batch["id"] + 100})
    later = run(batch, state=initial_state().replace(extra=np.asarray(1, np.int32)))
    for metrics in (others[1], later[1]):
        assert abs(metrics["class_loss"] / expected[1]["class_loss"] - 1) > 1e-5


def test_it_learns_one_image():
    """All copies of the image draw the same samples, since they have the same id."""
    batch = {name: np.repeat(array[3:4], 8, axis=0) for name, array in scenes(8).items()}
    state, first = run(batch)
    for _ in range(40):
        state, metrics = run(batch, state=state)
    assert metrics["loss"] < first["loss"] / 2


@functools.cache
def detect(width):
    """Returns the compiled evaluation of images 64 x width, with variables that detect objects."""
    task = tiny(norm=GN, leave_out_padding=True)
    shapes = jax.eval_shape(task.init, jax.random.key(0), scenes(1))["params"]
    leaves, structure = jax.tree.flatten(shapes)
    params = [0.3 * normal(i, *leaf.shape) for i, leaf in enumerate(leaves)]
    params = jax.tree.unflatten(structure, params)
    evaluate = jax.jit(task.evaluate)
    return lambda batch: jax.device_get(evaluate(params, {}, batch))


def padded(batch, width):
    """Puts the images in a wider padding of values that must not matter."""
    image = np.full((len(batch["image"]), 64, width, 3), 7, np.float32)
    image[:, :, :64] = batch["image"]
    return {**batch, "image": image}


def test_a_padded_image_has_the_detections_of_the_image():
    batch = scenes(2, seed=3)
    alone, wider = detect(64)(batch), detect(96)(padded(batch, 96))
    assert alone["valid"].all()
    for name, expected in alone.items():
        np.testing.assert_allclose(wider[name], expected, rtol=1e-3, atol=1e-3, err_msg=name)
    # A negative control: results differ if the padding counts as a part of the image.
    other = detect(96)({**padded(batch, 96), "image_hw": np.array([[64, 96]] * 2)})
    assert np.abs(other["scores"] - alone["scores"]).max() > 0.01


def test_what_evaluation_returns():
    batch = {**scenes(2), "mask": np.array([1, 0])}
    del batch["boxes"], batch["labels"], batch["valid"], batch["masks"]
    batch["image_hw"][1] = 40, 50
    found = detect(64)(batch)
    for name in ("id", "image_hw", "mask"):
        np.testing.assert_array_equal(found[name], batch[name])
    assert found["masks"].shape == (2, 8, 28, 28)
    assert np.all((found["masks"] >= 0) & (found["masks"] <= 1))
    for image, (height, width) in enumerate(batch["image_hw"]):
        valid = found["valid"][image]
        scores, labels = found["scores"][image][valid], found["labels"][image][valid]
        assert np.all(np.diff(scores) <= 0)
        assert np.all(scores > 0.05)
        assert set(labels) <= {1, 2}
        boxes = found["boxes"][image][valid]
        assert np.all(boxes >= 0)
        assert np.all(boxes <= [width, height, width, height])


@pytest.mark.parametrize(
    ("options", "losses"),
    [({"with_mask": False}, LOSSES - {"mask_loss"}), ({"convention": AUTHORS}, LOSSES)],
    ids=["faster", "authors"],
)
def test_other_detectors(options, losses):
    """Detectors without masks, and with the authors' conventions, where boxes end with a pixel."""
    task = tiny(norm=GN, **options)
    batch = {k: v for k, v in scenes(2).items() if options.get("with_mask", True) or k != "masks"}
    params = jax.eval_shape(task.init, jax.random.key(0), batch)["params"]
    loss = functools.partial(task.loss, rng=jax.random.key(0), extra=jnp.zeros((), int))
    value, (_, metrics) = jax.eval_shape(loss, params, {}, batch)
    assert value.shape == ()
    assert set(metrics) == losses
    found = jax.eval_shape(task.evaluate, params, {}, batch)
    assert ("masks" in found) == ("mask_loss" in losses)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"masks": None}, "Detection needs batches of .* received one of image, image_hw, id"),
        ({"image": np.zeros((1, 64, 50, 3), np.float32)}, "multiples of 32, received 64x50"),
    ],
)
def test_refuses(change, message):
    task = tiny(norm=GN)
    batch = {k: v for k, v in (scenes(1) | change).items() if v is not None}
    with pytest.raises(ValueError, match=message):
        task.loss({}, {}, batch, rng=jax.random.key(0), extra=jnp.zeros((), int))
