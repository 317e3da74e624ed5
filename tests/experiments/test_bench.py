"""The benchmark compares equal computations, in balanced orders, by ratios within a round."""

import collections
import io
import itertools
import json

import chex
import jax
import numpy as np
import pytest
from rich.console import Console

from experiments import _layer_bench as bench
from experiments.bench import (
    Layers,
    WeightStandardization,
    run_layers,
    run_weight_standardization,
)

SHAPE = (2, 4, 4, 8)
GROUPS = 4


@pytest.fixture(scope="module")
def results():
    """What every layer returns for both passes at a tiny shape."""
    calls = bench.layer_calls(bench.normalizations(GROUPS), SHAPE)
    return {key: call() for key, call in calls.items()}


@pytest.fixture
def console():
    return Console(file=io.StringIO(), width=120)


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


def test_closed_form_and_autodiff_standardize_alike():
    calls = bench.weight_calls([(3, 3, 4, 8), (1, 1, 16, 4)])
    chex.assert_trees_all_close(
        calls["closed_form", "forward_backward"](),
        calls["autodiff", "forward_backward"](),
        rtol=1e-4,
        atol=1e-5,
    )
    outputs = [output for output, _ in calls["closed_form", "forward_backward"]()]
    chex.assert_trees_all_close(calls["closed_form", "forward"](), outputs, rtol=1e-5, atol=1e-6)


def test_resnet50_kernels_are_all_of_its_convolutions():
    """25,557,032 parameters, less the classifier's 2,049,000 and the normalizations' 53,120."""
    kernels = bench.resnet50_kernels()
    assert len(kernels) == 53
    assert sum(np.prod(kernel) for kernel in kernels) == 25_557_032 - 2_049_000 - 53_120


@pytest.mark.parametrize(("count", "rounds"), [(2, 2), (5, 10), (12, 12), (1, 3)])
def test_orders_balance_places_and_predecessors(count, rounds):
    orders = [bench.balanced_order(count, index) for index in range(rounds)]
    assert all(sorted(order) == list(range(count)) for order in orders)
    places = collections.Counter(pair for order in orders for pair in enumerate(order))
    pairs = collections.Counter(pair for order in orders for pair in itertools.pairwise(order))
    assert len(set(places.values())) == 1
    assert len(places) == count * count
    assert len(set(pairs.values())) <= 1
    assert len(pairs) == count * (count - 1)


def test_every_call_is_timed_alone_and_warmed_up_before():
    now, ran, rounds_seen = 0.0, [], []

    def work(key, seconds):
        nonlocal now
        now += seconds
        ran.append(key)

    durations = {("a", "forward"): 1.0, ("b", "forward"): 2.0, ("c", "forward"): 4.0}
    calls = {key: lambda key=key, s=s: work(key, s) for key, s in durations.items()}
    seconds = bench.interleaved_seconds(
        calls, rounds=6, on_round=lambda: rounds_seen.append(len(ran)), clock=lambda: now
    )
    for key, duration in durations.items():
        np.testing.assert_array_equal(seconds[key], np.full(6, duration))
    assert rounds_seen == [6 + 3 * (index + 1) for index in range(6)]
    assert set(ran[:6]) == set(durations)


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
    mean = bench.geometric_mean_ratio([seconds, doubled], "bcn", "naive_bcn", "forward")
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
        ([*SHAPE], norm, which) for norm in norms for which in ("forward", "forward_backward")
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
            for which in bench.PASSES
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


def test_ws_writes_its_rows(tmp_path, console, monkeypatch):
    monkeypatch.setattr(bench, "resnet50_kernels", lambda: [(1, 1, 4, 4)])
    path = tmp_path / "ws.json"
    path.write_text("older")
    rows = run_weight_standardization(WeightStandardization(json=path, repeats=2), console)
    assert json.loads(path.read_text()) == rows
    assert all(
        set(row) == {"form", "pass", "ratio_to_elementwise", "median_ms", "spread"} for row in rows
    )
    assert {(row["form"], row["pass"]) for row in rows} == {
        ("elementwise", "forward"),
        *itertools.product(("closed_form", "autodiff"), bench.PASSES),
    }


@pytest.mark.parametrize("run", [run_layers, run_weight_standardization])
def test_a_file_that_cannot_be_written_fails_before_measuring(run, tmp_path, console, monkeypatch):
    def measure(*_, **__):
        raise AssertionError("measured before looking at the path")

    monkeypatch.setattr(bench, "interleaved_seconds", measure)
    (tmp_path / "file").touch()
    config = Layers if run is run_layers else WeightStandardization
    for path in (tmp_path, tmp_path / "file" / "below.json"):
        with pytest.raises(OSError, match=r"--json must name a file that can be written"):
            run(config(json=path), console)


def test_looking_at_the_path_changes_no_file(tmp_path, console, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(bench, "interleaved_seconds", interrupt)
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    old.write_text("kept")
    for path in (old, new):
        with pytest.raises(KeyboardInterrupt):
            run_layers(Layers(json=path, shapes=(SHAPE,), num_groups=GROUPS), console)
    assert old.read_text() == "kept"
    assert not new.exists()


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


def test_quick_never_adds_rounds():
    assert Layers(quick=True).rounds == 3
    assert Layers(quick=True, repeats=2).rounds == 2
    assert Layers(repeats=7).rounds == 7
