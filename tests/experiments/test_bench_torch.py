"""PyTorch's side of the benchmarks computes what ours does, and is told to be missing if it is."""

import functools
import importlib.util

import flax.linen as nn
import jax
import numpy as np
import pytest

from experiments import bench
from experiments._bench import layers, step
from experiments._bench.torch_extra import check_torch, keep_faster_format
from wsbcn_flax import WSConv, standardize
from wsbcn_flax.models import ResNet50
from wsbcn_flax.transforms import import_checkpoint

pytestmark = pytest.mark.usefixtures("quick_compilation")
SHAPE, GROUPS = (2, 4, 4, 8), 4


@pytest.fixture
def torch():
    return pytest.importorskip("torch", reason="comparing needs the extra torch")


def test_a_missing_torch_is_an_error_that_names_the_extra(capsys, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'wsbcn_flax\[torch\]'"):
        check_torch()
    for command in ("layers", "step"):
        assert bench.main([command, "--against", "torch"]) == 1
        assert "wsbcn_flax[torch]" in capsys.readouterr().err.splitlines()[-1]


def test_the_format_of_the_lesser_median_is_kept():
    seconds = {
        ("bn", "forward"): np.array([1.0]),
        ("torch/contiguous", "forward"): np.array([3.0, 3.0, 0.0]),
        ("torch/channels_last", "forward"): np.array([2.0, 2.0, 9.0]),
    }
    kept, formats = keep_faster_format(seconds)
    assert list(kept) == [("bn", "forward"), ("torch", "forward")]
    assert kept["torch", "forward"][0] == 2
    assert formats == {("torch", "forward"): "channels_last"}


def test_layers_compute_what_ours_do(torch):
    from experiments._bench.torch_layers import torch_layer_calls

    theirs = torch_layer_calls(GROUPS, SHAPE)
    ours = layers.layer_calls(layers.normalizations(GROUPS), SHAPE)
    for name in ("batch_norm", "group_norm", "naive_bcn"):
        y, (_, dx), _ = ours[name, "forward_backward"]()
        for memory_format in ("contiguous", "channels_last"):
            key = f"torch_{name}/{memory_format}"
            got_y, (got_dx, *_) = theirs[key, "forward_backward"]()
            for got, expected in ((got_y, y), (got_dx, dx), (theirs[key, "forward"](), y)):
                np.testing.assert_allclose(got.numpy().transpose(0, 2, 3, 1), expected, atol=1e-4)


def test_layers_adds_torchs_rows(torch, console):
    options = {"shapes": (SHAPE,), "num_groups": GROUPS, "repeats": 1, "against": "torch"}
    rows = layers.run_layers(layers.Layers(**options), console)
    names = dict.fromkeys(row["norm"] for row in rows)
    assert list(names)[-3:] == ["torch_batch_norm", "torch_group_norm", "torch_naive_bcn"]
    keys = {"shape", "norm", "pass", "ratio_to_batchnorm", "median_ms", "spread"}
    assert all(set(row) == keys for row in rows)


def test_kernels_are_standardized_as_ours(torch):
    from experiments._bench.torch_step import StandardizedConv

    conv = StandardizedConv(3, 8, 2, bias=False)
    kernel = conv.weight.detach().numpy().transpose(2, 3, 1, 0)
    # A convolution of the unit impulses of a window gives back the kernel.
    impulses = torch.eye(12).reshape(12, 3, 2, 2)
    got = conv(impulses).detach().numpy()[:, :, 0, 0].reshape(3, 2, 2, 8).transpose(1, 2, 0, 3)
    np.testing.assert_allclose(got, standardize(kernel), atol=1e-5)


def test_the_network_is_ours(torch):
    """Its parameters, by the names of the authors' checkpoint, give the same logits."""
    from experiments._bench.torch_step import GroupNormResNet

    network = GroupNormResNet()
    for block in network.modules():
        if hasattr(block, "bn3"):  # Else the branches add nothing.
            torch.nn.init.ones_(block.bn3.weight)
    arrays = {name: array.numpy() for name, array in network.state_dict().items()}
    variables = import_checkpoint(arrays, "R-50-GN-WS")
    norm = functools.partial(nn.GroupNorm, num_groups=32, epsilon=1e-5)
    model = ResNet50(conv=WSConv, norm=norm)
    images = np.random.default_rng(0).standard_normal((1, 32, 32, 3), np.float32)
    expected = jax.jit(lambda v, x: model.apply(v, x, train=False))(variables, images)
    with torch.no_grad():
        got = network(torch.from_numpy(images.transpose(0, 3, 1, 2).copy())).numpy()
    np.testing.assert_allclose(got, expected, atol=1e-2 * np.abs(expected).max())


def test_step_adds_torchs_row(torch, console, monkeypatch):
    from experiments._bench import torch_step

    small = torch_step.GroupNormResNet
    monkeypatch.setattr(torch_step, "GroupNormResNet", lambda: small((1,), 1000))
    monkeypatch.setattr(step, "TrainingCall", lambda *_, **__: lambda: None)
    config = step.Step(norms=("bn", "gn_ws"), image_size=16, repeats=1, against="torch")
    document = step.run_step(config, console)
    assert [row["norm"] for row in document["rows"]] == ["bn", "gn_ws", "torch_gn_ws"]
    assert set(document["torch"]) == {"version", "memory_format", "ratio_to_torch"}
    assert "as long as in PyTorch" in " ".join(console.file.getvalue().split())


def test_torchs_step_trains(torch):
    from experiments._bench.torch_step import GroupNormResNet, TorchTrainingCall

    batch = step.random_batch((2, 16, 16, 3), num_classes=4)
    call = TorchTrainingCall(GroupNormResNet((1,), 4), batch, "channels_last")
    losses = [call() for _ in range(3)]
    assert np.isfinite(losses).all()
    assert losses[2] < losses[0]
