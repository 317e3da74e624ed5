"""A folder belongs to one recipe and one run at a time, from that run's first record on."""

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from wsbcn_flax._folder_lock import FolderInUseError, lock_folder
from wsbcn_flax.tasks import Mean, Task
from wsbcn_flax.training import BatchConfig, Experiment, LoopConfig
from wsbcn_flax.training.writers import read_jsonl, write_json


class Line(Task):
    """A task that fits one number to numbers."""

    def init(self, key, batch):
        return {"params": {"w": jnp.zeros(())}}

    def loss(self, params, batch_stats, batch, *, rng, extra):
        return jnp.mean((params["w"] - batch["x"]) ** 2), (batch_stats, {})

    def evaluate(self, params, batch_stats, batch):
        return {"loss": Mean.of((params["w"] - batch["x"]) ** 2)}


class Ones:
    element_spec = {"x": jax.ShapeDtypeStruct((), np.float32)}  # noqa: RUF012
    eval_size = 8

    def train_batches(self, *, batch_size, seed, start_step, host_index, host_count):
        while True:
            yield {"x": np.ones(batch_size, np.float32)}

    def eval_batches(self, *, batch_size, host_index, host_count):
        return [{"x": np.ones(batch_size, np.float32)}]

    def facts(self):
        return {}


class Broken(Ones):
    def train_batches(self, **options):
        raise RuntimeError("no data")


RECIPE: dict[str, Any] = {"optim": {"rate": 0.1, "milestones": (1, 2)}, "norm": {"kind": "bcn"}}
LOWER = {**RECIPE, "optim": {"rate": 0.05, "milestones": (1, 2)}}


def run(folder, *, recipe=RECIPE, data=None, steps=2, **loop):
    experiment = Experiment(
        task=Line(),
        data=data or Ones(),
        optimizer=optax.sgd(0.1),
        steps=steps,
        batch=BatchConfig(size=8),
    )
    config = LoopConfig(steps=steps, show_progress=False, **loop)
    return experiment.run(folder, config=config, recipe=recipe)


class Noisy(Line):
    def loss(self, params, batch_stats, batch, *, rng, extra):
        return 0 * params["w"], (batch_stats, {"noise": jax.random.uniform(rng)})


def test_a_seed_replaces_the_experiments_own_in_dropout_too(tmp_path):
    config = LoopConfig(steps=1, log_every=1, show_progress=False)
    noise = []
    for own, seed in ((0, 1), (1, None), (0, None)):
        experiment = Experiment(
            task=Noisy(),
            data=Ones(),
            optimizer=optax.sgd(0.1),
            steps=1,
            batch=BatchConfig(size=8, devices=1),
            seed=own,
        )
        folder = tmp_path / f"{own}-{seed}"
        experiment.run(folder, config=config, seed=seed)
        noise.append(read_jsonl(folder / "metrics.jsonl")[0]["noise"])
    assert noise[0] == noise[1] != noise[2]


def files(folder):
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_second_start_changes_nothing_and_names_the_first(tmp_path):
    run(tmp_path)
    with lock_folder(tmp_path):
        before = files(tmp_path)
        for recipe in (RECIPE, LOWER):
            with pytest.raises(FolderInUseError, match="in use by process"):
                run(tmp_path, recipe=recipe, steps=4)
        assert files(tmp_path) == before
    run(tmp_path, steps=4)
    assert [record["step"] for record in read_jsonl(tmp_path / "metrics.jsonl")] == [2, 4]


def test_a_run_that_failed_before_its_first_step_has_no_claim(tmp_path):
    with pytest.raises(RuntimeError, match="no data"):
        run(tmp_path, data=Broken())
    run(tmp_path, recipe=LOWER)
    assert json.loads((tmp_path / "recipe.json").read_text())["optim"]["rate"] == 0.05


@pytest.mark.parametrize("trace", ["metrics.jsonl", "checkpoints"])
def test_another_recipe_is_refused_with_the_values_that_differ(tmp_path, trace):
    """A record of metrics alone, or a checkpoint alone, makes the folder hold a run."""
    run(tmp_path)
    other = "checkpoints" if trace == "metrics.jsonl" else "metrics.jsonl"
    (tmp_path / other).rename(tmp_path.with_name(f"{tmp_path.name}_{other}"))
    before = files(tmp_path)
    more = {**LOWER, "norm": {"kind": "bn", "groups": 4}}
    with pytest.raises(ValueError, match="run of another recipe") as refused:
        run(tmp_path, recipe=more)
    changes = "optim.rate 0.1 -> 0.05, norm.kind 'bcn' -> 'bn', norm.groups None -> 4. "
    assert changes in str(refused.value)
    assert "milestones" not in str(refused.value)
    assert files(tmp_path).keys() == before.keys()
    assert files(tmp_path)["recipe.json"] == before["recipe.json"]
    run(tmp_path)


def test_a_damaged_recipe_of_a_run_is_named(tmp_path):
    run(tmp_path)
    (tmp_path / "recipe.json").write_text('{"optim"')
    with pytest.raises(ValueError, match=r"recipe.json must hold a JSON object; it is damaged"):
        run(tmp_path)
    write_json(tmp_path / "recipe.json", RECIPE)
    run(tmp_path)
