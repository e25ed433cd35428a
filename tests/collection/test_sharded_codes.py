"""Codes, bitmaps and pointers that ranks hold between them answer as whole ones do, to the bit."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict_loader import load as load_tensors
from torch.distributed.checkpoint.state_dict_saver import save as save_tensors
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist

from embcomp.backends import MGQE, Coded, LowDim, Sparse
from embcomp.collection.collection import CompressedEmbeddingBagCollection
from embcomp.collection.sharded_codes import shard_codes
from embcomp.errors import CheckpointError, ConfigError
from embcomp.layers.row_exchange import RowExchange
from embcomp.layers.shardable_buffers import shardable
from embcomp.planning.planner import PlacementRequest, beside_rows
from embcomp.testing.check_data import awkward_tables
from embcomp.testing.sharded import Setup, shard, train_step
from tests.helpers.long import long_but

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:Please use DTensor")]

KEPT = {"t0": 33, "t1": 50}
NONZEROS = {"t0": 500, "t1": 700, "t2": 0}
METHODS = {
    "codes of 4 bits": Coded(subvector_dim=2, num_codewords=16),
    "codes of 3 bits": Coded(subvector_dim=3, num_codewords=6, codebooks="all"),
    "codes of 9 bits": Coded(subvector_dim=5, num_codewords=300),
    "codes of two lengths": MGQE(subvector_dim=2, num_codewords=16, frequent_share=0.3),
    "codes and projections": Coded(subvector_dim=4, num_codewords=8, latent_dim=2),
    "bitmaps": LowDim(width=5, kept=KEPT),
    "bitmaps of blocks": LowDim(width=5, kept={"t1": 50}),
    "pointers": Sparse(nonzeros=NONZEROS),
    "several": {"t0": Coded(subvector_dim=2, num_codewords=16), "t1": LowDim(kept={"t1": 5})},
}
LARGE = {"codes of 4 bits", "bitmaps", "pointers"}


def setup_of(name, pooled=True):
    return Setup(
        plan=METHODS[name],
        dims=(16, 8, 10) if pooled else (10, 10, 10),
        sharding="mixed",
        pooled=pooled,
    )


def weights_of(name, pooled=True):
    """Equal on all ranks; where any bits are codes, codes that no config implies."""
    random = torch.Generator().manual_seed(7)
    weights = copy.deepcopy(setup_of(name, pooled).model(seed=1).state_dict())
    for key, value in weights.items():
        if name == "codes of 4 bits" and ".codes@" in key:
            value.copy_(torch.randint(256, value.shape, generator=random).to(torch.uint8))
    return weights


def with_whole_codes(name, pooled=True):
    setup = setup_of(name, pooled)
    return shard(setup, setup.model(seed=2), weights=weights_of(name, pooled))


def with_sharded_codes(name, pooled=True):
    setup = setup_of(name, pooled)
    model = setup.model(seed=3, device=torch.device("meta"))
    shard_codes(model, above=1)
    return shard(setup, model, weights=weights_of(name, pooled))


def train_both(names, pooled):
    """Losses of both on every step, one of which has a rank without an id; what differs at the end."""
    found = {}
    for name in names:
        setup = setup_of(name, pooled)
        whole, apart = with_whole_codes(name, pooled), with_sharded_codes(name, pooled)
        losses = [
            [train_step(*each, setup.batch(step, dist.get_rank())) for step in range(2)]
            for each in (whole, apart)
        ]
        mine, theirs = (model.state_dict() for model, _ in (whole, apart))
        rows = [key for key in mine if ".embedding_bags." in key or "combine" in key]
        pieces = [
            list(
                zip(
                    *([piece.tensor for piece in pieces_of(state[key])] for state in (mine, theirs))
                )
            )
            for key in rows
        ]
        equal = all(torch.equal(a, b) for pair in pieces for a, b in pair)
        found[name] = (losses, equal, list(mine) == list(theirs))
    return found


class Whole:
    def __init__(self, tensor):
        self.tensor = tensor


def pieces_of(value):
    return value.local_shards() if hasattr(value, "local_shards") else [Whole(value.detach())]


@pytest.mark.parametrize(
    ("ranks", "pooled", "names"),
    long_but(
        [(2, True, METHODS)],
        [(2, True, METHODS), (4, True, LARGE), (2, False, LARGE)],
    ),
)
def test_losses_and_weights_are_those_of_whole_codes_to_the_bit(workers, ranks, pooled, names):
    for found in workers.run(ranks, train_both, sorted(names), pooled):
        for name, ((whole, apart), equal, same_names) in found.items():
            assert whole == apart, name
            assert equal and same_names, name


def buffers_of(names, above):
    """Bytes of the buffers of each method on this rank, and what a plan says of them."""
    found = {}
    for name in names:
        setup = setup_of(name)
        model = setup.model(seed=1)
        whole = sum(measured(part) for part in shardable(model))
        query = PlacementRequest(
            world_size=dist.get_world_size(), device_memory=1 << 30, shard_codes_above=above
        )
        before = beside_rows(model, query)
        tables = shard_codes(model, above=above)
        held = sum(measured(part) for part in shardable(model))
        expect_shares(model.state_dict(), setup.model(seed=1).state_dict())
        after = beside_rows(model, query)
        found[name] = (whole, held, before, after, tables)
    return found


def expect_shares(state, whole):
    """What is sharded in a state dict is this rank's rows of the whole."""
    for key, value in state.items():
        for piece in pieces_of(value):
            if "route" in key and hasattr(piece, "metadata"):
                first, rows = piece.metadata.shard_offsets[0], piece.metadata.shard_sizes[0]
                assert torch.equal(piece.tensor, whole[key][first : first + rows]), key


