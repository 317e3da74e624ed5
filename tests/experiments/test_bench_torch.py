"""PyTorch's side of the benchmarks computes what ours does, and is told to be missing if it is."""

import functools
import importlib
import json

import flax.linen as nn
import jax
import numpy as np
import pytest

from experiments.bench import layers, step
from experiments.bench.__main__ import main
from experiments.bench._timing import keep_faster_format, load_torch, normal_arrays
from wsbcn_flax import WSConv, standardize
from wsbcn_flax.models import ResNet50
from wsbcn_flax.transforms import import_checkpoint

pytestmark = pytest.mark.usefixtures("quick_compilation")
SHAPE, GROUPS = (2, 4, 4, 8), 4


@pytest.fixture
def torch():
    return pytest.importorskip("torch", reason="comparing needs the extra torch")


@pytest.fixture
def theirs(torch):
    return load_torch()


@pytest.mark.parametrize("command", ["layers", "step"])
def test_a_missing_torch_is_an_error_that_names_the_extra(command, capsys, monkeypatch):
    importing = importlib.import_module

    def import_all_but_torch(name):
        if name == "torch":
            raise ImportError(name)
        return importing(name)

    # Without it in sys.modules, where the command line's parser looks for it.
    monkeypatch.setattr(importlib, "import_module", import_all_but_torch)
    assert main([command, "--against", "torch"]) == 1
    assert "pip install 'wsbcn_flax[torch]'" in capsys.readouterr().err.splitlines()[-1]


def test_the_format_of_the_lower_median_is_kept():
    seconds = {
        ("bn", "forward"): np.array([1.0]),
        ("torch/contiguous", "forward"): np.array([3.0, 3.0, 0.0]),
        ("torch/channels_last", "forward"): np.array([2.0, 2.0, 9.0]),
    }
    kept, formats = keep_faster_format(seconds)
    assert list(kept) == [("bn", "forward"), ("torch", "forward")]
    assert kept["torch", "forward"][0] == 2
    assert formats == {("torch", "forward"): "channels_last"}


def test_layers_compute_what_ours_do(theirs):
    calls = theirs.layer_calls(GROUPS, normal_arrays(SHAPE, SHAPE))
    ours = layers.layer_calls(layers.normalizations(GROUPS), SHAPE)
    for name in ("batch_norm", "group_norm", "naive_bcn"):
        y, (_, dx), _ = ours[name, "forward_backward"]()
        for memory_format in ("contiguous", "channels_last"):
            key = f"torch_{name}/{memory_format}"
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
    names = list(dict.fromkeys(row["norm"] for row in rows))
    assert names[-3:] == ["torch_batch_norm", "torch_group_norm", "torch_naive_bcn"]
    keys = {"shape", "norm", "pass", "ratio_to_batchnorm", "median_ms", "spread"}
    assert all(set(row) == keys for row in rows)
    assert "Its faster formats: 2x4x4x8 torch_batch_norm forward: c" in capsys.readouterr().out


def test_kernels_are_standardized_as_ours(torch, theirs):
    conv = theirs.StandardizedConv(3, 8, 2, bias=False)
    kernel = conv.weight.detach().numpy().transpose(2, 3, 1, 0)
    # A convolution of the unit impulses of a window gives back the kernel.
    impulses = torch.eye(12).reshape(12, 3, 2, 2)
    received = conv(impulses).detach().numpy()[:, :, 0, 0].reshape(3, 2, 2, 8)
    np.testing.assert_allclose(received.transpose(1, 2, 0, 3), standardize(kernel), atol=1e-5)


def test_the_network_is_ours(torch, theirs):
    """Its parameters, by the names of the authors' checkpoint, give the same logits."""
    network = theirs.GroupNormResNet()
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
        logits = network(torch.from_numpy(images.transpose(0, 3, 1, 2).copy())).numpy()
    np.testing.assert_allclose(logits, expected, atol=1e-2 * np.abs(expected).max())


def test_step_adds_our_row_and_torchs(theirs, tmp_path, capsys, monkeypatch):
    class Nothing:
        image_size = 16

        def __init__(self, *_, **__): ...
        def __call__(self): ...

    monkeypatch.setattr(step, "TrainingCall", Nothing)
    small = theirs.GroupNormResNet
    monkeypatch.setattr(theirs, "GroupNormResNet", lambda: small((1,), 1000))
    path = tmp_path / "step.json"
    options = ["--norms", "bn", "--image-size", "16", "--repeats", "1", "--json", str(path)]
    assert main(["step", *options, "--against", "torch"]) == 0
    document = json.loads(path.read_text())
    assert [row["norm"] for row in document["rows"]] == ["bn", "gn_ws", "torch_gn_ws"]
    assert set(document["torch"]) == {"version", "memory_format", "ratio_to_torch"}
    assert "as long as in PyTorch" in " ".join(capsys.readouterr().out.split())


def test_torchs_step_trains(theirs):
    batch = step.random_batch((2, 16, 16, 3))
    call = theirs.training_call(theirs.GroupNormResNet((1,), 10), batch, "channels_last")
    losses = [call() for _ in range(3)]
    assert np.isfinite(losses).all()
    assert losses[2] < losses[0]
