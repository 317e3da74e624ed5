"""The layers' benchmark compares equal computations, by ratios within a round."""

import json

import chex
import jax
import numpy as np
import pytest

from experiments._bench import layers as bench
from experiments._bench.layers import Layers, run_layers
from experiments._bench.timing import PASSES, geometric_mean_ratio

SHAPE = (2, 4, 4, 8)
GROUPS = 4


@pytest.fixture(scope="module")
def results():
    """What every layer returns for both passes at a tiny shape."""
    calls = bench.layer_calls(bench.normalizations(GROUPS), SHAPE)
    return {key: call() for key, call in calls.items()}


def test_naive_composition_is_bcn_on_batch_statistics(results):
    y, (grads, dx), updates = results["naive_bcn", "forward_backward"]
    expected_y, (expected_grads, expected_dx), expected_updates = results[
        "bcn_batch", "forward_backward"
    ]
    batch, channel = grads["BatchNorm_0"], grads["GroupNorm_0"]
    got = {
        "y": y,
        "dx": dx,
        "batch_scale": batch["scale"],
        "batch_bias": batch["bias"],
        # BCN has one scale and bias per group, as the authors have.
        "channel_scale": channel["scale"].reshape(GROUPS, -1).sum(-1),
        "channel_bias": channel["bias"].reshape(GROUPS, -1).sum(-1),
        **updates["batch_stats"]["BatchNorm_0"],
    }
    stats = expected_updates["batch_stats"]
    expected = {"y": expected_y, "dx": expected_dx, **expected_grads}
    expected |= {"mean": stats["mean"], "var": stats["var"]}
    chex.assert_trees_all_close(got, expected, rtol=1e-4, atol=1e-5)


def test_bcn_normalizes_first_and_the_other_updates_first(results):
    """With fresh estimates, 0 and 1, normalizing first leaves nothing but group normalization."""
    group_norm, _ = results["group_norm", "forward"]
    first, first_updates = results["bcn", "forward"]
    second, second_updates = results["bcn_update_first", "forward"]
    np.testing.assert_allclose(first, group_norm, atol=1e-4)
    assert np.abs(second - group_norm).max() > 1e-2
    chex.assert_trees_all_close(first_updates, second_updates, rtol=1e-6)


def test_both_passes_give_the_same_output_and_new_statistics(results):
    for name in bench.normalizations(GROUPS):
        y, updates = results[name, "forward"]
        y_again, (grads, dx), updates_again = results[name, "forward_backward"]
        chex.assert_trees_all_close((y, updates), (y_again, updates_again), rtol=1e-5, atol=1e-5)
        assert dx.shape == SHAPE
        assert all(np.abs(grad).max() > 1e-3 for grad in jax.tree.leaves(grads)), name


def test_figures_are_medians_of_ratios_within_a_round():
    seconds = {
        # The third round was ten times slower for all: the ratio does not notice.
        ("batch_norm", "forward"): np.array([1.0, 2.0, 10.0]),
        ("bcn", "forward"): np.array([2.0, 2.0, 20.0]),
        ("naive_bcn", "forward"): np.array([8.0, 8.0, 80.0]),
    }
    rows = {row["norm"]: row for row in bench.layer_rows(SHAPE, seconds)}
    assert rows["batch_norm"]["ratio_to_batchnorm"] == 1
    assert rows["bcn"]["ratio_to_batchnorm"] == 2
    assert rows["bcn"]["median_ms"] == 2000
    assert rows["batch_norm"]["spread"] == pytest.approx((6 - 1.5) / 2)
    doubled = {**seconds, ("bcn", "forward"): 4 * seconds["bcn", "forward"]}
    mean = geometric_mean_ratio([seconds, doubled], "bcn", "naive_bcn", "forward")
    assert mean == pytest.approx(np.sqrt(0.25 * 1.0))


def test_layers_writes_its_rows(tmp_path, console):
    path = tmp_path / "new" / "layers.json"
    config = Layers(json=path, shapes=(SHAPE,), num_groups=GROUPS, repeats=2)
    rows = run_layers(config, console)
    assert json.loads(path.read_text()) == rows
    keys = {"shape", "norm", "pass", "ratio_to_batchnorm", "median_ms", "spread"}
    assert all(set(row) == keys for row in rows)
    assert all(row["median_ms"] > 0 for row in rows)
    norms = ["batch_norm", "group_norm", "naive_bcn", "bcn", "bcn_update_first", "bcn_batch"]
    assert [(row["shape"], row["norm"], row["pass"]) for row in rows] == [
        ([*SHAPE], "elementwise", "forward"),
        *(([*SHAPE], norm, which) for norm in norms for which in ("forward", "forward_backward")),
    ]
    printed = console.file.getvalue()
    assert jax.__version__ in printed
    assert all(norm in printed for norm in norms)


def test_layers_keeps_shapes_apart(console, monkeypatch):
    """The second shape's naive form takes half the time of the first one's."""

    def measure(calls, **_):
        (shape,) = calls
        naive = 8.0 if shape == SHAPE else 4.0
        return {
            (name, which): np.array([seconds])
            for name, seconds in (("batch_norm", 2.0), ("naive_bcn", naive), ("bcn", 1.0))
            for which in PASSES
        }

    monkeypatch.setattr(bench, "layer_calls", lambda norms, shape: [shape])
    monkeypatch.setattr(bench, "interleaved_seconds", measure)
    monkeypatch.setattr(
        bench, "normalizations", lambda _: dict.fromkeys(("batch_norm", "naive_bcn", "bcn"))
    )
    rows = run_layers(Layers(shapes=(SHAPE, (1, 2, 2, 4)), num_groups=GROUPS), console)
    ratios = {(*row["shape"], row["norm"]): row["ratio_to_batchnorm"] for row in rows}
    assert ratios[*SHAPE, "naive_bcn"] == 4
    assert ratios[1, 2, 2, 4, "naive_bcn"] == 2
    means = next(
        line.split() for line in reversed(console.file.getvalue().splitlines()) if " bcn " in line
    )
    assert means == ["bcn", "0.50", "0.50", f"{32**-0.5:.2f}", f"{32**-0.5:.2f}"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"repeats": 0}, r"repeats must be at least 1, received 0"),
        ({"shapes": ()}, r"at least one shape"),
        ({"num_groups": 7}, r"num_groups divides, received \(2, 56, 56, 256\)"),
        ({"num_groups": 0}, r"num_groups=0"),
        ({"shapes": ((0, 4, 4, 32),)}, r"must be positive"),
    ],
)
def test_config_refuses_what_cannot_be_measured(options, message):
    with pytest.raises(ValueError, match=message):
        Layers(**options)
