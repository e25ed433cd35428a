"""AUC of a model in plain TorchRec before and after `compress_`, and after its codewords trained on.

python benchmarks/compress_quality.py DATASET --budgets 10%,5%

DATASET is a prepared one (`embcomp generate`, `embcomp prepare`). The model is TorchRec's DeepFM, trained
for an epoch by plain torch; nothing of embcomp's training takes part.
"""

from __future__ import annotations

import argparse
import copy
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

METHODS: tuple[type[BackendConfig], ...] = (PQ, LR2VQ, LowRank, LowDim)


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
def test_auc(model: nn.Module, info: DatasetInfo) -> float:
    model.eval()
    scores, labels = [], []
    for batch in ParquetLoader(info, "test", batch_size=4096, drop_last=False):
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dataset", type=Path)
    parser.add_argument("--budgets", default="10%")
    parser.add_argument("--dim", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    info = DatasetInfo.load(args.dataset)
    counts = count(info)
    trained = build(info, args.dim)
    train(trained, info, rows=0.05, dense=1e-3, seed=args.seed)
    print(f"full: test AUC {test_auc(trained, info):.4f}", flush=True)
    for budget in args.budgets.split(","):
        for method in METHODS:
            model = copy.deepcopy(trained)
            report = compress_(model, method(budget=budget), counts=counts)
            line = f"{method.name} {budget}: {report.bytes:,} of {report.full_bytes:,} bytes, "
            line += f"test AUC {test_auc(model, info):.4f}"
            train(model, info, rows=0.01, dense=1e-4, seed=args.seed + 1)
            print(f"{line}, {test_auc(model, info):.4f} after an epoch more", flush=True)


if __name__ == "__main__":
    main()
