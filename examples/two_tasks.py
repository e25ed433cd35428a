"""Two labels of a row learnt at once on one compressed collection, by MMoE and a weighted loss.

    python examples/two_tasks.py --method unified --budget 10% --weights 1,5

The log is generated: users and items, whether a user clicked, known of every row, and whether he bought, known of
one row in twenty. Both follow from how eager a user and how appealing an item is, a purchase from the price as well.
So the few purchases alone say little about users and items, which the clicks know. The script trains three models with tables of the
same bytes, one for each label and one for both, and prints the AUC of each label over rows that none of them saw.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torchrec import EmbeddingBagConfig, KeyedJaggedTensor

from embcomp import BACKENDS, CompressedEmbeddingBagCollection
from embcomp.errors import EmbcompError
from embcomp.models import MMoE, MultiTaskLoss
from embcomp.training.reporting.metrics import auc

FEATURES = {"user": 2000, "item": 1000}
TASKS = ("click", "purchase")
DIM, KNOWN = 16, 0.05


@dataclass(frozen=True)
class Log:
    """Rows with two labels.

    Attributes:
        ids: (R, 2) int64 user and item.
        dense: (R, 1) float32 the price.
        labels: (R, 2) float32 clicks and purchases; NaN where a purchase is not known.
    """

    ids: Tensor
    dense: Tensor
    labels: Tensor

    @classmethod
    def generated(cls, rows: int, seed: int) -> Log:
        """A log whose appeals, and thus whose best scores, follow from the seed; low ids are frequent."""
        generator = torch.Generator().manual_seed(seed)
        appeals = [torch.randn(n, generator=generator) for n in FEATURES.values()]
        drawn = torch.rand(rows, len(FEATURES), generator=generator).square()
        ids = (drawn * torch.tensor(list(FEATURES.values()))).long()
        price = torch.randn(rows, 1, generator=generator)
        appeal = appeals[0][ids[:, 0]] + appeals[1][ids[:, 1]]
        scores = torch.stack([appeal - 0.5, appeal - price[:, 0] - 1], dim=1)
        labels = (torch.rand(rows, 2, generator=generator) < scores.sigmoid()).float()
        labels[torch.rand(rows, generator=generator) >= KNOWN, 1] = torch.nan
        return cls(ids, price, labels)

    def part(self, rows: slice | Tensor) -> Log:
        """Some of the rows."""
        return Log(self.ids[rows], self.dense[rows], self.labels[rows])

    def features(self) -> KeyedJaggedTensor:
        """The ids as TorchRec takes them."""
        return KeyedJaggedTensor(
            keys=list(FEATURES),
            values=self.ids.t().reshape(-1),
            lengths=torch.ones(self.ids.numel(), dtype=torch.int32),
        )

    def batches(self, size: int, generator: torch.Generator) -> Iterator[Log]:
        """All rows once, in another order each time."""
        for part in torch.randperm(len(self.ids), generator=generator).split(size):
            yield self.part(part)


def tables(method: str, budget: str | None) -> CompressedEmbeddingBagCollection:
    """The one collection on which all tasks are learnt."""
    configs = [
        EmbeddingBagConfig(name=name, num_embeddings=rows, embedding_dim=DIM, feature_names=[name])
        for name, rows in FEATURES.items()
    ]
    return CompressedEmbeddingBagCollection(configs, BACKENDS[method](budget=budget))


def trained(
    collection: CompressedEmbeddingBagCollection,
    log: Log,
    weights: Sequence[float],
    *,
    epochs: int = 4,
    seed: int = 0,
) -> MMoE:
    """A model of both tasks on a collection; a task of weight 0 is not learnt."""
    torch.manual_seed(seed)
    model = MMoE(
        collection,
        feature_names=list(FEATURES),
        embedding_dim=DIM,
        num_dense=1,
        num_tasks=len(TASKS),
        num_experts=4,
        expert_units=(64, 32),
        tower_units=(16,),
    )
    loss = MultiTaskLoss(weights)
    rows = list(collection.parameters())
    held = {id(parameter) for parameter in rows}
    network = [p for p in model.parameters() if id(p) not in held]
    optimizers = [torch.optim.Adagrad(rows, lr=0.05), torch.optim.Adam(network, lr=0.003)]
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for batch in log.batches(256, generator):
            total = loss(model(batch.dense, batch.features()), batch.labels)
            if (penalty := collection.penalty()) is not None:  # what the method adds by itself
                total = total + penalty
            model.zero_grad()
            total.backward()
            for optimizer in optimizers:
                optimizer.step()
    return model.eval()


@torch.no_grad()
def aucs(model: MMoE, log: Log) -> dict[str, float]:
    """The AUC of each task over the rows that know its label."""
    logits, found = model(log.dense, log.features()), {}
    for task, name in enumerate(TASKS):
        known = ~log.labels[:, task].isnan()
        found[name] = auc(logits[known, task].numpy(), log.labels[known, task].numpy())
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Train the three models of the command line; prints a line for each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--method", default="unified", choices=sorted(BACKENDS))
    parser.add_argument(
        "--budget", default="10%", help="bytes of the tables; '' for methods without"
    )
    parser.add_argument(
        "--weights", default="1,5", help="of clicks and purchases, for both at once"
    )
    parser.add_argument("--rows", type=int, default=60_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    try:
        weights = [float(each) for each in options.weights.split(",")]
        log = Log.generated(options.rows + 20_000, options.seed)
        train, test = log.part(slice(options.rows)), log.part(slice(options.rows, None))
        for name, own in {
            "clicks alone": (1, 0),
            "purchases alone": (0, 1),
            "both": weights,
        }.items():
            torch.manual_seed(options.seed)
            collection = tables(options.method, options.budget or None)
            scores = aucs(trained(collection, train, own, seed=options.seed), test)
            learnt = ", ".join(f"{task} {scores[task]:.4f}" for task, w in zip(TASKS, own) if w)
            print(f"{name}: {collection.footprint.serve_bytes:,} bytes, AUC of {learnt}")
    except (EmbcompError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
