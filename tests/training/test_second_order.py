"""Search gradients that look through the rows' step: they are those of the step written out."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch.func import functional_call
from torchrec.optim import RowWiseAdagrad

from embcomp import DNIS
from embcomp.backends.stages import Stage
from embcomp.config.train_config import TrainConfig, parse_config
from embcomp.data_pipelines.schema import DatasetInfo
from embcomp.errors import ConfigError
from embcomp.training import load_model, loop, train
from embcomp.training.build import TrainTask, build_model, shard_model
from embcomp.training.checkpoint import model_state
from embcomp.training.data import search_batches, training_batches
from embcomp.training.distributed.process import process_group
from embcomp.training.distributed.quiet import quiet_libraries
from embcomp.training.optim.optimizers import Learners, Optimizers, StructureLearner
from embcomp.training.optim.precision import Precision
from embcomp.training.second_order import UnrolledSteps, through_step
from embcomp.training.steps import Updates
from tests.helpers.joined_batches import batches_of_ranks
from tests.helpers.training_cases import train_on_ranks, whole, write_dataset

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:Please use DTensor")]
OPTIMIZERS = ("sgd", "adagrad", "rowwise_adagrad", "adam")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("dataset"))


def configured(dataset: Path, *overrides: str, **method) -> TrainConfig:
    method = {"name": "dnis", "second_order": True, "quantiles": [0.5, 0.9], **method}
    return parse_config(
        {
            "name": "second",
            "seed": 3,
            "data": {
                "path": str(dataset),
                "batch_size": 32,
                "eval_batch_size": 64,
                "search_share": 0.3,
                "drop_last": True,
            },
            "tables": {"embedding_dim": 4, "method": method, "budget": "40%"},
            "model": {"name": "deepfm", "hidden_units": [4], "batch_norm": False, "dropout": 0.2},
            "train": {
                "epochs": 1,
                "row_optimizer": {"name": "adagrad", "mode": "dense", "learning_rate": 0.1},
                "checkpoint_every": 2,
            },
        },
        overrides,
    )


# --- the gradient


def torch_optimizer(name: str, *weights: torch.Tensor, rate: float) -> torch.optim.Optimizer:
    kinds = {
        "sgd": torch.optim.SGD,
        "adagrad": torch.optim.Adagrad,
        "rowwise_adagrad": RowWiseAdagrad,
        "adam": torch.optim.Adam,
    }
    return kinds[name](weights, lr=rate)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_vector_goes_back_through_the_step_that_an_optimizer_makes(dataset, name):
    draw = torch.Generator().manual_seed(0)
    weight, vector, *gradients = (
        torch.randn(5, 4, generator=draw, dtype=torch.float64) for _ in range(5)
    )
    weight = torch.nn.Parameter(weight)
    optimizer = torch_optimizer(name, weight, rate=0.1)

    def step(gradient: torch.Tensor) -> torch.Tensor:
        before = weight.detach().clone()
        weight.grad = gradient.clone()
        optimizer.step()
        return before - weight.detach()

    for gradient in gradients[:-1]:
        step(gradient)
    last, begun = gradients[-1], (weight.detach().clone(), copy.deepcopy(optimizer.state_dict()))

    def again(gradient: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            weight.copy_(begun[0])
        optimizer.load_state_dict(copy.deepcopy(begun[1]))
        return step(gradient)

    # The derivative is symmetric, so along the vector it is also its product with the vector.
    h = 1e-6
    wanted = (again(last + h * vector) - again(last - h * vector)) / (2 * h)
    again(last)
    options = configured(dataset, f"train.row_optimizer.name={name}").train.row_optimizer
    state = {"lr": 0.1, **optimizer.state[weight]}
    torch.testing.assert_close(
        through_step(options, state, last, vector), wanted, rtol=1e-5, atol=1e-8
    )
    assert not through_step(options, state, torch.zeros_like(last), vector).any()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_selections_get_the_gradient_of_the_step_written_out(dataset, name):
    rate = 8.0 if name == "sgd" else 0.5
    config = configured(
        dataset,
        "tables.method={name: dnis_search, l1: 0.001}",
        "tables.budget=null",
        "tables.first_order=full",
        f"train.row_optimizer={{name: {name}, mode: dense, learning_rate: {rate}}}",
        "model=fm",  # without ReLU, at whose corners differences are no derivatives
    )
    info = DatasetInfo.load(config.data.path)
    with quiet_libraries(), process_group("cpu") as process:
        unsharded = build_model(config, info, torch.device("meta"))
        sharded = shard_model(unsharded, config, process).train()
        stage = Stage(name="search", network=False, alternate=True, second_order=True)
        structure = StructureLearner(
            prefix="model.tables.combine.",
            make=lambda parameters: torch.optim.SGD(parameters, lr=1.0),
        )
        learners = Learners(stage=stage, structures=[structure])
        optimizers = Optimizers(sharded, config.train, learners)
        updates = Updates(optimizers, None)
        options = config.train.row_optimizer
        steps = UnrolledSteps(
            sharded, updates, process, Precision(False, process.device), optimizers, options
        )
        with torch.no_grad():
            for weight in optimizers.rows:
                weight.mul_(10)  # away from where the loss is flat
            for alpha in optimizers.structure:
                alpha.uniform_(0.2, 1, generator=torch.Generator().manual_seed(1))
        rows = [name for name, _ in sharded.named_parameters() if ".embedding_bags." in name]
        warm = iter(training_batches(config, info, process))
        for _ in range(4):  # the first steps of Adagrad and Adam follow signs alone
            steps.run(warm)
        batches = [next(warm), next(iter(search_batches(config, info, process)))]
        begun, states = weights_of(sharded), copy.deepcopy(optimizers.row_states())
        for updates.phase, batch in zip(("train", "search"), batches):
            steps.run(iter([batch]))
        ended = weights_of(sharded)
        task = Precise(build_model(config, info, torch.device("cpu")).model).double().train()
    own = [name for name in begun if ".alpha" in name]

    def loss_after_step(values: list[torch.Tensor]) -> torch.Tensor:
        state = {**begun, **dict(zip(own, values))}
        weights = [torch.nn.Parameter(begun[name].clone()) for name in rows]
        optimizer = torch_optimizer(name, *weights, rate=rate)
        for weight, kept in zip(weights, states):
            own_state = {key: as_double(value) for key, value in kept.items() if key != "lr"}
            optimizer.state[weight] = own_state
        functional_call(task, state | dict(zip(rows, weights)), (batches[0],)).backward()
        optimizer.step()
        after = dict(zip(rows, (weight.detach() for weight in weights)))
        with torch.no_grad():
            return functional_call(task, state | after, (batches[1],))

    def loss_of_weights(values: list[torch.Tensor]) -> torch.Tensor:
        with torch.no_grad():
            return functional_call(task, ended | dict(zip(own, values)), (batches[1],))

    found, wanted, direct = [], [], []
    for place, key in enumerate(own):
        moved = begun[key] - ended[key]
        for at in range(0, moved.numel(), 3):
            h, sides = 1e-3, ([], [])
            values = [begun[each].clone() for each in own]
            for side in (h, -2 * h):
                values[place].view(-1)[at] += side
                sides[0].append(float(loss_after_step(values)))
                sides[1].append(float(loss_of_weights(values)))
            for gradients, (above, below) in zip((wanted, direct), sides):
                gradients.append((above - below) / (2 * h))
            found.append(float(moved.view(-1)[at]))
    found, wanted, direct = (torch.tensor(each) for each in (found, wanted, direct))
    through = wanted - direct
    assert through.norm() > 0.05 * wanted.norm()  # else nothing is tested
    assert (found - wanted).norm() < 0.01 * through.norm()


def weights_of(sharded: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Weights by the names of parameters, whole where a state dict has them table by table."""
    parts: dict[str, list[torch.Tensor]] = {}
    for name, value in model_state(sharded).items():
        parts.setdefault(name.partition("@")[0], []).append(whole(value).double())
    return {
        f"model.{name}": torch.cat(each) if len(each) > 1 else each[0].clone()
        for name, each in parts.items()
    }


