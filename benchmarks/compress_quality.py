"""AUC of a model in plain TorchRec before and after `compress_`, and after an epoch of its codewords.

python benchmarks/compress_quality.py DATASET --budgets 10% --seeds 3 [--json FILE]

DATASET is a prepared one (`embcomp prepare`). The model is TorchRec's DeepFM, trained by plain torch until its
validation AUC falls; nothing of embcomp's training takes part. Prints, for each budget and method, mean and
standard deviation over the seeds of the test AUC and of what is lost of the full model of the same seed: as
compressed, and after an epoch in which codewords, or whatever rows there are, and the network train on. What the
same epoch makes of the full model stands beside it: a model that was trained to its best may only lose by more.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torchrec.models.deepfm import SimpleDeepFMNN
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection

from embcomp import LR2VQ, PQ, LowDim, LowRank, compress_
from embcomp.backends.base import BackendConfig
from embcomp.data_pipelines.loader.batch import Batch
from embcomp.data_pipelines.loader.parquet_loader import ParquetLoader
from embcomp.data_pipelines.schema import DatasetInfo
from embcomp.training.reporting.metrics import auc

METHODS: dict[str, type[BackendConfig]] = {
    method.name: method for method in (PQ, LR2VQ, LowRank, LowDim)
}


@dataclass(frozen=True, kw_only=True)
class Figures:
    """What one method makes of one trained model; AUCs are of the test rows."""

    method: str
    budget: str
    seed: int
    bytes: int
    full_bytes: int
    full: float
    full_after_epoch: float
    at_once: float
    after_epoch: float


def build(info: DatasetInfo, dim: int) -> nn.Module:
    tables = [
        EmbeddingBagConfig(
            name=feature.name,
            num_embeddings=feature.num_embeddings,
            embedding_dim=dim,
            feature_names=[feature.name],
            weight_init_min=-0.05,
            weight_init_max=0.05,
        )
        for feature in info.categorical
    ]
    return SimpleDeepFMNN(
        num_dense_features=len(info.numeric),
        embedding_bag_collection=EmbeddingBagCollection(tables=tables),
        hidden_layer_size=64,
        deep_fm_dimension=16,
    )


def logits(model: nn.Module, batch: Batch) -> Tensor:
    """TorchRec's model ends in a sigmoid."""
    scores: Tensor = model(batch.dense, batch.sparse).squeeze(1)
    return scores.clamp(1e-6, 1 - 1e-6).logit()


def train(model: nn.Module, info: DatasetInfo, *, rows: float, dense: float, seed: int) -> None:
    """One epoch: Adagrad on the rows, Adam on the rest."""
    inside = {id(p) for n, p in model.named_parameters() if "embedding_bags" in n}
    own = [p for p in model.parameters() if id(p) in inside]
    rest = [p for p in model.parameters() if id(p) not in inside]
    optimizers = [torch.optim.Adagrad(own, lr=rows), torch.optim.Adam(rest, lr=dense)]
    for batch in ParquetLoader(info, "train", batch_size=1024, shuffle=True, seed=seed):
        loss = nn.functional.binary_cross_entropy_with_logits(logits(model, batch), batch.labels)
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()


@torch.no_grad()
def auc_on(model: nn.Module, info: DatasetInfo, split: str) -> float:
    model.eval()
    scores, labels = [], []
    for batch in ParquetLoader(info, split, batch_size=4096, drop_last=False):
        scores.append(logits(model, batch))
        labels.append(batch.labels)
    model.train()
    return auc(torch.cat(scores).double().numpy(), torch.cat(labels).numpy())


def count(info: DatasetInfo) -> dict[str, Tensor]:
    found = {f.name: torch.zeros(f.num_embeddings) for f in info.categorical}
    for batch in ParquetLoader(info, "train", batch_size=4096, drop_last=False):
        for name, own in batch.sparse.to_dict().items():
            found[name] += torch.bincount(own.values(), minlength=len(found[name]))
    return found


def train_until_best(
    model: nn.Module, info: DatasetInfo, args: argparse.Namespace, seed: int
) -> None:
    """Epochs until the validation AUC falls; the weights are those of its best."""
    best, kept = 0.0, copy.deepcopy(model.state_dict())
    for epoch in range(args.epochs):
        train(model, info, rows=0.05, dense=1e-3, seed=seed + 1000 * epoch)
        found = auc_on(model, info, "valid")
        print(f"seed {seed}, epoch {epoch + 1}: validation AUC {found:.4f}", flush=True)
        if found < best:
            break
        best, kept = found, copy.deepcopy(model.state_dict())
    model.load_state_dict(kept)


def measure_seed(info: DatasetInfo, args: argparse.Namespace, seed: int) -> list[Figures]:
    torch.manual_seed(seed)
    counts = count(info)
    trained = build(info, args.dim)
    train_until_best(trained, info, args, seed)
    full = auc_on(trained, info, "test")
    further = copy.deepcopy(trained)
    train(further, info, rows=args.rate, dense=args.dense_rate, seed=seed + 1)
    full_after_epoch = auc_on(further, info, "test")
    found = []
    for budget in args.budgets.split(","):
        for name in args.methods.split(","):
            model = copy.deepcopy(trained)
            report = compress_(model, METHODS[name](budget=budget), counts=counts)
            at_once = auc_on(model, info, "test")
            train(model, info, rows=args.rate, dense=args.dense_rate, seed=seed + 1)
            own = Figures(
                method=name,
                budget=budget,
                seed=seed,
                bytes=report.bytes,
                full_bytes=report.full_bytes,
                full=full,
                full_after_epoch=full_after_epoch,
                at_once=at_once,
                after_epoch=auc_on(model, info, "test"),
            )
            print(own, flush=True)
            found.append(own)
    return found


def report(figures: Sequence[Figures]) -> None:
    heads = "budget | method | bytes | full | at once | lost | after an epoch | lost | full after it, too | lost"
    print(f"| {heads} |")
    print("|---" * 10 + "|")
    for budget, method in dict.fromkeys((each.budget, each.method) for each in figures):
        own = [each for each in figures if (each.budget, each.method) == (budget, method)]
        cells = [
            f"{sum(each.bytes for each in own) / sum(each.full_bytes for each in own):.1%}",
            spread([each.full for each in own]),
            spread([each.at_once for each in own]),
            spread([each.full - each.at_once for each in own]),
            spread([each.after_epoch for each in own]),
            spread([each.full - each.after_epoch for each in own]),
            spread([each.full_after_epoch for each in own]),
            spread([each.full - each.full_after_epoch for each in own]),
        ]
        print(f"| {budget} | `{method}` | {' | '.join(cells)} |")


def spread(values: Sequence[float]) -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.4f} ± {deviation:.4f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dataset", type=Path)
    parser.add_argument("--budgets", default="10%")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--dim", type=int, default=16)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=6, help="of the full model, at the most")
    parser.add_argument("--rate", type=float, default=0.01, help="of rows in the epoch more")
    parser.add_argument("--dense-rate", type=float, default=1e-4, help="of the network in it")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    info = DatasetInfo.load(args.dataset)
    figures = [each for seed in range(args.seeds) for each in measure_seed(info, args, seed)]
    report(figures)
    if args.json is not None:
        args.json.write_text(json.dumps([asdict(each) for each in figures], indent=1) + "\n")


if __name__ == "__main__":
    main()
