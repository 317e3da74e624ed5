"""The authors' and torchvision's checkpoints are imported exactly and exported bit for bit."""

import functools
import hashlib
import json
import re

import jax
import ml_dtypes
import numpy as np
import pytest
import torch_resnet
from oracles import relative_error
from torch_resnet import numbered_variables

from wsbcn_flax import WeightStandardization
from wsbcn_flax.transforms import (
    CheckpointSpec,
    checkpoint_names,
    checkpoint_spec,
    export_checkpoint,
    fold_weight_standardization,
    guess_checkpoint_name,
    import_checkpoint,
)

TOLERANCE = 1e-4  # Relative error of float32 compared with the float64 oracle.

# Each published checkpoint's arrays, elements, and SHA-256 of its sorted [key, shape] list.
PUBLISHED = {
    "R-50-GN-WS": (
        161,
        25_557_032,
        "b3bb8a53acf36a69153ba41184697a02c2ced4291da6603a75525b5d480e1ff8",
    ),
    "R-101-GN-WS": (
        314,
        44_549_160,
        "b4225011d5d3f8e6c2cd88ee63114b0a975af83cecb87619d8487b72f136b344",
    ),
    "X-50-32x4d-GN-WS": (
        161,
        25_028_904,
        "bbf5ebacb1c97350de9673fe89810eb0445768e06d0d61c60799afec1ad32629",
    ),
    "X-101-32x4d-GN-WS": (
        314,
        44_177_704,
        "4519ffc4ee564fadb64c65c601465c485b4440272139d46f047ee832d4418b29",
    ),
    "R-50-BCN-WS": (
        426,
        25_613_597,
        "1ffdcebd4c47c20f230519e4e6741ef737cee40256384b8b573c9663018a7826",
    ),
    "R-101-BCN-WS": (
        834,
        44_661_264,
        "472c17258d75b47ef6d4961fbc478f4748059963253d1fb7ef103acf354d0932",
    ),
    "X-50-32x4d-BCN-WS": (
        426,
        25_100_573,
        "a92f970f906c7cd81748a1fc965ca8971fc92ca102ebe558b4062b7c45b702fe",
    ),
}


def fingerprint(arrays):
    listed = sorted([key, list(array.shape)] for key, array in arrays.items())
    return hashlib.sha256(json.dumps(listed).encode()).hexdigest()


@pytest.mark.parametrize("name", checkpoint_names())
def test_keys_are_published_and_tell_the_name_and_round_trips_are_bit_exact(name):
    variables = numbered_variables(name)
    arrays = export_checkpoint(variables, name)
    if name in PUBLISHED:
        numbers = sum(array.size for array in arrays.values())
        assert (len(arrays), numbers, fingerprint(arrays)) == PUBLISHED[name]
    assert guess_checkpoint_name(arrays) == name
    imported = import_checkpoint(arrays, name)
    jax.tree.map(np.testing.assert_array_equal, imported, variables)
    again = export_checkpoint(imported, name)
    assert set(again) == set(arrays)
    for key, array in arrays.items():
        assert again[key].dtype == array.dtype
        np.testing.assert_array_equal(again[key], array)


def test_every_published_checkpoint_has_a_name():
    assert set(PUBLISHED) <= set(checkpoint_names())


@functools.cache
def evaluate(name):
    return jax.jit(functools.partial(checkpoint_spec(name).make_model().apply, train=False))


@functools.cache
def logits(name, preset):
    variables = torch_resnet.random_variables(name)
    if preset is not None:
        params = fold_weight_standardization(variables["params"], preset=preset)
        variables = {**variables, "params": params}
    return np.asarray(evaluate(name)(variables, torch_resnet.images()))


def our_logits(name):
    return logits(name, checkpoint_spec(name).preset)


# One name per convention of WS; `test_convert.py` tests the other golden logits.
each_convention = pytest.mark.parametrize("name", ["X-50-32x4d-GN-WS", "R-50-BCN-WS"])


@each_convention
def test_logits_are_those_that_pytorch_computed(name):
    """Golden logits are from the PyTorch model with the same weights; see torch_resnet.py."""
    assert relative_error(our_logits(name), np.load(torch_resnet.GOLDEN)[name]) < TOLERANCE


