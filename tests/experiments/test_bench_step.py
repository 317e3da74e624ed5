"""A step's benchmark trains, each call going on from the last one's state."""

import json

import jax
import numpy as np
import pytest

from experiments import bench
from experiments._bench.networks import QUICK_RECIPE, recipes_with_norms
from experiments._bench.step import Step, TrainingCall, step_rows, ws_in_step

pytestmark = pytest.mark.usefixtures("tiny_network")
CONVOLUTIONS = [(3, 3, 4, 8), (3, 3, 8, 8), (1, 1, 4, 8), (7, 7, 1, 4)]


def test_calls_go_on_from_the_last_state():
    call = TrainingCall(recipes_with_norms(QUICK_RECIPE, ("bn",))["bn"], 8, 2)
    losses = []
    for step in range(1, 4):
        state, metrics = call()
        assert int(state.step) == step
        losses.append(float(metrics["loss"]))
    assert np.isfinite(losses).all()
    assert len(set(losses)) == 3
    assert call.kernel_shapes() == CONVOLUTIONS
    assert len(jax.tree.leaves(state.params)[0].devices()) == 1


def test_figures_compare_steps_of_the_same_round():
    seconds = {
        # The third round was ten times slower for all.
        "bn": np.array([1.0, 1.0, 10.0]),
        "bcn": np.array([2.0, 2.0, 20.0]),
        "bcn_ws": np.array([2.5, 2.5, 25.0]),
    }
    ratios = {row["norm"]: row["ratio_to_batchnorm"] for row in step_rows(seconds)}
    assert ratios == {"bn": 1, "bcn": 2, "bcn_ws": 2.5}
    added = ws_in_step(seconds, np.array([0.25, 0.25, 2.5]))
    expected = {"added_ms": 500, "alone_ms": 250, "added_over_alone": 2, "share_of_step": 0.2}
    assert added == expected


def test_step_writes_its_figures(tmp_path, capsys):
    path = tmp_path / "step.json"
    arguments = ["--recipe", QUICK_RECIPE, "--image-size", "8", "--repeats", "1"]
    arguments += ["--batch", "2", "--micro", "1"]
    norms = ["bn", "bcn", "bcn_ws"]
    assert bench.main(["step", *arguments, "--norms", *norms, "--json", str(path)]) == 0
    document = json.loads(path.read_text())
    assert set(document) == {"machine", "rows", "ws", "torch"}
    keys = {"norm", "ratio_to_batchnorm", "median_ms", "spread"}
    assert all(set(row) == keys for row in document["rows"])
    assert [row["norm"] for row in document["rows"]] == norms
    keys = {"added_ms", "alone_ms", "added_over_alone", "share_of_step"}
    assert set(document["ws"]) == keys
    assert document["torch"] is None
    printed = " ".join(capsys.readouterr().out.split())
    assert "2 images of 8 pixels, micro-batches of 1" in printed
    assert "Weight standardization adds" in printed


def test_quick_measures_a_small_network():
    assert Step(quick=True).measured == (QUICK_RECIPE, 32)
    assert Step().measured == ("imagenet_resnet50_bcn_ws", 128)
