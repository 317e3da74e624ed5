"""Tracking of kernels in a traced program, from their convolutions to normalizations."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core
from jax.interpreters import ad, batching

# Operations whose output still counts as the convolution's: moved, cast, summed, multiplied or
# pooled. ReLU and other activations that grow with their input are made of these operations.
_FOLLOWED = (
    {"reshape", "squeeze", "expand_dims", "broadcast_in_dim", "transpose", "rev", "split"}
    | {"slice", "dynamic_slice", "dynamic_update_slice", "gather", "scatter", "scatter-add"}
    | {
        "concatenate",
        "stack",
        "unstack",
        "tile",
        "pad",
        "select_n",
        "copy",
        "copy_p",
        "name",
        "optimization_barrier",
    }
    | {"convert_element_type", "reduce_precision", "device_put", "sharding_constraint", "reshard"}
    | {"add", "add_any", "sub", "neg", "mul", "div", "abs", "max", "min", "clamp", "cumsum"}
    | {"reduce_sum", "reduce_max", "reduce_min", "reduce_window", "reduce_window_sum"}
    | {"reduce_window_max", "reduce_window_min", "psum", "psum_invariant", "pvary", "pcast"}
    | {"all_gather", "ppermute"}
)
_PRODUCTS = {"conv_general_dilated", "dot_general"}

# Kernels that a value comes from, by number; None for a value that depends on no argument.
Origin = frozenset[int] | None


class KernelLayout(NamedTuple):
    """The shape of one layer's convolution kernel, and its axis of output channels."""

    shape: tuple[int, ...]
    out_axis: int


# A mark is an equation of a traced program: (array, output) -> output, where the array is the
# kernel of a convolution or the input of a normalization. JAX carries the mark through every
# transformation. It identifies its kernel by the array, not by a path, as layers may share a trace.
_mark = core.Primitive("wsbcn_flax_mark")
_mark.def_impl(lambda array, output, *, layout: output)
_mark.def_abstract_eval(lambda array, output, *, layout: output)
batching.primitive_batchers[_mark] = lambda arrays, axes, *, layout: (
    _mark.bind(*arrays, layout=layout),
    axes[1],
)
ad.primitive_jvps[_mark] = lambda primals, tangents, *, layout: (
    _mark.bind(*primals, layout=layout),
    tangents[1],
)


def mark_convolution(output: Any, kernel: jax.Array, layout: KernelLayout) -> Any:
    """Returns a convolution's output, marked with its kernel for ``KernelFlow``."""
    return jax.tree.map(lambda array: _mark.bind(kernel, array, layout=layout), output)


def mark_normalization(output: Any, array: jax.Array) -> Any:
    """Returns a normalization's output, marked with its input ``array`` for ``KernelFlow``."""
    return jax.tree.map(lambda output: _mark.bind(array, output, layout=None), output)


class KernelFlow:
    """A tracker of kernels from their convolutions to normalizations in a marked program.

    Attributes:
        layouts: Layouts in which convolutions have used a kernel, by the number of the kernel.
        normalized: Numbers of the kernels that have reached a normalization.
    """

    def __init__(self):
        self.layouts: dict[int, set[KernelLayout]] = {}
        self.normalized: set[int] = set()

    def run(self, jaxpr: core.Jaxpr, inputs: Sequence[Origin]) -> list[Origin]:
        """Returns the origins of a program's outputs, from those of its inputs."""
        origins: dict[Any, Origin] = dict(zip(jaxpr.invars, inputs, strict=True))

        def read(atoms: Sequence[Any]) -> list[Origin]:
            return [None if isinstance(a, core.Literal) else origins.get(a) for a in atoms]

        for equation in jaxpr.eqns:
            outputs = self._equation(equation, read(equation.invars))
            for variable, origin in zip(equation.outvars, outputs, strict=True):
                dtype = getattr(variable.aval, "dtype", bool)
                # Indices and conditions depend on a convolution's output but do not carry it.
                is_value = jnp.issubdtype(dtype, jnp.inexact)
                origins[variable] = origin if is_value or origin is None else frozenset()
        return read(jaxpr.outvars)

    def _equation(self, equation: core.JaxprEqn, inputs: list[Origin]) -> list[Origin]:
        primitive, params = equation.primitive.name, equation.params
        count = len(equation.outvars)
        if equation.primitive is _mark:
            return [self._follow(params["layout"], *inputs)]
        if primitive == "scan":
            consts, carried = params["num_consts"], params["num_carry"]
            return self._loop(params["jaxpr"].jaxpr, inputs, consts, carried)
        if primitive == "while":
            inputs = inputs[params["cond_nconsts"] :]
            consts = params["body_nconsts"]
            return self._loop(params["body_jaxpr"].jaxpr, inputs, consts, len(inputs) - consts)
        if primitive == "cond":
            branches = [self.run(branch.jaxpr, inputs[1:]) for branch in params["branches"]]
            return [_union(origins) for origins in zip(*branches, strict=True)]
        for called in core.jaxprs_in_params(params):
            if len(called.invars) == len(inputs) and len(called.outvars) == count:
                return self.run(called, inputs)
        if all(origin is None for origin in inputs):
            return [None] * count
        if primitive in _PRODUCTS:
            left, right = inputs
            return [left if right is None else right if left is None else frozenset()]
        if primitive not in _FOLLOWED:
            return [frozenset()] * count
        if count == len(inputs):
            return inputs
        return [_union(inputs)] * count

    def _follow(self, layout: KernelLayout | None, array: Origin, output: Origin) -> Origin:
        if layout is None:
            self.normalized |= (array or frozenset()) & self.layouts.keys()
            return output
        for kernel in array or ():
            self.layouts.setdefault(kernel, set()).add(layout)
        return array

    def _loop(
        self, body: core.Jaxpr, inputs: list[Origin], consts: int, carried: int
    ) -> list[Origin]:
        """Runs the body of a loop until the origins of what it carries stay the same."""
        inputs, carry = list(inputs), slice(consts, consts + carried)
        while True:
            outputs = self.run(body, inputs)
            joined = [_union(pair) for pair in zip(inputs[carry], outputs[:carried], strict=True)]
            if joined == inputs[carry]:
                return [*joined, *outputs[carried:]]
            inputs[carry] = joined


def _union(origins: Iterable[Origin]) -> Origin:
    known = [origin for origin in origins if origin is not None]
    return frozenset().union(*known) if known else None
