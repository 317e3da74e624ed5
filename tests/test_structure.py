"""Packages import only lower packages, declare what they export, and are cheap to import."""

import ast
import importlib
import json
import pathlib
import pkgutil
import re
import subprocess
import sys

import pytest

import wsbcn_flax

ROOT = pathlib.Path(wsbcn_flax.__file__).parents[1]
# The packages of this library that each package may import, besides itself.
MAY_IMPORT = {
    "wsbcn_flax.ops": set(),
    "wsbcn_flax.layers": {"ops"},
    "wsbcn_flax.models": {"ops", "layers"},
    "wsbcn_flax.nnx": {"ops", "layers", "models"},
    "wsbcn_flax.transforms": {"ops", "layers", "models"},
    "wsbcn_flax.tasks": {"ops", "layers", "transforms", "models"},
    "wsbcn_flax.data": {"ops"},
    "wsbcn_flax.training": {"ops", "layers", "transforms", "models", "tasks"},
}
SHARED = {"_extras", "_folder_lock"}  # Imported by any package; they import none.
PACKAGES = [
    "wsbcn_flax",
    "wsbcn_flax.ops.detection",
    "wsbcn_flax.models.detection",
    "wsbcn_flax.nnx.models",
    *MAY_IMPORT,
]
BY_NAME = ["models", "nnx", "tasks", "data", "training"]  # `import wsbcn_flax` imports none.


def imported(path):
    """Yields full names of all modules that a file imports, with relative ones resolved."""
    module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = module.rsplit(".", node.level)[0] + "." if node.level else ""
            yield from (f"{base}{node.module or ''}.{alias.name}" for alias in node.names)


def ruff_order(name):
    """Sorts constants, then classes, then functions, each by name with numbers as numbers."""
    parts = [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]
    return not name.isupper(), not name[0].isupper(), parts


def files(package):
    return sorted((ROOT / package.replace(".", "/")).rglob("*.py"))


def test_every_package_has_a_place_in_the_order():
    found = {
        name for _, name, is_package in pkgutil.iter_modules(wsbcn_flax.__path__) if is_package
    }
    assert {f"wsbcn_flax.{name}" for name in found} == set(MAY_IMPORT)


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_imports_go_one_way(package):
    own = package.rpartition(".")[2]
    assert files(package)
    for path in files(package):
        for name in imported(path):
            if name.startswith("wsbcn_flax."):
                assert name.split(".")[1] in MAY_IMPORT[package] | {own, *SHARED}, (path, name)


def test_the_library_does_not_import_experiments_or_tests():
    for path in files("wsbcn_flax"):
        for name in imported(path):
            assert name.split(".")[0] not in {"experiments", "tests", "conftest"}, (path, name)


def test_import_order_has_no_cycle():
    below = {package: {f"wsbcn_flax.{n}" for n in names} for package, names in MAY_IMPORT.items()}
    while below:
        leaves = {package for package, names in below.items() if not names & set(below)}
        assert leaves
        below = {package: names for package, names in below.items() if package not in leaves}


@pytest.mark.parametrize("package", PACKAGES)
def test_all_is_what_the_package_imports(package):
    """``__all__`` is complete, resolves, and is sorted as by ruff; its classes are documented."""
    module = importlib.import_module(package)
    tree = ast.parse(pathlib.Path(module.__file__).read_text())
    names = {
        alias.asname or alias.name
        for node in tree.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert set(module.__all__) == {name for name in names if not name.startswith("_")}
    assert module.__all__ == sorted(module.__all__, key=ruff_order)
    assert module.__doc__
    for name in module.__all__:
        exported = getattr(module, name)
        if not name.isupper() and isinstance(exported, type):
            assert exported.__doc__, name


@pytest.fixture(scope="module")
def modules_after():
    """Modules of a fresh interpreter after each statement, one after another."""
    statements = {
        "flax": "import flax.linen",
        "library": "import wsbcn_flax",
        "packages": "import wsbcn_flax.models, wsbcn_flax.data",
        "training": "import wsbcn_flax.training.checkpoints, wsbcn_flax.training.writers",
    }
    report = "; print(json.dumps(list(sys.modules)))"
    code = "\n".join(["import sys, json", *(s + report for s in statements.values())])
    command = [sys.executable, "-c", code]
    out = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    return dict(zip(statements, map(set, map(json.loads, out.stdout.splitlines())), strict=True))


def test_networks_and_loops_are_imported_by_name(modules_after):
    assert not modules_after["library"] & {f"wsbcn_flax.{name}" for name in BY_NAME}


def test_importing_is_cheap(modules_after):
    """The library imports no heavy package that flax.linen does not import."""
    heavy = {
        "tensorflow",
        "tensorflow_datasets",
        "grain",
        "orbax",
        "matplotlib",
        "torch",
        "rich",
        "tyro",
        "sklearn",
        "mlxtend",
        "PIL",
    }

    def loaded(statement):
        return {name.split(".")[0] for name in modules_after[statement]}

    assert loaded("packages") & heavy <= loaded("flax")
    # Checkpoints and writers import what they need when they are used.
    assert not {"orbax", "orbax.checkpoint", "tensorboardX"} & modules_after["training"]


def test_a_missing_package_is_an_error_that_names_its_extra():
    cases = [
        ("orbax", "train", "training.Checkpointer('folder')"),
        ("grain", "train", "data.train_batches([0], batch_size=1, seed=0)"),
        ("tensorflow_datasets", "train", "data.load_split('digits', 'train', data_dir='absent')"),
        ("cv2", "jpeg", "data.DecodeImage().map({'image': b'...'})"),
        ("pycocotools", "coco", "data.CocoEvaluator('instances.json')"),
        ("tensorboardX", "tensorboard", "training.writers.TensorBoardWriter('folder')"),
    ]
    code = (
        "import sys\n"
        "from wsbcn_flax import data, training\n"
        "from wsbcn_flax.training import writers\n"
        f"for module, _, statement in {cases}:\n"
        "    sys.modules[module] = None\n"
        "    try: exec(statement)\n"
        "    except ImportError as error: print(error)\n"
        "    del sys.modules[module]"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    lines = out.stdout.splitlines()
    assert len(lines) == len(cases), out.stdout + out.stderr
    for (_, extra, _), line in zip(cases, lines, strict=True):
        assert line.endswith(f"run: pip install 'wsbcn_flax[{extra}]'")
