"""Small datasets: MNIST, its relatives, and scikit-learn's digits.

    python -m experiments.train mnist5k_resnet8_bcn_ws --batch.micro 1

Networks are narrow. They train for 8 epochs at batch size 64, with a learning rate of 0.1, one
epoch of warm-up and cosine decay. GN and BCN have 4 groups. The README has the expected results.
Images of 28x28 pixels have little detail, so their stem has stride 2, at a quarter of the cost.
"""

from experiments._classification import ClassificationRecipe
from experiments._recipe import DataConfig, ModelConfig

_DATA = (
    DataConfig(name="mnist5k", crop_padding=1),
    DataConfig(name="mnist", crop_padding=1),
    DataConfig(name="digits", crop_padding=1),
    DataConfig(name="fashion", flip=True),
)
_STEM_STRIDES = {"mnist5k": 2, "mnist": 2, "fashion": 2}

RECIPES = [
    ClassificationRecipe(
        data=data, model=ModelConfig(name=model, stem_strides=_STEM_STRIDES.get(data.name))
    )
    for data in _DATA
    for model in ("resnet8", "resnet20")
]
