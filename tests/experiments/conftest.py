"""Fixtures that tests of commands share."""

import io
import os
import subprocess

import pytest
from rich.console import Console
from tiny_train import COMMAND, TINY_NETWORK

from experiments import _models


@pytest.fixture
def console():
    """Keeps what is printed in ``console.file``."""
    return Console(file=io.StringIO(), width=120)


@pytest.fixture
def tiny_network(monkeypatch):
    """Makes resnet8 a stem and one block, for tests that do not depend on the network."""
    monkeypatch.setitem(_models.MODELS, "resnet8", TINY_NETWORK)


@pytest.fixture
def tiny_processes(monkeypatch, tiny_network):
    """Makes training in separate processes use the tiny network, too."""
    start = subprocess.Popen

    def start_tiny(command, *, env=os.environ, **options):
        command = [COMMAND if part == "experiments.train" else part for part in command]
        return start(command, env=env, **options)

    monkeypatch.setattr(subprocess, "Popen", start_tiny)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """Prepares data in a folder for one test module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WSBCN_FLAX_DATA_DIR", str(tmp_path_factory.mktemp("data")))
        yield
