"""Tracing of a model to find the convolutions that a normalization follows."""

import functools
import itertools
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
from flax.core import DenyList

from wsbcn_flax.layers import BatchChannelNorm
from wsbcn_flax.transforms._kernel_flow import (
    KernelFlow,
    KernelLayout,
    mark_convolution,
    mark_normalization,
)
from wsbcn_flax.transforms._path_rules import ConvolutionKernel

_CONVOLUTIONS = (nn.Conv, nn.ConvTranspose)
_NORMS = (
    nn.BatchNorm,
    nn.GroupNorm,
    nn.InstanceNorm,
    nn.LayerNorm,
    nn.RMSNorm,
    BatchChannelNorm,
)
# These normalize the weights of the layer inside them.
_WEIGHT_NORMS = (nn.SpectralNorm, nn.WeightNorm)
_NORM_NAME = re.compile(r"norm(?!al(?!i[sz]))", re.IGNORECASE)  # LayerNorm2d, but not NormalHead.

_traces = itertools.count()


def normalized_convolutions(
    model: nn.Module, *inputs: Any, norms: Sequence[type[nn.Module]] = (), **kwargs: Any
) -> tuple[ConvolutionKernel, ...]:
    """Finds the kernels of the convolutions whose output is the input of a normalization.

    These are the kernels that Weight Standardization is for, whatever their names and biases.
    ``WeightStandardization(where=normalized_convolutions(...))`` takes exactly these kernels. The
    model is traced once to see where each output goes; nothing is computed.

    The output of a convolution is followed through any operation that moves, adds, multiplies or
    pools it:

    - casts, reshapes, slices, padding, concatenation, dropout, barriers, sharding constraints;
    - sums (a bias, a residual connection), products (a gate, a mask), means, poolings;
    - resizing, and any other linear map with constant factors;
    - activations that grow with their input, such as ReLU, GELU and SiLU.

    The search stops at the next convolution or matrix product, a bounded activation (sigmoid, tanh,
    softmax), ``stop_gradient``, or any other operation. A kernel that is used more than once is
    taken if a normalization follows one of its uses.

    Convolutions are ``nn.Conv``, ``nn.ConvTranspose`` and their subclasses, ``WSConv`` included.
    Normalizations are Flax's, ``BatchChannelNorm``, and their subclasses. Modules that call no
    other module and whose class name contains "Norm" count too. The input of a normalization is its
    first array argument.

    Args:
        model: Flax module, not bound to variables.
        *inputs: Arguments of the model's call, as arrays or ``jax.ShapeDtypeStruct``. Anything
            else, such as a flag, is passed as it is.
        norms: Further classes of modules that count as normalizations.
        **kwargs: Keyword arguments of the model's call. Prefer ``train=False``, with which
            normalizations average over no devices.

    Returns:
        One ``ConvolutionKernel`` for each kernel, in the order of the parameters. It holds the
        output axis, also of transposed convolutions, and the number of axes of one layer's kernel.
        Any further leading axes are those that ``nn.scan`` and ``nn.vmap`` add.

    Raises:
        TypeError: If the model is not a Flax module.
        ValueError: If no normalization follows any convolution. If layers are stacked along an axis
            that is not a leading one (detected where the sizes of the axes differ).

    Example:
        >>> import flax.linen as nn, jax
        >>> from wsbcn_flax.transforms import normalized_convolutions
        >>> class Net(nn.Module):
        ...     @nn.compact
        ...     def __call__(self, x):
        ...         x = nn.relu(nn.GroupNorm(4)(nn.Conv(8, (3, 3), name="conv")(x)))
        ...         return nn.Conv(2, (1, 1), name="out")(x)
        >>> normalized_convolutions(Net(), jax.ShapeDtypeStruct((1, 8, 8, 3), "float32"))
        (ConvolutionKernel(path='conv/kernel', ndim=4, out_axis=-1),)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model must be a Flax module such as Net(), received {model!r:.80}. Pass the module "
            "first and what it is called with after it."
        )
    leaves, structure = jax.tree.flatten((inputs, kwargs))
    arrays = {i: leaf for i, leaf in enumerate(leaves) if _is_array(leaf)}

    def call(function: Any, variables: Any, arrays: Mapping[int, Any]) -> Any:
        filled = [arrays.get(index, leaf) for index, leaf in enumerate(leaves)]
        inputs, kwargs = jax.tree.unflatten(structure, filled)
        return function(variables, *inputs, **kwargs)

    def apply(variables: Any, arrays: Mapping[int, Any]) -> Any:
        # All random numbers come from this key. Every collection but the parameters is mutable.
        options = {"rngs": {"params": jax.random.key(0)}, "mutable": DenyList("params")}
        return call(functools.partial(model.apply, **options), variables, arrays)

    variables = jax.eval_shape(lambda arrays: call(model.init, jax.random.key(0), arrays), arrays)
    calls = _Calls((*_NORMS, *norms))
    # JAX's caches have the names of axes in their keys, so a new name avoids old traces.
    trace = jax.make_jaxpr(apply, axis_env=[(f"wsbcn_flax_{next(_traces)}", 1)])
    with nn.intercept_methods(calls.intercept):
        jaxpr = trace(variables, arrays).jaxpr
    kernels = _kernels(variables)
    flow = KernelFlow()
    flow.run(jaxpr, [frozenset({i} & kernels.keys()) for i in range(len(jaxpr.invars))])
    if not flow.normalized:
        raise ValueError(
            "A normalization must follow at least one convolution, and none does in "
            f"{type(model).__name__}, which was found to call {len(flow.layouts)} convolutions and "
            f"{calls.normalizations} normalizations. Name normalizations of your own with "
            "norms=(MyNorm,), or choose kernels by patterns, where='encoder/*/kernel'."
        )
    return tuple(_convolution_kernel(*kernels[i], flow.layouts[i]) for i in sorted(flow.normalized))


def _kernels(variables: Mapping[str, Any]) -> dict[int, tuple[str, tuple[int, ...]]]:
    """Returns paths and shapes of parameters named kernel, by their number among all leaves."""
    kernels = {}
    for index, (keys, leaf) in enumerate(jax.tree_util.tree_leaves_with_path(variables)):
        # A box around an array, such as nn.Partitioned, adds a key of another kind.
        names = [key.key for key in keys if isinstance(key, jax.tree_util.DictKey)]
        if names[0] == "params" and names[-1] == "kernel":
            kernels[index] = "/".join(names[1:]), leaf.shape
    return kernels


def _convolution_kernel(
    path: str, shape: tuple[int, ...], layouts: Collection[KernelLayout]
) -> ConvolutionKernel:
    for layer, _ in layouts:
        if shape[len(shape) - len(layer) :] != layer:
            raise ValueError(
                f"Axes that stack layers must lead a kernel's shape, and {path} {shape} does not "
                f"end in the shape {layer} of one layer's kernel. Stack the layers with "
                'variable_axes={"params": 0}.'
            )
    layer, out_axis = next(iter(layouts))
    return ConvolutionKernel(path, len(layer), out_axis)


def _is_array(leaf: Any) -> bool:
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype")


class _Calls:
    """An interceptor of module calls that marks outputs of convolutions and normalizations.

    Attributes:
        normalizations: Number of normalizations called so far.
    """

    def __init__(self, norms: tuple[type[nn.Module], ...]):
        self.normalizations = 0
        self._norms = norms
        self._caller: nn.Module | None = None
        self._count = 0

    def intercept(self, next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
        """Calls a method as Flax would, and marks its output."""
        if context.method_name != "__call__":
            return next_fun(*args, **kwargs)
        module, caller = context.module, self._caller
        self._count += module is not caller  # Else it calls its superclass's method.
        count, self._caller = self._count, module
        try:
            output = next_fun(*args, **kwargs)
        finally:
            self._caller = caller
        if isinstance(module, _CONVOLUTIONS):
            return _mark_output(module, output)
        array = next(filter(_is_array, (*args, *kwargs.values())), None)
        if array is None or not self._is_norm(module, calls_none=count == self._count):
            return output
        self.normalizations += 1
        return mark_normalization(output, array)

    def _is_norm(self, module: nn.Module, *, calls_none: bool) -> bool:
        if isinstance(module, self._norms):
            return True
        named = _NORM_NAME.search(type(module).__name__) is not None
        return named and calls_none and not isinstance(module, _WEIGHT_NORMS)


def _mark_output(module: nn.Conv | nn.ConvTranspose, output: Any) -> Any:
    if not module.has_variable("params", "kernel"):
        return output
    (kernel,) = jax.tree.leaves(module.get_variable("params", "kernel"))
    sizes = module.kernel_size
    ndim = 2 + (1 if isinstance(sizes, int) else len(sizes))
    out_axis = -2 if getattr(module, "transpose_kernel", False) else -1
    return mark_convolution(output, kernel, KernelLayout(kernel.shape[-ndim:], out_axis))
