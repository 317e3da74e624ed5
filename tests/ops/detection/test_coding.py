"""Box coding: torchvision's values, maskrcnn-benchmark's formula, inverses, finite gradients."""

import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from detection_oracles import golden, random_boxes

from wsbcn_flax.ops.detection import AUTHORS, TORCHVISION, decode_boxes, encode_boxes

WEIGHTS = (10.0, 10.0, 5.0, 5.0)


def test_coding_equals_torchvision():
    expected = golden("code_")
    proposals, truth = jnp.asarray(expected["proposals"]), jnp.asarray(expected["gt"])
    deltas = encode_boxes(truth, proposals, weights=WEIGHTS)
    np.testing.assert_allclose(deltas, expected["deltas"], rtol=1e-5, atol=1e-5)
    scaled = jnp.asarray(1.3 * expected["deltas"])
    decoded = decode_boxes(scaled, proposals, weights=WEIGHTS)
    np.testing.assert_allclose(decoded, expected["decoded"], rtol=1e-5, atol=1e-5)


def test_authors_convention_is_maskrcnn_benchmarks():
    """Sides count the last pixel; its decoded corner is the center plus half a side minus one."""
    box, reference = np.array([10.0, 20.0, 29.0, 24.0]), np.array([8.0, 16.0, 17.0, 35.0])
    expected = [
        10 * ((10 + 20 / 2) - (8 + 10 / 2)) / 10,
        10 * ((20 + 5 / 2) - (16 + 20 / 2)) / 20,
        5 * math.log(20 / 10),
        5 * math.log(5 / 20),
    ]
    deltas = encode_boxes(box, reference, weights=WEIGHTS, convention=AUTHORS)
    np.testing.assert_allclose(deltas, expected, rtol=1e-6)
    assert abs(encode_boxes(box, reference, weights=WEIGHTS) - deltas).max() > 0.1


@pytest.mark.parametrize("convention", [AUTHORS, TORCHVISION])
def test_decoding_inverts_encoding(convention):
    boxes, references = random_boxes(0, 50), random_boxes(1, 50)

    @jax.jit
    def there_and_back(boxes, references):
        deltas = encode_boxes(boxes, references, weights=WEIGHTS, convention=convention)
        return decode_boxes(deltas, references, weights=WEIGHTS, convention=convention)

    np.testing.assert_allclose(there_and_back(boxes, references), boxes, atol=1e-4)


def test_growth_is_limited():
    decoded = decode_boxes(jnp.array([0.0, 0.0, 100.0, 4.0]), jnp.array([0.0, 0.0, 16.0, 16.0]))
    sides = decoded[2:] - decoded[:2]
    np.testing.assert_allclose(sides, [1000, 16 * math.exp(4.0)], rtol=1e-5)


@pytest.mark.parametrize("convention", [AUTHORS, TORCHVISION])
@pytest.mark.parametrize("code", [encode_boxes, decode_boxes])
def test_degenerate_boxes_have_finite_values_and_gradients(code, convention):
    values = jnp.array([[5.0, 5, 5, 5], [9, 9, 5, 5], [0, 0, 1e4, 1e4], [1, 2, 3, 4]])
    for references in (values, values[::-1], jnp.zeros((4, 4)).at[:, :2].set(3)):
        out, pull = jax.vjp(lambda *a: code(*a, convention=convention), values, references)
        chex.assert_tree_all_finite((out, pull(jnp.ones_like(out))))


def test_half_precision_deltas_are_decoded_in_float32():
    reference = jnp.array([1000.0, 1000.0, 1003.0, 1001.0])
    decoded = decode_boxes(jnp.zeros(4, jnp.bfloat16), reference)
    assert decoded.dtype == "float32"
    np.testing.assert_allclose(decoded, reference)


def test_shapes_must_agree():
    with pytest.raises(ValueError, match=r"same shape, received \(2, 3, 4\) and \(2, 4\)"):
        decode_boxes(jnp.zeros((2, 3, 4)), jnp.zeros((2, 4)))
