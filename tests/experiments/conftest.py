"""What tests of commands share."""

import functools
import io

import pytest
from rich.console import Console

from experiments import _models
from wsbcn_flax import models


@pytest.fixture
def console():
    """Keeps what is printed in ``console.file``."""
    return Console(file=io.StringIO(), width=120)


@pytest.fixture
def tiny_network(monkeypatch, quick_compilation):
    """Makes resnet8 a stem and one block, for tests of what is done with any network."""
    tiny = functools.partial(
        models.ResNet, stage_sizes=(1,), features=8, block=models.BasicBlock, stem_features=4
    )
    monkeypatch.setitem(_models.MODELS, "resnet8", tiny)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """Prepares data in a folder of the module's own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WSBCN_FLAX_DATA_DIR", str(tmp_path_factory.mktemp("data")))
        yield