def measured(module):
    flags = [module.filled.untyped_storage().nbytes()]
    return sum(b.untyped_storage().nbytes() for b in module.buffers(recurse=False)) - sum(flags)


def test_each_rank_holds_its_share_and_a_plan_bills_it(workers):
    for ranks in (2, 4):
        for found in workers.run(ranks, buffers_of, list(METHODS), 1):
            for name, (whole, held, before, after, tables) in found.items():
                # A chunk ends with eight ids' codes, or with 256 ids.
                assert held <= whole / ranks + 3 * 64, name
                assert before == after and before.tables == tuple(tables), name
                query = PlacementRequest(world_size=1, device_memory=1 << 30)
                alone = beside_rows(setup_of(name).model(seed=1), query)
                assert before.on_each == alone.on_each - whole + held, name
                assert before.sharded == held, name


def test_tables_up_to_the_stated_size_stay_whole(workers):
    # 60, 90 and 75 ids with 8, 4 and 5 codes of half a byte.
    for found in workers.run(2, buffers_of, ["codes of 4 bits"], 187):
        whole, held, before, _, tables = found["codes of 4 bits"]
        assert (whole, tables) == (240 + 180 + 188, ["t0", "t2"])
        assert held == 128 + 180 + 100 and before.sharded == 128 + 100
    for found in workers.run(2, buffers_of, ["codes of 4 bits"], 240):
        assert found["codes of 4 bits"][4] == []


def save_and_load(names, folder, save):
    """Save what the ranks hold, or load it and say whether each rank has its share."""
    for name in names:
        apart = setup_of(name).model(seed=3)
        shard_codes(apart, above=1)
        if save:
            apart.load_state_dict(weights_of(name))
        state = {"model": apart.state_dict()}
        if save:
            save_tensors(state, checkpoint_id=folder / name)
            continue
        with torch.no_grad():
            for part in shardable(apart):
                for buffer in part.buffers(recurse=False):
                    buffer.zero_()
        load_tensors(state, checkpoint_id=folder / name)
        apart.load_state_dict(state["model"])
        expect_shares(apart.state_dict(), weights_of(name))


def test_a_checkpoint_is_dealt_out_anew_to_any_number_of_ranks(workers, tmp_path):
    names = sorted(LARGE)
    workers.run(4, save_and_load, names, tmp_path, True)
    workers.run(2, save_and_load, names, tmp_path, False)
    for name in names:  # and put together where nothing is sharded
        wanted = weights_of(name)
        state = {"model": {key: torch.zeros_like(value) for key, value in wanted.items()}}
        load_tensors(state, checkpoint_id=tmp_path / name, no_dist=True)
        for key, value in wanted.items():
            assert torch.equal(state["model"][key], value), key


