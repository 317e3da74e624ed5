"""Layers and kernels are timed on equal computations, and compared within a round."""

import itertools
import json

import chex
import jax
import numpy as np
import pytest

from experiments.bench import layers, ws
from experiments.bench.__main__ import main

SHAPE = (2, 4, 4, 8)
PASSES = ("forward", "forward_backward")
GROUPS = 4
FIGURES = {"pass", "median_ms", "spread"}


@pytest.fixture(scope="module")
def results():
    """The results of every layer for both passes at a tiny shape."""
    calls = layers.layer_calls(layers.normalizations(GROUPS), SHAPE)
    return {key: call() for key, call in calls.items()}


def test_naive_composition_is_bcn_on_batch_statistics(results):
    y, (grads, dx), updates = results["naive_bcn", "forward_backward"]
    expected_y, (expected_grads, expected_dx), expected_updates = results[
        "bcn_batch", "forward_backward"
    ]
    batch, channel = grads["BatchNorm_0"], grads["GroupNorm_0"]
    received = {
        "y": y,
        "dx": dx,
        "batch_scale": batch["scale"],
        "batch_bias": batch["bias"],
        # BCN has one scale and bias per group, like the authors' code.
        "channel_scale": channel["scale"].reshape(GROUPS, -1).sum(-1),
        "channel_bias": channel["bias"].reshape(GROUPS, -1).sum(-1),
        **updates["batch_stats"]["BatchNorm_0"],
    }
    stats = expected_updates["batch_stats"]
    expected = {"y": expected_y, "dx": expected_dx, **expected_grads}
    expected |= {"mean": stats["mean"], "var": stats["var"]}
    chex.assert_trees_all_close(received, expected, rtol=1e-4, atol=1e-5)


def test_bcn_normalizes_first_and_the_other_updates_first(results):
    """With fresh estimates, 0 and 1, normalizing first is the same as group normalization."""
    group_norm, _ = results["group_norm", "forward"]
    first, first_updates = results["bcn", "forward"]
    second, second_updates = results["bcn_update_first", "forward"]
    np.testing.assert_allclose(first, group_norm, atol=1e-4)
    assert np.abs(second - group_norm).max() > 1e-2
    chex.assert_trees_all_close(first_updates, second_updates, rtol=1e-6)


def test_both_passes_give_the_same_output_and_new_statistics(results):
    for name in layers.normalizations(GROUPS):
        y, updates = results[name, "forward"]
        y_again, (grads, dx), updates_again = results[name, "forward_backward"]
        chex.assert_trees_all_close((y, updates), (y_again, updates_again), rtol=1e-5, atol=1e-5)
        assert dx.shape == SHAPE
        assert all(np.abs(grad).max() > 1e-3 for grad in jax.tree.leaves(grads)), name


def test_figures_are_medians_of_ratios_within_a_round():
    seconds = {
        # All calls were ten times slower in the third round, which leaves the ratio unchanged.
        ("batch_norm", "forward"): np.array([1.0, 2.0, 10.0]),
        ("bcn", "forward"): np.array([2.0, 2.0, 20.0]),
        ("naive_bcn", "forward"): np.array([8.0, 8.0, 80.0]),
        ("elementwise", "forward"): np.array([0.5, 1.0, 10.0]),
    }
    rows = {row["norm"]: row for row in layers.layer_rows(seconds)}
    assert rows["batch_norm"]["ratio_to_batchnorm"] == 1
    assert rows["bcn"]["ratio_to_batchnorm"] == 2
    assert rows["bcn"]["ratio_to_naive"] == 0.25
    assert rows["bcn"]["ratio_to_minimum"] == 4 / 3
    assert rows["bcn"]["median_ms"] == 2000
    assert rows["batch_norm"]["spread"] == pytest.approx((6 - 1.5) / 2)


def test_means_are_geometric_over_shapes():
    times = {"batch_norm": (4.0, 1.0), "naive_bcn": (16.0, 2.0), "bcn": (1.0, 1.0)}
    times["elementwise"] = (0.5, 2.0)
    measured = [
        {(name, which): np.full(3, each[i]) for name, each in times.items() for which in PASSES}
        for i in range(2)
    ]
    means = layers.mean_rows([layers.layer_rows(seconds) for seconds in measured])
    row = next(row for row in means if (row["norm"], row["pass"]) == ("bcn", "forward_backward"))
    assert row["ratio_to_batchnorm"] == pytest.approx(0.5)
    assert row["ratio_to_naive"] == pytest.approx(32**-0.5)
    assert row["ratio_to_minimum"] == pytest.approx(0.25)


def test_layers_writes_its_rows(tmp_path, capsys):
    path = tmp_path / "new" / "layers.json"
    arguments = ["--shapes", *map(str, SHAPE), "--num-groups", str(GROUPS), "--repeats", "2"]
    assert main(["layers", *arguments, "--json", str(path)]) == 0
    rows = json.loads(path.read_text())
    assert all(set(row) == {"shape", "norm", "ratio_to_batchnorm"} | FIGURES for row in rows)
    assert all(row["median_ms"] > 0 and row["shape"] == list(SHAPE) for row in rows)
    assert [(row["norm"], row["pass"]) for row in rows] == [
        ("elementwise", "forward"),
        *itertools.product(layers.normalizations(GROUPS), PASSES),
    ]
    printed = capsys.readouterr().out
    assert "Geometric means over shapes" in printed
    assert "Training at 2x4x4x8" in printed
    assert "/ minimum" in printed


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
def test_layers_refuses_what_cannot_be_measured(options, message):
    with pytest.raises(ValueError, match=message):
        layers.Layers(**options)


def test_closed_form_and_autodiff_standardize_alike():
    calls = ws.weight_calls([(3, 3, 4, 8), (1, 1, 16, 4)])
    closed_form = calls["closed_form", "forward_backward"]()
    autodiff = calls["autodiff", "forward_backward"]()
    chex.assert_trees_all_close(closed_form, autodiff, rtol=1e-4, atol=1e-5)
    outputs, _ = calls["closed_form", "forward"]()
    chex.assert_trees_all_close(outputs, closed_form[0], rtol=1e-5, atol=1e-6)


def test_resnet50_kernels_are_all_of_its_convolutions():
    """25,557,032 parameters without the classifier's 2,049,000 and the normalizations' 53,120."""
    kernels = ws.resnet50_kernels()
    assert len(kernels) == 53
    assert sum(np.prod(kernel) for kernel in kernels) == 25_557_032 - 2_049_000 - 53_120


def test_ws_writes_its_rows(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(ws, "resnet50_kernels", lambda: [(1, 1, 4, 4)])
    path = tmp_path / "ws.json"
    path.write_text("older")
    assert main(["ws", "--quick", "--json", str(path)]) == 0
    rows = json.loads(path.read_text())
    assert all(set(row) == {"form", "ratio_to_elementwise"} | FIGURES for row in rows)
    assert {(row["form"], row["pass"]) for row in rows} == {
        ("elementwise", "forward"),
        *itertools.product(("closed_form", "autodiff", "weight_norm"), PASSES),
    }
    assert "closed_form" in capsys.readouterr().out
