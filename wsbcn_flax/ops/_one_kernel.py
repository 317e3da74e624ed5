"""Functions of arrays that a TPU computes in one kernel, and other platforms as written.

A TPU takes at least a microsecond for each operation of a program, however little it computes. So
a function of many operations on small arrays is one Pallas kernel there. This module makes the
choice when a program is lowered. The kernel runs on a TPU where each device has its own arrays, as
in ``shard_map`` or on one device. The function runs where XLA splits the arrays, on other
platforms, under ``vmap``, and for the derivatives that a training step does not take.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.xla_metadata import set_xla_metadata
from jax.extend.core import Primitive, jaxpr_as_fun
from jax.interpreters import ad, batching, mlir

from wsbcn_flax.ops._explicit_axes import vary_over, varying_axes

Wanted = Sequence[bool]
LANES = 128  # Columns that a TPU computes at a time.
_LARGEST = 2**20  # Limit on the bytes of all arrays that one kernel holds at once.


def in_one_kernel(function: Callable[..., Any], kernel: Callable[..., Any], *arguments: Any) -> Any:
    """Returns ``function(*arguments)``, computed by ``kernel(*arguments)`` on a TPU.

    Args:
        function: Function of pytrees of arrays.
        kernel: Function with the same result by a Pallas kernel such as ``whole_kernel``.
        *arguments: Pytrees of arrays.
    """
    flat, tree = _flatten(arguments)
    traced, out_tree = _trace(function, jax.tree.unflatten(tree, flat))
    outputs = _function_p.bind(
        *flat,
        function=jaxpr_as_fun(traced),
        kernel=_on_leaves(kernel, tree),
        avals=tuple(traced.out_avals),
    )
    return jax.tree.unflatten(out_tree, outputs)


def linear_with_transpose(
    function: Callable[[Any, Any], Any],
    transpose: Callable[[Any, Any], Any],
    residuals: Any,
    linear: Any,
    *,
    kernel: Callable[[Wanted, Any, Any], list[jax.Array]] | None = None,
) -> Any:
    """Returns ``function(residuals, linear)``, linear in ``linear``, with a custom transpose.

    Args:
        function: Function of two pytrees of arrays.
        transpose: Function ``(residuals, cotangents)`` that returns the cotangent of ``linear``.
        residuals: Pytree in which ``function`` need not be linear.
        linear: Pytree in which ``function`` is linear.
        kernel: Function ``(wanted, residuals, cotangents)``, the transpose by a Pallas kernel for
            TPU. It returns only the leaves that are wanted.
    """
    flat, tree = _flatten((residuals, linear))
    traced, out_tree = _trace(function, jax.tree.unflatten(tree, flat))
    residual_tree = jax.tree.structure(residuals)

    def transpose_leaves(wanted, residual_leaves, cotangent_leaves):
        def as_written(residuals, cotangents):
            return only(wanted, transpose(residuals, cotangents))

        arguments = (
            jax.tree.unflatten(residual_tree, residual_leaves),
            jax.tree.unflatten(out_tree, cotangent_leaves),
        )
        if kernel is None:
            return as_written(*arguments)
        return in_one_kernel(as_written, functools.partial(kernel, wanted), *arguments)

    outputs = _linear_p.bind(
        *flat,
        function=jaxpr_as_fun(traced),
        transpose=transpose_leaves,
        count=residual_tree.num_leaves,
        avals=tuple(traced.out_avals),
    )
    return jax.tree.unflatten(out_tree, outputs)


def only(wanted: Wanted, tree: Any) -> list[jax.Array]:
    """Returns the leaves that are wanted."""
    return list(itertools.compress(jax.tree.leaves(tree), wanted))


def whole_kernel(function: Callable[..., Any], *arguments: Any) -> Any:
    """Computes a function of matrices in a Pallas kernel that holds all of them at once.

    Args:
        function: Function from pytrees of matrices to a pytree of matrices, in operations that
            Pallas has for TPU.
        *arguments: Pytrees of matrices.
    """
    return _run(function, arguments, tile=None)


def column_kernel(function: Callable[..., Any], *arguments: Any) -> Any:
    """Computes a function of each column of matrices, [any, C], in a Pallas kernel.

    Args:
        function: Function from pytrees of matrices to a pytree of matrices, in operations that
            Pallas has for TPU. Columns do not depend on one another.
        *arguments: Pytrees of matrices.
    """
    columns = {leaf.shape[1] for leaf in jax.tree.leaves(arguments)}
    (count,) = columns
    return _run(function, arguments, tile=None if count % LANES else LANES)


def _run(function, arguments, *, tile: int | None):
    from jax.experimental import pallas as pl  # Importing it takes as long as the library.

    flat, tree = jax.tree.flatten(arguments)
    traced, out_tree = _trace(function, arguments)

    def kernel(*references):
        inputs, outputs = references[: len(flat)], references[len(flat) :]
        results = _on_leaves(function, tree)(*(reference[...] for reference in inputs))
        for reference, result in zip(outputs, results, strict=True):
            reference[...] = result

    def columns(array):
        return pl.BlockSpec((array.shape[0], tile), lambda i: (0, i))

    axes = jax.typeof(flat[0]).manual_axis_type
    shapes = [
        jax.ShapeDtypeStruct(a.shape, a.dtype, manual_axis_type=axes) for a in traced.out_avals
    ]
    grid: dict[str, Any] = {}
    if tile is not None:
        grid["grid"] = (flat[0].shape[1] // tile,)
        grid["in_specs"], grid["out_specs"] = [*map(columns, flat)], [*map(columns, shapes)]
    call = pl.pallas_call(kernel, out_shape=shapes, **grid)
    # XLA for TPU tiles few samples well (its pass is called space-to-batch) only for convolutions
    # from which no custom call is reached. It looks for such calls before it inlines this function
    # (libtpu 0.0.42). Without this a ResNet-50 step at 2 images is estimated at 1.1 times the time.
    with set_xla_metadata(inlineable="false"):
        outputs = jax.jit(call)(*flat)
    return jax.tree.unflatten(out_tree, outputs)


def fit_at_once(*arrays: Any) -> bool:
    """Returns whether pytrees of arrays suit one kernel: in float32, and small together."""
    leaves = jax.tree.leaves(arrays)
    # The batch of an exported program may be symbolic.
    if not all(isinstance(size, int) for leaf in leaves for size in leaf.shape):
        return False
    is_single = all(leaf.dtype == jnp.float32 for leaf in leaves)
    return is_single and 4 * sum(leaf.size for leaf in leaves) <= _LARGEST


def _flatten(arguments: Any) -> tuple[list[jax.Array], Any]:
    """Returns the leaves, made to vary over the same ``shard_map`` axes, and the structure."""
    flat, tree = jax.tree.flatten(arguments)
    axes = frozenset().union(*map(varying_axes, flat))
    return [vary_over(axes, leaf) for leaf in flat], tree


def _trace(function: Callable[..., Any], arguments: Any) -> tuple[Any, Any]:
    """Traces the function once, and returns it with the structure of its outputs."""
    jaxpr, shapes = jax.make_jaxpr(function, return_shape=True)(*arguments)
    return jaxpr, jax.tree.structure(shapes)


def _on_leaves(function: Callable[..., Any], tree: Any) -> Callable[..., list[Any]]:
    """Turns a function of pytrees into a function from leaves to leaves."""
    return lambda *flat: jax.tree.leaves(function(*jax.tree.unflatten(tree, flat)))


_function_p = Primitive("wsbcn_function")
_linear_p = Primitive("wsbcn_linear")
for _primitive in (_function_p, _linear_p):
    _primitive.multiple_results = True
    _primitive.def_impl(lambda *flat, function, **_: function(*flat))
    _primitive.def_abstract_eval(lambda *_, avals, **__: avals)
    mlir.register_lowering(
        _primitive,
        mlir.lower_fun(lambda *flat, function, **_: function(*flat), multiple_results=True),
    )


def _lower_for_tpu(ctx, *operands, function, kernel, **_):
    chosen = kernel if _is_local(ctx) else function
    return mlir.lower_fun(chosen, multiple_results=True)(ctx, *operands)


mlir.register_lowering(_function_p, _lower_for_tpu, platform="tpu")


def _is_local(ctx: Any) -> bool:
    """Returns whether the arrays here belong to one device, so that XLA does not split them."""
    context = ctx.module_context.axis_context
    if hasattr(context, "manual_axes"):
        manual = context.manual_axes | set(context.mesh.manual_axes)
        return manual == frozenset(context.mesh.axis_names)
    return getattr(context, "num_devices", 1) == 1


def _jvp(primals, tangents, *, function, **_):
    """Differentiates the function itself, whatever its kernel."""
    tangents = tuple(ad.instantiate_zeros(tangent) for tangent in tangents)
    return jax.jvp(function, tuple(primals), tangents)


def _jvp_of_linear(primals, tangents, *, function, count, **params):
    constant = all(isinstance(tangent, ad.Zero) for tangent in tangents[:count])
    if not constant:
        return _jvp(primals, tangents, function=function)
    tangents = [ad.instantiate_zeros(tangent) for tangent in tangents[count:]]
    bind = functools.partial(_linear_p.bind, function=function, count=count, **params)
    return bind(*primals), bind(*primals[:count], *tangents)


def _transpose_linear(cotangents, *operands, transpose, count, **_):
    cotangents = [ad.instantiate_zeros(cotangent) for cotangent in cotangents]
    # Operands that are not differentiated have known tangents, and no cotangent.
    wanted = [ad.is_undefined_primal(operand) for operand in operands[count:]]
    pulled = iter(transpose(wanted, operands[:count], cotangents))
    return [None] * count + [next(pulled) if is_wanted else None for is_wanted in wanted]


def _batch(operands, dimensions, *, function, **_):
    outputs = jax.vmap(function, in_axes=tuple(dimensions))(*operands)
    return outputs, [0] * len(outputs)


ad.primitive_jvps[_function_p] = _jvp
ad.primitive_jvps[_linear_p] = _jvp_of_linear
ad.primitive_transposes[_linear_p] = _transpose_linear
batching.primitive_batchers[_function_p] = _batch
batching.primitive_batchers[_linear_p] = _batch