def refusals():
    setup = setup_of("codes of 4 bits")
    model = setup.model(seed=1)
    shard_codes(model, above=1)
    texts = []
    with pytest.raises(ConfigError) as twice:
        shard_codes(model, above=1)
    texts.append(str(twice.value))
    with pytest.raises(CheckpointError) as apart:
        setup.model(seed=1).load_state_dict(model.state_dict())
    texts.append(str(apart.value))
    model.load_state_dict(setup.model(seed=1).state_dict())
    short = dict(setup.model(seed=1).state_dict())
    key = next(key for key in short if ".codes@t0" in key)
    short[key] = short[key][:-1]
    with pytest.raises(CheckpointError) as size:
        model.load_state_dict(short)
    texts.append(str(size.value))
    assert [p.exchange for p in shardable(copy.deepcopy(model))] == [
        p.exchange for p in shardable(model)
    ]
    return texts


def test_what_cannot_be_is_refused_with_the_way_out(workers):
    for twice, apart, size in workers.run(2, refusals):
        assert "sharded already" in twice
        assert "codes@t0" in apart and "torch.distributed.checkpoint" in apart
        assert "table 't0'" in size and "239 there and 240 here" in size
    with pytest.raises(ConfigError, match=r"init_process_group first"):
        shard_codes(setup_of("codes of 4 bits").model(seed=1))
    for wrong in ("much", 0, "10%"):
        with pytest.raises(ConfigError, match="above: expected"):
            workers_alone(wrong)


def workers_alone(above):
    tables = [table.bag() for table in awkward_tables((16, 8, 10))]
    model = CompressedEmbeddingBagCollection(tables, METHODS["codes of 4 bits"])
    store = dist.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        assert shard_codes(model) == []
        shard_codes(model, above=above)
    finally:
        dist.destroy_process_group()


def ask_unevenly():
    """Ranks ask different numbers of questions, one of them none, and of some ranks nothing."""
    exchange = RowExchange(dist.group.WORLD)
    rank, ranks = exchange.rank, exchange.ranks
    random = torch.Generator().manual_seed(rank)
    found = []
    for dtype, width in (
        (torch.int64, 1),
        (torch.uint8, 3),
        (torch.int32, None),
        (torch.uint16, 2),
    ):
        count = 0 if rank == 1 else 5 * rank + 3
        owners = torch.randint(
            max(1, ranks - 1), (count,), generator=random
        )  # the last is not asked
        places = torch.randint(100, (count,), generator=random)

        def answer(asked, dtype=dtype, width=width):
            own = asked + 100 * rank if dtype != torch.uint8 else asked + rank
            return (own if width is None else own.unsqueeze(1).expand(-1, width)).to(dtype)

        answers = exchange.ask(owners, places, answer)
        wanted = places + (100 if dtype != torch.uint8 else 1) * owners
        if width is not None:
            wanted = wanted.unsqueeze(1).expand(-1, width)
        found.append(answers.dtype == dtype and torch.equal(answers.long(), wanted))
    return found


def test_questions_come_back_in_their_order_however_uneven_they_are(workers):
    for ranks in (1, 2, 4):
        assert workers.run(ranks, ask_unevenly) == [[True] * 4] * ranks


def pipelined():
    setup = setup_of("codes of 4 bits")
    (apart, optimizer), (model, rows) = (
        each("codes of 4 bits") for each in (with_sharded_codes, with_whole_codes)
    )
    pipeline = TrainPipelineSparseDist(
        apart, optimizer, torch.device("cpu"), execute_all_batches=True, pipeline_postproc=True
    )
    batches = [setup.batch(step, dist.get_rank()) for step in range(4)]
    stream = iter(batches)
    logits = [pipeline.progress(stream).detach() for _ in batches]
    assert len(pipeline._pipelined_modules) == 1
    for batch, out in zip(batches, logits):
        rows.zero_grad()
        loss, wanted = model(batch)
        loss.backward()
        rows.step()
        assert torch.equal(out, wanted.detach())


def test_train_pipelines_take_them(workers):
    workers.run(2, pipelined)
