"""Codewords that follow the latents which they stand for, while those learn.

Van den Oord, Vinyals, Kavukcuoglu, "Neural Discrete Representation Learning", NeurIPS 2017: the nearest
codeword stands for a latent, the gradient passes straight through to the latent, and codewords are
moving means of the latents that chose them (its appendix A.1), over all ranks. A codeword that nobody
chooses is moved beside one that fits badly, as in Linde, Buzo and Gray's splitting (1980).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable
from typing_extensions import override

from embcomp.backends.codebooks.codewords_compiled import add_totals, is_readable, snap
from embcomp.backends.codebooks.nearest import nearest, nearest_of_each
from embcomp.backends.codebooks.nearest_compiled import library
from embcomp.backends.codebooks.subvectors import Decode, SubvectorLayout
from embcomp.layers.constant_tensors import Constant
from embcomp.layers.hashing import hash_rows, salt, to_signed
from embcomp.layers.host_values import known_equal, on_device, reads_wait
from embcomp.layers.learned_buffers import LearnedBuffers, Penalised
from embcomp.layers.lookup_context import LookupContext
from embcomp.tables.name_hash import name64

_DEAD = 1e-3  # share of the mean usage below which a codeword is moved
_LEAST_MASS = 1e-9
_MOSTLY_DISTINCT = 0.9  # where more of a batch's ids are, finding equal ones saves nothing


class Codewords(LearnedBuffers):
    """Codebooks, and what is known of their use.

    Args:
        units: who shares codebooks, by name, and how many each has.
        size: codewords in each.
        latent_dim: width of a codeword.
        decay: of the moving means, in a step.
        revive_every: steps between two searches for codewords that nobody chose.
        std: deviation of the first codewords.
        seed: of the first codewords, and of where dead ones are moved.
    """

    words: Tensor
    masses: Tensor
    uses: Tensor
    errors: Tensor
    steps: Tensor

    def __init__(
        self,
        units: Sequence[tuple[str, int]],
        size: int,
        latent_dim: int,
        *,
        decay: float,
        revive_every: int,
        std: float,
        seed: int,
    ) -> None:
        super().__init__()
        self._decay, self._revive_every = decay, revive_every
        self._std, self._seed = std, seed
        self._units = list(units)
        count = sum(own for _, own in units)
        for name in ("words", "masses", "uses", "errors"):
            self.store_in_parts(name, units)
        self.register_buffer("words", torch.zeros(count, size, latent_dim))
        self.register_buffer("masses", torch.zeros(count, size))
        self.register_buffer("uses", torch.zeros(count, size))
        self.register_buffer("errors", torch.zeros(count, size))
        self.register_buffer("steps", torch.zeros(1, dtype=torch.int64))
        self._counted: tuple[Tensor, int, int] | None = None

    def reset_buffers(self) -> None:
        """Random codewords, spread as fresh latents are; who shares them has draws of its own."""
        bound = self._std * 3**0.5
        for (name, _), own in zip(self._units, self.words.split([n for _, n in self._units])):
            random = torch.Generator().manual_seed(salt(self._seed, name64(name), 0) >> 1)
            own.copy_(torch.empty(own.shape).uniform_(-bound, bound, generator=random))
        self.masses.fill_(1 / self.masses.numel())
        for count in (self.uses, self.errors, self.steps):
            count.zero_()

    @torch.no_grad()
    def learn(
        self,
        latents: Sequence[Tensor],
        slots: Sequence[Tensor],
        gaps: Sequence[Tensor],
        chosen: Tensor | None,
        *,
        shared: bool,
    ) -> None:
        """Move codewords towards the latents that chose them; the same on every rank.

        Args:
            latents: (N, d) each.
            slots: (N,) each, the codeword that each chose, counted over all codebooks.
            gaps: (N,) each, their squared distances from it.
            chosen: (N,) of one alone, whether a row was looked up, or only pads; None when all were.
            shared: whether other ranks have the rest of the step's rows.
        """
        uses, sums, errors = self._totals(
            [own.float() for own in latents],
            slots,
            [own.float() for own in gaps],
            chosen,
            shared=shared,
        )
        self.masses.mul_(self._decay).add_(uses, alpha=1 - self._decay).clamp_(min=_LEAST_MASS)
        # A moving mean: masses weigh what the codeword was by how much of them is old.
        share = ((1 - self._decay) * uses / self.masses).clamp_(max=1)
        means = sums / uses.clamp(min=1e-30).unsqueeze(2)
        self.words.lerp_(means, share.unsqueeze(2))
        self.uses.add_(uses)
        self.errors.add_(errors)
        step = self._next_step()
        if step % self._revive_every == 0:
            self._revive(step)

    def _next_step(self) -> int:
        """Count a step; `steps` is only looked at when someone else has written to it."""
        known = self._counted
        if known is None or known[0] is not self.steps or known[1] != self.steps._version:
            step = int(self.steps)
        else:
            step = known[2]
        self.steps.add_(1)
        self._counted = (self.steps, self.steps._version, step + 1)
        return step + 1

    def _totals(
        self,
        latents: Sequence[Tensor],
        slots: Sequence[Tensor],
        gaps: Sequence[Tensor],
        chosen: Tensor | None,
        *,
        shared: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Over all ranks, per codeword: share of uses, sums of latents, squared errors alike."""
        count, size, width = self.words.shape
        totals = self.words.new_zeros(count * size, width + 2, dtype=torch.float32)
        if is_readable(totals, *latents, *slots, *gaps):
            for parts in zip(latents, slots, gaps):
                add_totals(totals, *parts, chosen)
        else:
            all_gaps = _joined(gaps)[:, None]
            columns = torch.cat([torch.ones_like(all_gaps), _joined(latents), all_gaps], dim=1)
            if chosen is not None:
                columns = torch.where(chosen.unsqueeze(1), columns, 0.0)
            totals.index_add_(0, _joined(slots), columns)
        if shared:
            totals = _over_ranks(totals)
        # Shares, not numbers: a process that sees the whole batch must count as its ranks do.
        totals /= totals[:, 0].sum().clamp(min=1)
        uses, sums, errors = totals.view(count, size, -1).split([1, width, 1], dim=2)
        return uses.squeeze(2), sums, errors.squeeze(2)

    def _revive(self, step: int) -> None:
        """Put unused codewords beside those of the largest total error, and share their mass."""
        width = self.words.shape[2]
        dead = self.uses < _DEAD * self.uses.mean(1, keepdim=True)
        order = torch.where(dead, -1.0, self.errors).sort(dim=1, descending=True, stable=True)
        rank = dead.long().cumsum(1) - 1  # the n-th dead goes to the n-th worst
        moved = dead & (rank < (~dead).sum(1, keepdim=True))
        donor = order.indices.gather(1, rank.clamp(min=0))  # (G, k), of which those moved count
        spread = (self.errors / self.uses.clamp(min=1e-30) / width).gather(1, donor)
        offset = self._signs(step) * (spread.sqrt() / 2).unsqueeze(2)
        offset = torch.where(moved.unsqueeze(2), offset, 0.0)
        places = donor.unsqueeze(2).expand_as(self.words)
        beside = self.words.gather(1, places) + offset
        # No two are moved to one donor, and no donor is moved.
        self.words.copy_(
            torch.where(moved.unsqueeze(2), beside, self.words.scatter_add(1, places, -offset))
        )
        halved = (
            torch.zeros_like(self.masses).scatter_add(1, donor, moved.to(self.masses.dtype)) > 0
        )
        self.masses.copy_(torch.where(halved, self.masses / 2, self.masses))
        self.masses.copy_(torch.where(moved, self.masses.gather(1, donor), self.masses))
        self.uses.zero_()
        self.errors.zero_()

    def _signs(self, step: int) -> Tensor:
        """(G, k, d) of -1 and 1, drawn from (seed, step, codeword, axis)."""
        places = torch.arange(self.words.numel(), device=self.words.device)
        own = on_device([to_signed(salt(self._seed, 0, step))], places.device)
        two = on_device([2], places.device)
        return (hash_rows(places, own, two) * 2.0 - 1.0).view_as(self.words)


