"""ImageNet (ILSVRC 2012), as the authors of Weight Standardization train on it.

    python -m experiments.train imagenet_resnet50_bcn_ws

SGD has momentum 0.9 and a learning rate of 0.1, divided by 10 at every milestone. Weight decay is
1e-4 for all parameters, scales and biases too, as in PyTorch's SGD. Images are randomly cropped,
resized and flipped. GN and BCN have 32 groups. The last scale of each residual branch starts at 0.
"""

import functools

from experiments._recipe import DataConfig
from experiments.recipes._table import Published, step_recipe

_recipe = functools.partial(
    step_recipe, DataConfig(name="imagenet", eval_split="validation"), groups=32
)
RECIPES = [
    _recipe("resnet18", epochs=90, milestones=(30.0, 60.0), batch=256),
    _recipe("resnet34", epochs=90, milestones=(30.0, 60.0), batch=256),
    _recipe("resnet50", epochs=90, milestones=(30.0, 60.0), batch=256),
    _recipe("resnet101", epochs=100, milestones=(30.0, 60.0, 90.0), batch=128),
    _recipe("resnet152", epochs=100, milestones=(30.0, 60.0, 90.0), batch=128),
    _recipe("resnext50_32x4d", epochs=100, milestones=(30.0, 60.0, 90.0), batch=128),
    _recipe("resnext101_32x4d", epochs=100, milestones=(30.0, 60.0, 90.0), batch=128),
]

# Top-1 and top-5 error in %, and FLOPs of the convolutions, forward and backward.
SOURCE = "the authors' Weight Standardization README"
PUBLISHED = {
    "imagenet_resnet50_gn_ws": Published("23.72 % top-1, 6.99 % top-5", SOURCE, 2.8e18),
    "imagenet_resnet101_gn_ws": Published("22.10 % top-1, 6.07 % top-5", SOURCE, 6.0e18),
    "imagenet_resnext50_32x4d_gn_ws": Published("22.71 % top-1, 6.38 % top-5", SOURCE, 3.3e18),
    "imagenet_resnext101_32x4d_gn_ws": Published("21.80 % top-1, 6.03 % top-5", SOURCE, 6.1e18),
}
