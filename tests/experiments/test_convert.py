"""PyTorch checkpoints are converted to files of this package, with the model they need."""

import jax
import numpy as np
import pytest
import torch_resnet

from experiments import convert
from experiments._model_file import load_model
from wsbcn_flax.transforms import export_checkpoint

CLASSES = tuple(f"class {number}" for number in range(1000))


@pytest.mark.parametrize("name", ["R-50-BCN-WS", "R-50-GN-WS", "resnet18"])
def test_a_packaged_checkpoint_computes_what_pytorch_computes(name):
    """The recipe in the file has the right model, normalization and convention of WS."""
    state_dict = export_checkpoint(torch_resnet.random_variables(name), name)
    model = convert.model_of_checkpoint(state_dict, name, class_names=CLASSES)
    assert model.recipe.weight.kind == ("none" if name == "resnet18" else "ws")
    model = model.folded()
    network = model.experiment.task.model
    logits = jax.jit(lambda v, x: network.apply(v, x, train=False))(
        model.variables, torch_resnet.images()
    )
    golden = np.load(torch_resnet.GOLDEN)[name]
    np.testing.assert_allclose(logits, golden, atol=1e-4 * np.abs(golden).max())


def test_converts_a_file_by_its_name_or_by_its_keys(tmp_path, capsys):
    torch = pytest.importorskip("torch", reason="reading PyTorch's files needs the extra torch")
    variables = torch_resnet.random_variables("resnet18")
    arrays = export_checkpoint(variables, "resnet18")
    tensors = {f"module.{key}": torch.from_numpy(array) for key, array in arrays.items()}
    for stem in ("resnet18", "anything"):
        source, out = tmp_path / f"{stem}.pth.tar", tmp_path / f"{stem}.safetensors"
        torch.save({"state_dict": tensors, "epoch": 90}, source)
        assert convert.main(["authors", str(source), str(out)]) == 0
        loaded = load_model(out)
        jax.tree.map(np.testing.assert_array_equal, loaded.variables, variables)
        assert loaded.facts["class_names"][:2] == ["n01440764", "n01443537"]
    assert "11,689,512 parameters" in capsys.readouterr().out


def test_refuses_files_that_are_no_checkpoints(tmp_path, capsys):
    torch = pytest.importorskip("torch", reason="reading PyTorch's files needs the extra torch")
    (tmp_path / "damaged.pth").write_bytes(b"PK\x03\x04 nothing")
    torch.save({"epoch": 1}, tmp_path / "empty.pth")
    torch.save({"fc.bias": torch.zeros(3)}, tmp_path / "R-50-GN-WS.pth")
    cases = {
        "absent.pth": "There is no file",
        "damaged.pth": "is damaged or holds other objects",
        "empty.pth": "must hold a state dict",
        "R-50-GN-WS.pth": "missing (160)",
    }
    for name, message in cases.items():
        arguments = ["authors", str(tmp_path / name), str(tmp_path / "out.safetensors")]
        assert convert.main(arguments) == 1
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out.safetensors").exists()
