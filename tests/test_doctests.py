"""Every example in every docstring runs and prints what it says."""

import ast
import doctest
import importlib
import pathlib
import pkgutil

import jax
import pytest

import wsbcn_flax

MODULES = [
    "wsbcn_flax",
    *(module.name for module in pkgutil.walk_packages(wsbcn_flax.__path__, "wsbcn_flax.")),
]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    # Examples are what people run: with JAX's own default.
    with jax.numpy_rank_promotion("allow"):
        results = doctest.testmod(importlib.import_module(name))
    assert results.failed == 0


def test_there_are_examples():
    finder = doctest.DocTestFinder(exclude_empty=True)
    examples = [
        test
        for name in MODULES
        for test in finder.find(importlib.import_module(name))
        if test.examples
    ]
    assert len(examples) >= 15


def test_no_docstring_starts_with_what():
    """A docstring starts with a verb or with a noun phrase."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    root = pathlib.Path(__file__).parents[1]
    docstrings = [
        (path, ast.get_docstring(node) or "")
        for folder in ("wsbcn_flax", "experiments", "tests", "docs")
        for path in (root / folder).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, documented)
    ]
    assert len(docstrings) > 1000
    assert not [(path, text) for path, text in docstrings if text.startswith("What")]
