"""Costs of a model (parameters, operations, activation memory), computed by tracing alone."""

import functools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
from jax.extend import core


class ModelSummary(NamedTuple):
    """Costs of a model, as ``summarize`` counts them.

    Attributes:
        parameters: Number of elements in the collection ``params``; running statistics do not
            count.
        flops: Floating-point operations of the forward pass of one image: 2 for each multiply-add
            of convolutions and matrix products. Positions in the padding count, as in papers.
        activation_bytes: Bytes per image that training keeps from the forward to the backward
            pass. They are what differentiation saves, before XLA recomputes or shares any of it.
    """

    parameters: int
    flops: int
    activation_bytes: int


def summarize(model: nn.Module, image_shape: tuple[int, int, int]) -> ModelSummary:
    """Computes the parameters, operations and activation memory of a classification model.

    The model is traced, never run. It is called as ``model.apply(variables, images, train=...)``
    with float32 images, and may hold any convolution, normalization and dtype.

    Args:
        model: Model; ``nn.remat`` in it lowers the memory.
        image_shape: Shape (H, W, C) of one image.

    Raises:
        ValueError: For an image shape that is not (H, W, C), or that the model cannot take.

    Example:
        >>> from wsbcn_flax.models import ResNet50, summarize
        >>> summary = summarize(ResNet50(), (224, 224, 3))
        >>> summary.parameters, f"{summary.flops / 2e9:.2f} billion multiply-adds"
        (25557032, '4.09 billion multiply-adds')
    """
    if len(image_shape) != 3:
        raise ValueError(
            f"image_shape must be (H, W, C), without the batch, received {tuple(image_shape)}."
        )
    one, two = (jax.ShapeDtypeStruct((batch, *image_shape), "float32") for batch in (1, 2))
    evaluate = functools.partial(model.apply, train=False)
    variables = jax.eval_shape(functools.partial(model.init, train=False), jax.random.key(0), one)
    return ModelSummary(
        parameters=sum(leaf.size for leaf in jax.tree.leaves(variables["params"])),
        flops=2 * _multiply_adds(jax.make_jaxpr(evaluate)(variables, one).jaxpr),
        # Arrays that do not grow with the batch, such as the parameters, cancel.
        activation_bytes=_saved_bytes(model, variables, two) - _saved_bytes(model, variables, one),
    )


def _multiply_adds(jaxpr: core.Jaxpr) -> int:
    """Counts multiply-adds of convolutions and matrix products, also in called functions."""
    total = 0
    for equation in jaxpr.eqns:
        variables = (*equation.invars, *equation.outvars)
        # Not everything in a program is an array.
        shapes: list[tuple[int, ...]] = [getattr(v.aval, "shape", ()) for v in variables]
        match equation.primitive.name:
            case "conv_general_dilated":
                _, kernel, out = shapes
                out_axis = equation.params["dimension_numbers"].rhs_spec[0]
                total += math.prod(out) * math.prod(kernel) // kernel[out_axis]
            case "dot_general":
                left, _, out = shapes
                (contracted, _), _ = equation.params["dimension_numbers"]
                total += math.prod(out) * math.prod(left[axis] for axis in contracted)
            case _:
                calls = equation.params.get("length", 1)  # Number of times a scan runs its body.
                total += calls * sum(map(_multiply_adds, core.jaxprs_in_params(equation.params)))
    return total


def _saved_bytes(
    model: nn.Module, variables: Mapping[str, Any], images: jax.ShapeDtypeStruct
) -> int:
    """Returns the bytes that a training step keeps from its forward to its backward pass."""

    def pull_back(variables: Mapping[str, Any], images: jax.Array) -> Any:
        def forward(params: Any) -> Any:
            return model.apply(
                {**variables, "params": params},
                images,
                train=True,
                mutable=["batch_stats"],
                rngs={"dropout": jax.random.key(0)},
            )

        _, vjp, _ = jax.vjp(forward, variables["params"], has_aux=True)
        return vjp

    saved = jax.tree.leaves(jax.eval_shape(pull_back, variables, images))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in saved)
