"""The field's conventions for weight standardization, as data."""

import dataclasses
from typing import Literal

Denominator = Literal["sqrt_var_plus_eps", "std_plus_eps", "sqrt_sum", "norm"]
_DENOMINATORS = ("sqrt_var_plus_eps", "std_plus_eps", "sqrt_sum", "norm")


@dataclasses.dataclass(frozen=True, kw_only=True)
class StandardizationRule:
    """A rule for centring and dividing each output channel of a kernel over its n weights.

    With u = W - mean(W) if ``center`` else W, and s = sum(u^2), the kernel becomes
    ``gain * u / denominator + shift``, where the denominator is

        sqrt_var_plus_eps    sqrt(s / m + epsilon)
        std_plus_eps         sqrt(s / m) + epsilon
        sqrt_sum             sqrt(max(s, epsilon)), s being var * n
        norm                 sqrt(s + epsilon)

    and m is n - 1 if ``unbiased`` else n.

    Attributes:
        denominator: Name of one of the four formulas above.
        epsilon: Constant in the formula, in units of a weight squared (a weight for
            ``std_plus_eps``).
        center: Whether the mean is subtracted.
        unbiased: Whether the variance divides by n - 1.
        learnable_gain: Whether layers own a gain per output channel, initialized to one.
        constants: Whether layers own a gain and a shift per output channel that are not trained.
            ``constant_gain`` is one and ``constant_shift`` zero until
            ``WeightStandardization.start_from_plain`` fills them.

    Raises:
        ValueError: For an unknown denominator, an epsilon that is not positive, or a gain that is
            both learned and constant.

    Example:
        >>> import dataclasses
        >>> from wsbcn_flax.ops import PRESETS
        >>> dataclasses.replace(PRESETS["timm"], epsilon=1e-8).epsilon  # timm's BiT models
        1e-08
    """

    denominator: Denominator
    epsilon: float
    center: bool = True
    unbiased: bool = False
    learnable_gain: bool = False
    constants: bool = False

    def __post_init__(self):
        if self.denominator not in _DENOMINATORS:
            raise ValueError(
                f"denominator must be one of {_DENOMINATORS}, received {self.denominator!r}."
            )
        if self.learnable_gain and self.constants:
            raise ValueError(
                "A gain must be either learned or constant, received learnable_gain=True and "
                "constants=True. Set one of them to False."
            )
        if not self.epsilon > 0:
            raise ValueError(
                "epsilon must be positive, since a constant kernel is divided by it, received "
                f"{self.epsilon}."
            )

    @property
    def channel_parameters(self) -> dict[str, tuple[str, float]]:
        """Maps arguments of ``standardize`` to the parameters of layers and initial values."""
        if self.constants:
            return {"gain": ("constant_gain", 1.0), "shift": ("constant_shift", 0.0)}
        return {"gain": ("gain", 1.0)} if self.learnable_gain else {}


PRESETS: dict[str, StandardizationRule] = {
    # The authors' BCN code for ImageNet.
    "bcn": StandardizationRule(denominator="sqrt_var_plus_eps", epsilon=1e-5, unbiased=True),
    # The authors' WS, COCO and DeepLab code; mmcv's ConvWS.
    "official": StandardizationRule(denominator="std_plus_eps", epsilon=1e-5, unbiased=True),
    # The authors' TensorFlow code; big_vision.
    "official_tf": StandardizationRule(denominator="std_plus_eps", epsilon=1e-5),
    # Big Transfer and scenic.
    "bit": StandardizationRule(denominator="sqrt_var_plus_eps", epsilon=1e-10),
    # timm's StdConv2d.
    "timm": StandardizationRule(denominator="sqrt_var_plus_eps", epsilon=1e-6),
    # mmcv's ConvAWS, which starts as the plain convolution of a trained checkpoint.
    "aws": StandardizationRule(
        denominator="sqrt_var_plus_eps", epsilon=1e-5, unbiased=True, constants=True
    ),
    # NFNets' scaled weight standardization.
    "nfnet": StandardizationRule(denominator="sqrt_sum", epsilon=1e-4, learnable_gain=True),
    # Relatives: weight normalization and centered weight normalization.
    "wn": StandardizationRule(denominator="norm", epsilon=1e-12, center=False, learnable_gain=True),
    "cwn": StandardizationRule(denominator="norm", epsilon=1e-12, learnable_gain=True),
}
"""The field's conventions by name; a comment names the code that uses each."""


def resolve_rule(preset: str | StandardizationRule) -> StandardizationRule:
    """Returns the rule that a preset names; a rule is returned as it is.

    Raises:
        ValueError: For an unknown name.
        TypeError: For anything but a name or a rule.
    """
    if isinstance(preset, StandardizationRule):
        return preset
    if not isinstance(preset, str):
        raise TypeError(
            f"preset must be a name among {list(PRESETS)} or a StandardizationRule, "
            f"received {type(preset).__name__}."
        )
    if preset not in PRESETS:
        raise ValueError(
            f"preset must be one of {list(PRESETS)} or a StandardizationRule, received {preset!r}."
        )
    return PRESETS[preset]
