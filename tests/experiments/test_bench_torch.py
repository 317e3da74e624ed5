"""The PyTorch side of the benchmarks computes the same as ours; a missing torch is reported."""

import functools
import importlib
import json

import chex
import flax.linen as nn
import jax
import numpy as np
import pytest

from experiments.bench import detection, layers, step
from experiments.bench.__main__ import main
from experiments.bench._timing import load_torch, normal_arrays
from wsbcn_flax import WSConv, standardize
from wsbcn_flax.models import ResNet50
from wsbcn_flax.transforms import import_checkpoint

SHAPE, GROUPS = (2, 4, 4, 8), 4
FEATURES = (1, 12, 16, 4)


@pytest.fixture
def torch():
    return pytest.importorskip("torch", reason="comparing needs the extra torch")


@pytest.fixture
def small_network(torch, monkeypatch):
    """Makes torchvision's ResNet-50 a network of one block in each stage."""
    models = pytest.importorskip("torchvision").models.resnet
    small = functools.partial(models.ResNet, models.Bottleneck, (1, 1, 1, 1))
    monkeypatch.setattr("torchvision.models.resnet50", small)


@pytest.fixture
def theirs(torch):
    return load_torch()


@pytest.mark.parametrize("command", ["layers", "step", "detection"])
def test_a_missing_torch_is_an_error_that_names_the_extra(command, capsys, monkeypatch):
    importing = importlib.import_module

    def import_all_but_torch(name, *package):
        if name == "torch":
            raise ImportError(name)
        return importing(name, *package)

    # sys.modules stays as it is, since the command line's parser looks for torch there.
    monkeypatch.setattr(importlib, "import_module", import_all_but_torch)
    assert main([command, "--against", "torch"]) == 1
    assert "pip install 'wsbcn_flax[torch]'" in capsys.readouterr().err.splitlines()[-1]


def test_layers_compute_what_ours_do(theirs):
    calls = theirs.layer_calls(GROUPS, SHAPE)
    ours = layers.layer_calls(layers.normalizations(GROUPS), SHAPE)
    for name in ("batch_norm", "group_norm", "naive_bcn"):
        y, (_, dx), _ = ours[name, "forward_backward"]()
        for key in (f"torch_{name}", f"torch_{name}_nhwc"):
            their_y, (their_dx, *_) = calls[key, "forward_backward"]()
            for received, expected in (
                (their_y, y),
                (their_dx, dx),
                (calls[key, "forward"](), y),
            ):
                array = received.numpy().transpose(0, 2, 3, 1)
                np.testing.assert_allclose(array, expected, atol=1e-4)


def test_layers_adds_torchs_rows(torch, tmp_path, capsys):
    path = tmp_path / "layers.json"
    options = ["--shapes", *map(str, SHAPE), "--num-groups", str(GROUPS), "--repeats", "1"]
    assert main(["layers", *options, "--against", "torch", "--json", str(path)]) == 0
    rows = json.loads(path.read_text())
    theirs = {row["norm"] for row in rows} - layers.normalizations(GROUPS).keys() - {"elementwise"}
    names = ["torch_batch_norm", "torch_group_norm", "torch_naive_bcn"]
    assert theirs == {*names, *(f"{name}_nhwc" for name in names)}
    keys = {"shape", "norm", "pass", "ratio_to_batchnorm", "median_ms", "spread"}
    assert all(set(row) == keys for row in rows)
    assert "PyTorch" in capsys.readouterr().out


def test_kernels_are_standardized_as_ours(torch, theirs):
    kernel = torch.randn(8, 3, 2, 2)
    received = theirs.WeightStandardization()(kernel).numpy().transpose(2, 3, 1, 0)
    expected = standardize(kernel.numpy().transpose(2, 3, 1, 0))
    np.testing.assert_allclose(received, expected, atol=1e-5)


def test_the_network_is_ours(torch, theirs):
    """Its parameters, imported by the names of the authors' checkpoint, give the same logits."""
    network = theirs.resnet50_gn_ws()
    for block in network.modules():
        if hasattr(block, "bn3"):  # Otherwise the branches add nothing.
            torch.nn.init.ones_(block.bn3.weight)
    arrays = {
        name.replace("parametrizations.weight.original", "weight"): array.numpy()
        for name, array in network.state_dict().items()
    }
    variables = import_checkpoint(arrays, "R-50-GN-WS")
    norm = functools.partial(nn.GroupNorm, num_groups=32, epsilon=1e-5)
    model = ResNet50(conv=WSConv, norm=norm)
    images = np.random.default_rng(0).standard_normal((1, 32, 32, 3), np.float32)
    expected = jax.jit(lambda v, x: model.apply(v, x, train=False))(variables, images)
    with torch.no_grad():
        logits = network(torch.from_numpy(images.transpose(0, 3, 1, 2).copy())).numpy()
    np.testing.assert_allclose(logits, expected, atol=1e-2 * np.abs(expected).max())


def test_step_adds_our_row_and_torchs(small_network, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(step, "training_call", lambda *_, **__: lambda: None)
    path = tmp_path / "step.json"
    options = ["--norms", "bn", "--image-size", "16", "--repeats", "1", "--json", str(path)]
    assert main(["step", *options, "--against", "torch"]) == 0
    rows = {row["norm"]: row for row in json.loads(path.read_text())}
    assert set(rows) == {"bn", "gn_ws", "torch_gn_ws", "torch_gn_ws_nhwc"}
    assert rows["gn_ws"]["ratio_to_torch_gn_ws"] > 0
    assert rows["torch_gn_ws"]["ratio_to_torch_gn_ws"] == 1
    assert "PyTorch" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["torch_gn_ws", "torch_gn_ws_nhwc"])
def test_torchs_step_trains(theirs, small_network, name):
    calls = theirs.step_calls("torch_gn_ws", step.random_batch((2, 32, 32, 3)))
    losses = [calls[name, "step"]() for _ in range(3)]
    assert np.isfinite(losses).all()
    assert losses[2] < losses[0]


def test_operations_of_detectors_compute_what_ours_do(theirs):
    boxes, scores = detection.random_boxes(60, FEATURES[1:])
    kept = detection.nms_calls(boxes, scores)["ours", "forward"]()
    order = np.argsort(-scores)
    expected = theirs.nms_calls(boxes, scores)["torch", "forward"]().numpy()
    np.testing.assert_array_equal(order[np.asarray(kept)[order]], expected)
    arrays = normal_arrays(FEATURES, (60, 7, 7, 4))
    calls = theirs.roi_calls(*arrays, boxes)
    y, (dx,) = calls["torch", "forward_backward"]()
    for (_, which), call in detection.roi_calls(*arrays, boxes).items():
        received = call()
        chex.assert_trees_all_close(received[0], y.numpy().transpose(0, 2, 3, 1), atol=1e-4)
        if which == "forward_backward":
            chex.assert_trees_all_close(received[1], (dx.numpy().transpose(0, 2, 3, 1),), atol=1e-4)