@pytest.mark.parametrize("name", torch_resnet.NAMES)
def test_logits_are_those_of_pytorch(name):
    pytest.importorskip("torch", reason="the live oracle needs the extra torch")
    assert relative_error(our_logits(name), torch_resnet.logits(name)) < TOLERANCE


@each_convention
def test_logits_of_another_convention_are_others(name):
    """So the oracle distinguishes the place of epsilon and the divisor of the variance."""
    golden = np.load(torch_resnet.GOLDEN)[name]
    for preset in {"bcn", "official", "official_tf", None} - {checkpoint_spec(name).preset}:
        assert relative_error(logits(name, preset), golden) > 10 * TOLERANCE, preset


def test_folding_is_the_transform():
    params = torch_resnet.random_variables("resnet18")["params"]
    expected = WeightStandardization(preset="bit")(params)
    jax.tree.map(
        np.testing.assert_array_equal, fold_weight_standardization(params, preset="bit"), expected
    )


def test_plain_batch_norm_has_no_count():
    """The count is dropped, may be absent as in PyTorch's oldest files, and is exported as zero."""
    arrays = export_checkpoint(numbered_variables("resnet18"), "resnet18")
    counts = {key: np.int64(7) for key in arrays if key.endswith("num_batches_tracked")}
    assert len(counts) == 20
    assert all(arrays[key] == 0 for key in counts)
    without = {key: array for key, array in arrays.items() if key not in counts}
    imported = (import_checkpoint(a, "resnet18") for a in ({**arrays, **counts}, without))
    jax.tree.map(np.testing.assert_array_equal, *imported)


def test_prefixes_of_wrappers_and_the_rest_of_a_file_do_not_matter():
    variables = numbered_variables("resnet18")
    arrays = export_checkpoint(variables, "resnet18")
    prefixes = ["module.", "_orig_mod.", "model.", "module._orig_mod.", "_orig_mod.module."]
    prefixed = [
        {f"{prefix}{key}": array for key, array in arrays.items()}
        for prefix in [*prefixes, "model.model."]
    ]
    for state_dict in (*prefixed, {"epoch": 90, "state_dict": prefixed[0]}):
        assert guess_checkpoint_name(state_dict) == "resnet18"
        imported = import_checkpoint(state_dict, "resnet18")
        jax.tree.map(np.testing.assert_array_equal, imported, variables)


def test_a_prefix_that_some_keys_lack_is_none():
    arrays = export_checkpoint(numbered_variables("resnet18"), "resnet18")
    arrays["module.fc.bias"] = arrays.pop("fc.bias")
    with pytest.raises(ValueError, match=r"missing \(1\): fc.bias\n.*\(1\): module.fc.bias"):
        import_checkpoint(arrays, "resnet18")


@pytest.mark.parametrize("name", ["R-50-GN-WS", "R-50-BCN-WS"])
def test_axes_of_length_one_do_not_matter(name):
    """Exports from TensorFlow have scales (1, 1, 1, C); a head may be a 1x1 convolution."""
    variables = numbered_variables(name)
    arrays = export_checkpoint(variables, name)
    shapes = {
        "bn1.bias": (1, 1, 1, -1),
        "layer1.0.bn1.weight": (1, -1, 1, 1),
        "layer1.0.bn2.weight": (-1, 1, 1),
        "layer1.0.bn2.bias": (-1,),
        "fc.bias": (1, -1),
        "fc.weight": (1000, 2048, 1, 1),
        "layer1.1.conv1.weight": (64, 256),
    }
    changed = {key: arrays[key].reshape(shape) for key, shape in shapes.items()}
    assert all(changed[key].shape != arrays[key].shape for key in changed if "bn2" not in key)
    imported = import_checkpoint({**arrays, **changed}, name)
    jax.tree.map(np.testing.assert_array_equal, imported, variables)


@pytest.mark.parametrize(
    ("key", "shape"),
    [
        ("layer1.0.conv1.weight", (1, 1, 64, 64)),  # HWIO, or OIHW with axes moved.
        ("layer1.0.conv1.weight", (64, 64)),
        ("layer1.1.conv1.weight", (1, 1, 256, 64)),
        ("fc.weight", (2048, 1000)),
        ("bn1.weight", (8, 8)),
        ("bn1.weight", (1, 32, 2)),
    ],
)
def test_axes_that_could_be_others_are_refused(key, shape):
    arrays = export_checkpoint(numbered_variables("resnet50"), "resnet50")
    expected = arrays[key].shape
    arrays[key] = arrays[key].reshape(shape)
    with pytest.raises(ValueError, match=re.escape(f"(1): {key} {shape}, not {expected}")):
        import_checkpoint(arrays, "resnet50")


