import json

from experiments import summary
from wsbcn_flax.models import VGG16, summarize


def test_prints_a_table_and_writes_json(tmp_path, capsys):
    path = tmp_path / "summary.json"
    arguments = ["--models", "resnet18", "resnet20", "--norm", "gn_ws", "--json", str(path)]
    assert summary.main(arguments) == 0
    document = json.loads(path.read_text())
    assert document["norm"] == "gn_ws"
    # The numbers are torchvision's for ImageNet and the papers' for CIFAR.
    assert document["models"]["resnet18"]["parameters"] == 11_689_512
    assert document["models"]["resnet20"]["parameters"] == 272_474
    printed = capsys.readouterr().out
    assert "gn_ws" in printed
    assert "11,689,512" in printed


def test_summarizes_what_a_recipe_trains():
    assert summary.summarize_model("vgg16", "bn") == summarize(VGG16(), (32, 32, 3))
    gains = summary.summarize_model("resnet20", "bn_cwn").parameters - 272_474
    assert gains == 16 + 6 * 16 + 6 * 32 + 6 * 64 + 32 + 64  # One per channel of each kernel.


def test_unknown_names_are_one_line(capsys):
    for arguments in (["--models", "resnet19"], ["--norm", "xn"]):
        assert summary.main(arguments) == 1
        assert "A recipe is named" in capsys.readouterr().err
