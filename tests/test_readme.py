"""The README's Python runs, and prints what its comments say."""

import re
from pathlib import Path

README = (Path(__file__).parent.parent / "README.md").read_text()


def test_every_python_block_runs_in_order(capsys):
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(blocks) >= 4
    exec("\n".join(blocks), {"__name__": "readme"})
    printed = capsys.readouterr().out.splitlines()
    assert printed == [
        "['conv0/kernel', 'conv1/kernel']",
        "True",
        "2 True",
        "4 True",
        "16 True",
    ]


def test_every_command_named_exists():
    modules = set(re.findall(r"python -m (experiments\.\w+)", README))
    assert {"experiments.train", "experiments.compare", "experiments.bench"} <= modules
    root = Path(__file__).parent.parent
    for module in modules:
        path = root / module.replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists()