def _over_ranks(totals: Tensor) -> Tensor:
    if dist.get_world_size() == 1:
        return totals
    on = totals if dist.get_backend() == "nccl" else totals.cpu()
    dist.all_reduce(on)
    return on.to(totals.device)


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


class _Snapped(torch.autograd.Function):
    """Codewords in the place of latents, and the squared distances; gradients pass straight through."""

    @staticmethod
    @override
    def forward(ctx: FunctionCtx, latents: Tensor, slots: Tensor, words: Tensor) -> Any:
        # (n, d), (n,), (words, d) -> (n, d), (n,)
        if latents.dtype == words.dtype == torch.float32 and is_readable(latents, slots, words):
            found, gaps = snap(latents, slots, words)
        else:
            found = words.index_select(0, slots).to(latents.dtype)
            gaps = (latents - found).square().sum(1)
        ctx.save_for_backward(latents, found)
        return found, gaps

    @staticmethod
    @once_differentiable
    @override
    def backward(ctx: Any, grad: Tensor, gap_grads: Tensor) -> Any:
        latents, found = ctx.saved_tensors
        return (latents - found).mul_(2 * gap_grads.unsqueeze(1)).add_(grad), None, None


class Quantize(Penalised):
    """Puts the nearest codeword in the place of every looked-up latent, and decodes it.

    Codes are never stored: each look-up chooses anew, so that none is out of date.

    Args:
        layout: the group's sub-vectors.
        codewords: the codebooks.
        decode: turns latents into embeddings.
        commitment: weight of the squared distance of latents from their codewords, summed over a
            sample's latents and averaged over samples, in the training loss.
    """

    def __init__(
        self, layout: SubvectorLayout, codewords: Codewords, decode: Decode, *, commitment: float
    ) -> None:
        super().__init__()
        self._which = Constant(layout.columns)
        positions = [
            layout.positions(table) for table in layout.tables for _ in table.feature_names
        ]
        ends = list(accumulate(positions))
        self._own = [slice(end - count, end) for count, end in zip(positions, ends)]
        self._commitment = commitment
        self.codewords = codewords
        self.decode = decode

    @override
    def forward(self, rows: Tensor, looked_up: LookupContext) -> Tensor:
        # (R, K * d) -> (R, sum of dims)
        self.codewords.ensure_filled()
        which = self._which.on(rows.device)
        latents = rows.view(len(rows), len(which), -1)
        codes = self._nearest(latents.detach(), which, looked_up)
        chosen = self._chosen(looked_up, rows.device) if self._learns() else None
        (found,) = self._found([latents], [codes], [which], looked_up, chosen)
        return self.decode(found)

    def each(self, parts: Sequence[Tensor], looked_up: LookupContext) -> list[Tensor]:
        """Of each (table, feature) by itself (`CombinesEach`)."""
        self.codewords.ensure_filled()
        which = [self._which.on(parts[0].device)[own] for own in self._own]
        latents = [part.unflatten(1, (len(own), -1)) for part, own in zip(parts, which)]
        codes = self._nearest_of_each([z.detach() for z in latents], which, looked_up)
        return self.decode.each(self._found(latents, codes, which, looked_up, None), looked_up)

    def _found(
        self,
        latents: Sequence[Tensor],
        codes: Sequence[Tensor],
        which: Sequence[Tensor],
        looked_up: LookupContext,
        chosen: Tensor | None,
    ) -> list[Tensor]:
        """The codewords in the place of latents; in training both learn.

        Args:
            latents: (N, K, d) each.
            codes: (N, K) each; they are written to.
            which: (K,) each, the codebooks.
            looked_up: what they were looked up for.
            chosen: (N, K) of one alone, whether a row was looked up for a value; None when none pads.

        Returns:
            (N, K * d) each.
        """
        words = self.codewords.words.flatten(0, 1)
        size = self.codewords.words.shape[1]
        slots = [c.add_(own * size).reshape(-1) for own, c in zip(which, codes)]
        self.penalty = None
        if not self._learns():
            found = [words.index_select(0, slot).to(z.dtype) for slot, z in zip(slots, latents)]
            return [word.view(z.shape).flatten(1) for word, z in zip(found, latents)]
        vectors = [z.reshape(-1, z.shape[2]) for z in latents]
        snapped = [_Snapped.apply(z, slot, words) for z, slot in zip(vectors, slots)]
        mask = None if chosen is None else chosen.reshape(-1)
        gaps = [gap if mask is None else gap * mask for _, gap in snapped]
        self.penalty = self._commitment * _joined(gaps).sum() / looked_up.features.stride()
        self.codewords.learn(
            [z.detach() for z in vectors],
            slots,
            [gap.detach() for gap in gaps],
            mask,
            shared=looked_up.sharded,
        )
        return [word.view(z.shape).flatten(1) for (word, _), z in zip(snapped, latents)]

    def _learns(self) -> bool:
        return self.training and torch.is_grad_enabled()

    def _nearest(self, latents: Tensor, which: Tensor, looked_up: LookupContext) -> Tensor:
        """(R, K) codes; any, where a row only pads."""
        if not self._measures_each_id_once(latents):
            return nearest(latents, self.codewords.words, which)
        codes = torch.zeros(latents.shape[:2], dtype=torch.int64)
        for ids, own in zip(looked_up.each_ids(), self._own):
            codes[: len(ids), own] = self._codes(latents[: len(ids), own], which[own], ids)
        return codes

    def _nearest_of_each(
        self, latents: Sequence[Tensor], which: Sequence[Tensor], looked_up: LookupContext
    ) -> list[Tensor]:
        """(N, K) codes of each (table, feature)'s latents."""
        if not self._measures_each_id_once(latents[0]):
            return nearest_of_each(latents, self.codewords.words, which)
        ids = looked_up.each_ids()
        return [self._codes(z, own, i) for z, own, i in zip(latents, which, ids)]

    def _codes(self, latents: Tensor, which: Tensor, ids: Tensor) -> Tensor:
        """(N, K) codes of the latents of ids (N,)."""
        words = self.codewords.words
        if not self._measures_each_id_once(latents):
            return nearest(latents, words, which)
        distinct, place = ids.unique(return_inverse=True)
        if len(distinct) > _MOSTLY_DISTINCT * len(ids):
            return nearest(latents, words, which)
        row = place.new_empty(len(distinct)).scatter_(0, place, torch.arange(len(ids)))
        return nearest(latents[row], words, which)[place]

    def _measures_each_id_once(self, latents: Tensor) -> bool:
        """Whether an id's distances are measured once in a batch.

        On CPU most of a step goes into them. In one dimension a search takes less than finding
        equal ids, and so does compiled code; elsewhere that would wait for the device, once for each key.
        """
        return not reads_wait(latents.device) and latents.shape[2] > 1 and library() is None

    def _chosen(self, looked_up: LookupContext, device: torch.device) -> Tensor | None:
        """(R, K) whether a row was looked up for a value; None when none only pads."""
        counts = looked_up.features.length_per_key()[looked_up.own]
        if known_equal(counts, looked_up.rows):
            return None
        places = torch.arange(looked_up.rows, device=device)[:, None]
        limits = [n for n, own in zip(counts, self._own) for _ in range(own.start, own.stop)]
        return places < on_device(limits, device)
