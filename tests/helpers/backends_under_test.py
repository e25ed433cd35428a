"""The configurations that every check runs over: at least one line for each method."""

from __future__ import annotations

from embcomp.backends import (
    ALPT,
    CCE,
    DHE,
    DNIS,
    LR2VQ,
    MDE,
    MGQE,
    MLET,
    PEP,
    PQ,
    QR,
    TT,
    Adapt,
    AutoDim,
    Blocks,
    Cafe,
    Coded,
    Dedup,
    DeepLight,
    DNISSearch,
    DoubleHash,
    Full,
    Hash,
    Int8,
    Int16,
    LowDim,
    LowRank,
    Mapped,
    Matryoshka,
    OptEmbed,
    Robe,
    Sparse,
    TypedBlocks,
    Unified,
)
from embcomp.testing import BackendCase

FULL = 0.1 / 3**0.5  # standard deviation of the full table's rows
UNIFORM_05 = 0.05 / 3**0.5  # standard deviation of Unified's rows

CASES = {
    "full": BackendCase(config=Full(), injective=True),
    "hash": BackendCase(config=Hash(num_buckets=40, collisionless=0), takes_any_id=True),
    "double_hash": BackendCase(
        config=DoubleHash(num_buckets=40, private_share=0.3, collisionless=0),
        takes_any_id=True,
        init_std=FULL,
    ),
    "cafe": BackendCase(
        config=Cafe(num_buckets=50, hot_share=0.4, threshold=1.0, margin=1.0, collisionless=0),
        takes_any_id=True,
    ),
    "adapt": BackendCase(
        config=Adapt(num_buckets=40, private_share=0.4, every=1, margin=1.0, collisionless=0),
        takes_any_id=True,
    ),
    "adapt_zero": BackendCase(config=Adapt(num_buckets=40, rare="zero", every=2, collisionless=0)),
    "autodim": BackendCase(
        config=AutoDim(width_grid=4), injective=True, init_std=FULL * (7.5 / 16) ** 0.5
    ),
    "cce": BackendCase(config=CCE(num_buckets=9, subvector_dim=5, collisionless=0)),
    "dhe": BackendCase(config=DHE(hidden_dim=12, num_hashes=10), takes_any_id=True),
    "low_dim": BackendCase(config=LowDim(width=5), injective=True, init_std=FULL * (5 / 16) ** 0.5),
    "low_dim_mixed": BackendCase(
        config=LowDim(width=3, widths={"t0": 5, "t1": 4}),
        injective=True,
        init_std=FULL * (4.5 / 16) ** 0.5,
    ),
    "low_dim_kept": BackendCase(
        config=LowDim(width=9, widths={"t0": 7}, kept={"t0": 33, "t1": 50}),
        init_std=FULL * (8 / 16) ** 0.5,
    ),
    "mapped": BackendCase(
        config=Mapped(rows={"t0": (20, 7), "t1": (30, 5, 9)}, skips={"t1": True}),
    ),
    "mapped_parts": BackendCase(
        config=Mapped(rows={"t0": (12, 12, 12), "t1": (300, 20)}, combine="concat", shared=True),
    ),
    "mde": BackendCase(config=MDE(alpha=0.5, reference=20), injective=True),
    "mgqe": BackendCase(config=MGQE(subvector_dim=2, num_codewords=16, frequent_share=0.3)),
    "mlet": BackendCase(
        config=MLET(width=3, factor=2), injective=True, init_std=FULL * (3 / 16) ** 0.5
    ),
    "int8": BackendCase(config=Int8(), injective=True),
    "int16": BackendCase(config=Int16(step=1e-5), injective=True),
    "alpt": BackendCase(config=ALPT(bits=8), injective=True),
    "tensor_train": BackendCase(config=TT(rank=5), injective=True),
    "robe": BackendCase(
        config=Robe(num_weights=700, block_size=6, step=3, signs=True, init_range=0.1),
        takes_any_id=True,
    ),
    "optembed": BackendCase(config=OptEmbed(), injective=True),
    "optembed_rows": BackendCase(config=OptEmbed(prune="rows", norm=2), injective=True),
    "matryoshka": BackendCase(config=Matryoshka(weights={16: 3.0}), injective=True),
    "qr_mult": BackendCase(config=QR(divisor=9), injective=True),
    "qr_add": BackendCase(config=QR(divisor=9, combine="add"), injective=True),
    "qr_concat": BackendCase(config=QR(divisor=9, combine="concat"), injective=True),
    "unified": BackendCase(config=Unified(num_buckets=120), takes_any_id=True, init_std=UNIFORM_05),
    "unified_3_tables": BackendCase(
        config=Unified(num_buckets=50, num_chunks=3, num_tables=3, init_range=0.1),
        takes_any_id=True,
    ),
    "unified_beside_full": BackendCase(
        config=Unified(num_buckets=120, collisionless=65, init_range=0.1), takes_any_id=True
    ),
    "unified_projected": BackendCase(
        config=Unified(num_buckets=120, num_chunks=2, chunks={"t0": 5, "t1": 3}),
        takes_any_id=True,
        init_std=UNIFORM_05,
    ),
    "blocks": BackendCase(
        config=Blocks(
            widths={"t0": (16, 8), "t1": (16, 0, 4, 12), "t2": (0, 13)},
            cuts={"t0": (40,), "t1": (5, 10, 20), "t2": (3,)},
        ),
        init_std=0.08 / 3**0.5,
    ),
    "typed_blocks": BackendCase(  # what is narrower is rounded when it is saved
        config=TypedBlocks(
            types={"t0": ("fp32",) * 2, "t1": ("fp32",) * 3, "t2": ("fp32",) * 2},
            cuts={"t0": (20,), "t1": (5, 40), "t2": (7,)},
        ),
        injective=True,
    ),
    "dedup": BackendCase(config=Dedup(), injective=True),
    "coded": BackendCase(config=Coded(subvector_dim=2, num_codewords=16)),
    "coded_table": BackendCase(
        config=Coded(subvector_dim=4, num_codewords=8, codebooks="table", latent_dim=2)
    ),
    "coded_all": BackendCase(
        config=Coded(subvector_dim=3, num_codewords=10, codebooks="all", latent_dim=2, scale=False)
    ),
    "coded_groups": BackendCase(
        config=Coded(subvector_dim=5, num_codewords=6, sharing_groups=(("t0",),))
    ),
    "low_rank": BackendCase(config=LowRank(latent_dim=3), injective=True),
    "low_rank_parts": BackendCase(
        config=LowRank(
            latent_dim=2,
            subvector_dim=3,
            projections="all",
            sharing_groups=(("t1",),),
            from_dense=False,
        ),
        injective=True,
    ),
    "low_rank_bias": BackendCase(
        config=LowRank(latent_dim=2, subvector_dim=4, projections="position", bias=True),
        injective=True,
    ),
    "lr2vq": BackendCase(
        config=LR2VQ(subvector_dim=4, num_codewords=32, codebooks="all", revive_every=2)
    ),
    "lr2vq_folded": BackendCase(
        config=LR2VQ(
            subvector_dim=2,
            num_codewords=8,
            codebooks="position",
            sharing_groups=(("t0",), ("t1",)),
            latent_dim=2,
            from_dense=False,
            factored=False,
            revive_every=2,
        )
    ),
    "lr2vq_line": BackendCase(  # few codewords: rounding must not move a latent to a neighbour
        config=LR2VQ(subvector_dim=2, num_codewords=4, latent_dim=1, codebooks="table")
    ),
    "lr2vq_table": BackendCase(config=LR2VQ(subvector_dim=3, num_codewords=16, codebooks="table")),
    "deeplight": BackendCase(config=DeepLight(serve_bytes=10**9, every=2), injective=True),
    "pep": BackendCase(config=PEP(serve_bytes=10**9), injective=True),
    "pep_table": BackendCase(
        config=PEP(serve_bytes=10**9, granularity="table", threshold_init=-5.0, inherit=True),
        injective=True,
    ),
    "pq": BackendCase(config=PQ(subvector_dim=2, num_codewords=16)),
    "dnis": BackendCase(config=DNIS(serve_bytes=10**9), injective=True),
    "dnis_search": BackendCase(
        config=DNISSearch(cuts={"t0": (10, 30), "t1": ()}, l1=0.01), injective=True
    ),
    "dnis_search_prefix": BackendCase(
        config=DNISSearch(cuts={"t1": (7,)}, selection="prefix", l1=0.0), injective=True
    ),
    "sparse": BackendCase(
        config=Sparse(nonzeros={"t0": 500, "t1": 700, "t2": 600}), init_std=0.029 / 3**0.5
    ),
}

EACH_METHOD = tuple({case.config.name: name for name, case in reversed(CASES.items())}.values())
"""The first case of every method: for what takes long, and hangs on the method more than on its settings."""

STORED_INTEGERS = ("alpt", "int16", "int8")
"""Cases whose rows no gradient reaches: their methods update them beside a fused optimizer."""
