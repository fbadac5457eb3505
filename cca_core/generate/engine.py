"""Reads and writes nothing: draws the tokens of images by continuous batching, one model call per step over fixed
slots.

A request takes one slot, or two where it is guided; it enters as soon as these are free, and leaves when it is drawn or
cancelled. A seed per image and a fixed shape of every call: the same (condition, seed, sampling) gives the same tokens
whatever else is drawn.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from cca_core.config import ConfigError
from cca_core.generate.sampling import Sampling, draw
from cca_core.models.base import ARImageModel, Captions, ClassIds, Cond, as_condition
from cca_core.pairs import sequence_uniforms

#: Images drawn at once unless the caller knows better.
BATCH_SIZE = 32


def calls_per_image(model: ARImageModel, sampling: Sampling) -> int:
    """Model calls (rows through the network, prefill included) that one image costs."""
    return len(model.spec.step_sizes) * slots_per_image(sampling)


def slots_per_image(sampling: Sampling) -> int:
    """With guidance an image has a row under its condition, and one under the null condition."""
    return 2 if sampling.guided else 1


@dataclass(eq=False)
class Request:
    """One image to draw."""

    ticket: int
    #: One row, and the null condition below it where it is guided.
    cond: ClassIds | Captions
    uniforms_N: Tensor
    sampling: Sampling
    slots: list[int] = field(default_factory=list)
    #: Model calls so far.
    step: int = 0


@dataclass(frozen=True)
class Drawn:
    """A finished request: its tokens, int64 [N] on the CPU."""

    ticket: int
    tokens_N: Tensor


class Engine:
    """Draws what is submitted, as ``step`` is called. It is synchronous, and belongs to one thread at a time."""

    def __init__(self, model: ARImageModel, num_slots: int) -> None:
        if num_slots < 1:
            raise ConfigError("an engine needs at least one slot, and two for guidance")
        self.model, self.num_slots, self.steps = model, num_slots, 0
        self._decoder = model.slots(num_slots)
        self._device = next(model.parameters()).device
        self._tickets = 0
        self._waiting: deque[Request] = deque()
        self._active: list[Request] = []
        # Those that are free for longest come first: slots take turns, and neighbours have nearly the same position.
        self._free: deque[int] = deque(range(num_slots))
        sizes = model.spec.step_sizes
        self._starts = [sum(sizes[:step]) for step in range(len(sizes) + 1)]
        self._tokens_SN = torch.zeros(num_slots, model.spec.num_tokens, dtype=torch.int64, device=self._device)
        self._uniforms_SN = torch.zeros(num_slots, model.spec.num_tokens, dtype=torch.float64, device=self._device)
        self._previous_Sn = torch.zeros(num_slots, 1, dtype=torch.int64, device=self._device)

    @property
    def waiting(self) -> int:
        """Requests that have no slot yet."""
        return len(self._waiting)

    @property
    def under_way(self) -> list[int]:
        """Tickets of the requests that have slots."""
        return [request.ticket for request in self._active]

    @property
    def used_slots(self) -> int:
        return self.num_slots - len(self._free)

    @property
    def busy(self) -> bool:
        return bool(self._waiting or self._active)

    @torch.no_grad()
    def submit(self, cond: Cond, sampling: Sampling, seeds_B: Tensor) -> list[int]:
        """Queue one request per row of ``cond``, with its seed (int64); return their tickets.

        Raises ConfigError for guidance where there is one slot only.
        """
        if slots_per_image(sampling) > self.num_slots:
            raise ConfigError("guidance needs two slots, and this engine has one")
        given = as_condition(cond).map(lambda tensor: tensor.to(self._device))
        uniforms_BN = torch.from_numpy(sequence_uniforms(seeds_B.cpu().numpy(), self.model.spec.num_tokens))
        tickets = []
        for row in range(len(given)):
            own = given.map(lambda tensor, row=row: tensor[row : row + 1])
            cond_rows = own.append(self.model.null_cond(own)) if sampling.guided else own
            self._waiting.append(Request(self._tickets, cond_rows, uniforms_BN[row], sampling))
            tickets.append(self._tickets)
            self._tickets += 1
        return tickets

    def cancel(self, ticket: int) -> bool:
        """Drop a request, whose slots are free from now on; False where it is not there any more."""
        for request in self._waiting:
            if request.ticket == ticket:
                self._waiting.remove(request)
                return True
        for request in self._active:
            if request.ticket == ticket:
                self._release([request])
                return True
        return False

    @torch.no_grad()  # not inference_mode: its tensors could not be scored with gradients afterwards
    def step(self) -> list[Drawn]:
        """Let requests in, draw the next tokens of all that are under way, and return the finished ones."""
        self._admit()
        if not self._active:
            return []
        logits_SnV = self._decoder.step(self._previous_Sn)
        self.steps += 1
        self._draw(logits_SnV)
        for request in self._active:
            request.step += 1
        done = [request for request in self._active if request.step == len(self.model.spec.step_sizes)]
        if not done:
            return []
        tokens_BN = self._tokens_SN[[request.slots[0] for request in done]].cpu()
        self._release(done)
        return [Drawn(request.ticket, tokens) for request, tokens in zip(done, tokens_BN, strict=True)]

    def _admit(self) -> None:
        """In the order in which they came: a guided one is not overtaken for ever by those that need less."""
        if self._active and not self._decoder.continuous:
            return
        entering = []
        while self._waiting and slots_per_image(self._waiting[0].sampling) <= len(self._free):
            request = self._waiting.popleft()
            request.slots = [self._free.popleft() for _ in range(slots_per_image(request.sampling))]
            entering.append(request)
        if not entering:
            return
        slots = [slot for request in entering for slot in request.slots]
        first, *others = (request.cond for request in entering)
        self._decoder.enter(slots, first.append(*others))
        uniforms = torch.stack([request.uniforms_N for request in entering]).to(self._device)
        self._uniforms_SN[[request.slots[0] for request in entering]] = uniforms
        self._active += entering

    def _draw(self, logits_SnV: Tensor) -> None:
        """Draw the tokens of all requests under way, those of one sampling together."""
        size = logits_SnV.shape[1]
        if self._previous_Sn.shape[1] != size:
            self._previous_Sn = self._previous_Sn.new_zeros(self.num_slots, size)
        groups: dict[Sampling, list[Request]] = {}
        for request in self._active:
            groups.setdefault(request.sampling, []).append(request)
        for sampling, requests in groups.items():
            rows = [request.slots[0] for request in requests]
            logits_RnV = logits_SnV[rows]
            if sampling.guided:
                null_rows = [request.slots[1] for request in requests]
                logits_RnV = self._guided(logits_RnV, logits_SnV[null_rows], requests)
            starts_R1 = torch.tensor([[self._starts[request.step]] for request in requests], device=self._device)
            cells = starts_R1 + torch.arange(size, device=self._device)
            at = torch.tensor(rows, device=self._device)[:, None]
            uniforms_Rn = self._uniforms_SN[at, cells]
            tokens_Rn = draw(logits_RnV.flatten(0, 1), uniforms_Rn.flatten(), sampling).view(-1, size)
            self._tokens_SN[at, cells] = tokens_Rn
            self._previous_Sn[rows] = tokens_Rn
            if sampling.guided:
                self._previous_Sn[null_rows] = tokens_Rn

    def _guided(self, logits_RnV: Tensor, null_RnV: Tensor, requests: Sequence[Request]) -> Tensor:
        scales = [self.model.guidance_scale(r.sampling.cfg_scale, r.sampling.cfg_interval, r.step) for r in requests]
        scales_R11 = torch.tensor(scales, device=self._device)[:, None, None]
        return torch.where(scales_R11 == 1.0, logits_RnV, null_RnV + (logits_RnV - null_RnV) * scales_R11)

    def _release(self, requests: Sequence[Request]) -> None:
        slots = [slot for request in requests for slot in request.slots]
        gone = {request.ticket for request in requests}
        self._active = [request for request in self._active if request.ticket not in gone]
        self._decoder.leave(slots)
        self._free.extend(slots)


def generate(
    model: ARImageModel, cond: Cond, sampling: Sampling, seeds_B: Tensor, *, batch_size: int = BATCH_SIZE
) -> Tensor:
    """Draw images as tokens.

    Args:
        cond: classes int64 [B], or captions.
        seeds_B: one int64 seed per image; equal seeds give equal tokens for equal conditions.
        batch_size: images drawn at once; fewer are drawn in the same shape, because a different one rounds differently.

    Returns:
        int64 [B, N] on the CPU.
    """
    engine = Engine(model, batch_size * slots_per_image(sampling))
    tickets = engine.submit(cond, sampling, seeds_B)
    drawn: dict[int, Tensor] = {}
    while engine.busy:
        drawn.update((one.ticket, one.tokens_N) for one in engine.step())
    rows = [drawn[ticket] for ticket in tickets]
    return torch.stack(rows) if rows else torch.empty(0, model.spec.num_tokens, dtype=torch.int64)


def padded_batches(size: int, batch_size: int) -> Iterator[slice]:
    """The slices of ``size`` rows; the caller pads the last to ``batch_size``."""
    for start in range(0, size, batch_size):
        yield slice(start, min(start + batch_size, size))


def pad_rows(tensor: Tensor, rows: int) -> Tensor:
    """Repeat the last row until there are ``rows``."""
    missing = rows - len(tensor)
    return torch.cat([tensor, tensor[-1:].expand(missing, *tensor.shape[1:])]) if missing else tensor


@torch.inference_mode()
def decode_images(tokenizer: torch.nn.Module, tokens_BL: Tensor, *, batch_size: int = BATCH_SIZE) -> Tensor:
    """Images in [-1, 1], float32 [B, 3, H, W] on the CPU, decoded in padded batches of one shape."""
    device = next(tokenizer.parameters()).device
    images = [
        tokenizer.decode(pad_rows(tokens_BL[rows], batch_size).to(device))[: rows.stop - rows.start].float().cpu()
        for rows in padded_batches(len(tokens_BL), batch_size)
    ]
    return torch.cat(images).clamp(-1, 1)