def as_double(value):
    return value.double().clone() if torch.is_tensor(value) else value


class Precise(TrainTask):
    """The loss in float64, so that differences of it are gradients."""

    def forward(self, batch):
        logits = self.model(batch.dense.double(), batch.sparse)
        loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, batch.labels.double())
        return self.loss.add_penalty(loss)


# --- runs


def weights(runs: Path) -> dict[str, torch.Tensor]:
    return load_model(runs / "second").state_dict()


@pytest.mark.long
def test_second_order_selects_otherwise_and_resumes_as_if_nothing_had_happened(
    dataset, tmp_path, monkeypatch
):
    train(configured(dataset, second_order=False), runs=tmp_path / "first", quiet=True)
    config = configured(dataset)
    report = train(config, runs=tmp_path / "whole", quiet=True)
    assert report.stages[1]["steps"] >= 4
    step = loop.Training._train_step

    def fails_after_three(training, batches):
        step(training, batches)
        if training.stage.name == "search" and training.state.step == 3:
            raise RuntimeError("interrupted")

    with monkeypatch.context() as patched:
        patched.setattr(loop.Training, "_train_step", fails_after_three)
        with pytest.raises(RuntimeError, match="interrupted"):
            train(config, runs=tmp_path / "again", quiet=True)
    train(config, runs=tmp_path / "again", quiet=True)
    metrics = [
        (tmp_path / runs / "second" / "metrics.jsonl").read_bytes()
        for runs in ("first", "whole", "again")
    ]
    assert metrics[0] != metrics[1] == metrics[2]
    there = weights(tmp_path / "again")
    for name, tensor in weights(tmp_path / "whole").items():
        assert torch.equal(tensor, there[name]), name


def test_two_ranks_look_through_a_step_as_one_process_does(workers, dataset, tmp_path):
    config = configured(dataset, "model.dropout=0", structure="element", learning_rate=0.1)
    with batches_of_ranks(2):
        train(config, runs=tmp_path / "one", quiet=True)
    workers.run(2, train_on_ranks, config, tmp_path / "many")
    many = weights(tmp_path / "many")
    for name, tensor in weights(tmp_path / "one").items():
        torch.testing.assert_close(many[name], tensor, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.row_optimizer.mode=fused", "set train.row_optimizer.mode: dense"),
        ("train.clip_norm=1.0", "does not look through clipped steps"),
    ],
)
def test_steps_that_cannot_be_looked_through_are_refused_at_once(
    dataset, tmp_path, override, message
):
    with pytest.raises(ConfigError, match=message):
        train(configured(dataset, override), runs=tmp_path, quiet=True)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ConfigError, match="needs freezes_network: true"):
        DNIS(second_order=True, freezes_network=False)
