"""Look-ups from many threads while artefacts take turns in a slot: wrong, stale and failed answers.

    python benchmarks/swaps.py [--lookups 24000000] [--swaps 200] [--threads 8] [--mmap]

Two artefacts (26 features, codes into codewords, int8 rows) take turns in one `embcomp.serving.ServingSlot`.
Each thread looks up batches of its own whose answers from either artefact are known beforehand, and
compares every answer to the bit: it must be one artefact's as a whole, and the present one's where no
swap was under way. A look-up is one id of one feature. Ends with exit code 1 where any answer was not right.
"""

from __future__ import annotations

import argparse
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import torch
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from embcomp import CompressedEmbeddingBagCollection, load, save
from embcomp.backends import Coded
from embcomp.serving import ServingSlot
from embcomp.training.distributed.quiet import quiet_libraries

FEATURES = 26


@dataclass
class Turns:
    """What the threads and the one that swaps know of each other: swaps begun, and swaps ended."""

    begun: int = 0
    ended: int = 0
    done: threading.Event = field(default_factory=threading.Event)


@dataclass
class Seen:
    """What one thread saw."""

    calls: int = 0
    certain: int = 0
    wrong: int = 0
    failed: int = 0


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--lookups", type=int, default=24_000_000)
    parser.add_argument("--swaps", type=int, default=200)
    parser.add_argument("--threads", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--rows", type=int, default=2_000, help="ids of each of the 26 tables")
    parser.add_argument("--mmap", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        paths = [made(Path(folder) / str(n), n, args.rows) for n in range(2)]
        batches = [batch(n, args) for n in range(args.threads)]
        known = [[load(path)(own).values() for path in paths] for own in batches]
        slot, turns = ServingSlot(paths[0], mmap=args.mmap), Turns()
        seen = [Seen() for _ in batches]
        threads = [
            threading.Thread(target=serve, args=(slot, turns, batches[n], known[n], seen[n]))
            for n in range(args.threads)
        ]
        memory, start = psutil.Process().memory_info().rss, time.perf_counter()
        for thread in threads:
            thread.start()
        swap_evenly(slot, turns, paths, seen, args)
        for thread in threads:
            thread.join()
        seconds = time.perf_counter() - start
        grown = (psutil.Process().memory_info().rss - memory) / 2**20
    calls, wrong, failed = (sum(getattr(s, n) for s in seen) for n in ("calls", "wrong", "failed"))
    certain = sum(s.certain for s in seen)
    print(
        f"{calls * args.batch_size * FEATURES:,} look-ups in {calls:,} calls from {args.threads} "
        f"threads during {turns.ended} swaps in {seconds:.1f} s: {wrong} wrong, {failed} failed; "
        f"{certain:,} calls had no swap beside them; resident memory grew by {grown:.0f} MiB"
    )
    return int(bool(wrong or failed) or turns.ended < args.swaps)


def made(path: Path, seed: int, rows: int) -> Path:
    torch.manual_seed(seed)
    tables = [
        EmbeddingBagConfig(
            name=f"t{n}", embedding_dim=16, num_embeddings=rows, feature_names=[f"f{n}"]
        )
        for n in range(FEATURES)
    ]
    collection = CompressedEmbeddingBagCollection(
        tables, Coded(subvector_dim=4, num_codewords=256)
    ).eval()
    save(collection, path, row_type="int8")
    return path


def batch(seed: int, args: argparse.Namespace) -> KeyedJaggedTensor:
    random = torch.Generator().manual_seed(seed)
    count = FEATURES * args.batch_size
    return KeyedJaggedTensor(
        keys=[f"f{n}" for n in range(FEATURES)],
        values=torch.randint(0, args.rows, (count,), generator=random),
        lengths=torch.ones(count, dtype=torch.int32),
        stride=args.batch_size,
    )


def serve(
    slot: ServingSlot,
    turns: Turns,
    own: KeyedJaggedTensor,
    known: list[torch.Tensor],
    seen: Seen,
) -> None:
    while not turns.done.is_set():
        ended = turns.ended
        try:
            found = slot(own).values()
        except Exception as error:  # noqa: BLE001 - whatever it is, it is counted
            seen.failed += 1
            print(f"failed: {error!r}")
            continue
        begun = turns.begun
        answers = [torch.equal(found, answer) for answer in known]
        certain = begun == ended
        right = answers[ended % 2] if certain else any(answers)
        seen.calls += 1
        seen.certain += certain
        seen.wrong += not right


def swap_evenly(
    slot: ServingSlot, turns: Turns, paths: list[Path], seen: list[Seen], args: argparse.Namespace
) -> None:
    """Swap whenever the next share of the look-ups is done; end when all are."""
    wanted = -(-args.lookups // (args.batch_size * FEATURES))
    while (calls := sum(s.calls + s.failed for s in seen)) < wanted or turns.ended < args.swaps:
        if turns.ended < args.swaps and calls * args.swaps >= turns.ended * wanted:
            turns.begun += 1
            slot.swap(paths[turns.begun % 2])
            turns.ended += 1
        else:
            time.sleep(0.001)
    turns.done.set()


if __name__ == "__main__":
    with quiet_libraries():
        raise SystemExit(main())