def test_double_precision_is_rounded():
    variables = torch_resnet.random_variables("resnet18")
    arrays = export_checkpoint(variables, "resnet18")
    wide = {key: array.astype(np.float64) * (1 + 1e-12) for key, array in arrays.items()}
    counts = {key: array for key, array in arrays.items() if array.dtype == np.int64}
    imported = import_checkpoint({**wide, **counts}, "resnet18")
    assert {leaf.dtype for leaf in jax.tree.leaves(imported)} == {np.dtype(np.float32)}
    jax.tree.map(np.testing.assert_array_equal, imported, variables)


def test_values_that_no_model_has_are_listed_in_one_error():
    arrays = export_checkpoint(torch_resnet.random_variables("resnet18"), "resnet18")
    arrays["fc.bias"][3] = np.nan
    arrays["conv1.weight"][0, 0, 0, 0] = -np.inf
    arrays["bn1.weight"] = np.full(64, 1e300)
    arrays["bn1.running_var"][5] = -1e-3
    with pytest.raises(ValueError, match="values of resnet18 must be finite") as error:
        import_checkpoint(arrays, "resnet18")
    message = str(error.value)
    assert "not finite (2): fc.bias, conv1.weight" in message
    assert "beyond float32 (1): bn1.weight" in message
    assert "negative (1): bn1.running_var" in message


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_is_widened(dtype):
    variables = torch_resnet.random_variables("resnet18")
    half = jax.tree.map(lambda x: x.astype(dtype), variables)
    arrays = export_checkpoint(half, "resnet18")
    assert arrays["conv1.weight"].dtype == dtype
    imported = import_checkpoint(arrays, "resnet18")
    assert imported["params"]["stem_conv"]["kernel"].dtype == np.float32
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, y.astype(x.dtype)), imported, half)


def test_lists_all_that_is_wrong_in_one_error():
    arrays = export_checkpoint(numbered_variables("R-50-GN-WS"), "R-50-GN-WS")
    del arrays["fc.bias"], arrays["bn1.weight"]
    arrays["layer5.0.conv1.weight"] = np.zeros(3)
    arrays["conv1.weight"] = np.zeros((64, 1, 7, 7), np.float32)
    arrays["bn1.bias"] = arrays["bn1.bias"].astype(np.int64)
    with pytest.raises(ValueError, match="must be those of R-50-GN-WS") as error:
        import_checkpoint(arrays, "R-50-GN-WS")
    message = str(error.value)
    assert "missing (2): " in message
    assert "fc.bias" in message
    assert "bn1.weight" in message
    assert "extra (1): layer5.0.conv1.weight" in message
    assert "misshapen (1): conv1.weight (64, 1, 7, 7), not (64, 3, 7, 7)" in message
    assert "of another dtype (1): bn1.bias int64, not float32" in message
    assert "no architecture known here" in message


def test_a_wrong_name_is_told_the_right_one():
    arrays = export_checkpoint(numbered_variables("R-50-BCN-WS"), "R-50-BCN-WS")
    with pytest.raises(ValueError, match="They are those of R-50-BCN-WS: pass that name"):
        import_checkpoint(arrays, "R-50-GN-WS")


def test_other_refusals():
    variables = numbered_variables("resnet18")
    with pytest.raises(ValueError, match=r"one of R-50-GN-WS, .* received 'R-50'"):
        import_checkpoint({}, "R-50")
    with pytest.raises(ValueError, match=r"variables must be those of resnet34, received others"):
        export_checkpoint(variables, "resnet34")
    with pytest.raises(ValueError, match="are not: x"):
        guess_checkpoint_name({"x": np.zeros(1)})
    with pytest.raises(ValueError, match=r"norm must be one of .* received 'ln'"):
        CheckpointSpec(model="ResNet50", norm="ln")
    with pytest.raises(ValueError, match=r"preset must be one of .* received 'ws'"):
        CheckpointSpec(model="ResNet50", norm="gn", preset="ws")
