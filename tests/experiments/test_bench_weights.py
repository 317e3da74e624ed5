"""All forms of weight standardization that are timed compute what they are named for."""

import itertools
import json

import chex
import flax.linen as nn
import jax
import numpy as np

from experiments._bench import weights as bench
from experiments._bench.timing import PASSES
from experiments._bench.weights import WeightStandardization, run_weight_standardization


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


def test_weight_normalization_is_flaxs():
    layer = nn.WeightNorm(nn.Conv(4, (3, 3), use_bias=False), variable_filter={"kernel"})
    x = np.random.default_rng(0).standard_normal((1, 5, 5, 2), np.float32)
    params = layer.init(jax.random.key(0), x)["params"]
    scale = params["layer_instance/kernel/scale"] = np.arange(1.0, 5.0, dtype=np.float32)
    kernel = bench.weight_normalize(params["layer_instance"]["kernel"], scale)
    plain = nn.Conv(4, (3, 3), use_bias=False).apply({"params": {"kernel": kernel}}, x)
    np.testing.assert_allclose(layer.apply({"params": params}, x), plain, rtol=1e-5, atol=1e-6)


def test_the_call_beside_a_step_is_the_closed_form():
    shapes = [(3, 3, 4, 8), (1, 1, 16, 4)]
    expected = bench.weight_calls(shapes)["closed_form", "forward_backward"]()
    chex.assert_trees_all_equal(bench.closed_form_call(shapes)(), expected)


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
        *itertools.product(("closed_form", "autodiff", "weight_norm"), PASSES),
    }
