"""Reads the first batch; writes nothing: is the reference that of the model which is to be aligned?"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist

from cca_core.config import ConfigError
from cca_core.models import ARImageModel
from cca_core.models.conditions import ClassConditions, Conditions, scorer
from cca_core.objectives.base import sequence_logps
from cca_core.train.batches import BatchSource, to_device
from cca_core.train.distributed import World, autocast

#: What one token's log-prob may differ by, in nats, where the same model computes it in batches of another shape. The
#: differences of L tokens add up like a random walk: L^0.5 of this.
TOKEN_TOLERANCE = {"float32": 0.002, "bfloat16": 0.1}


@torch.no_grad()
def check_reference(
    model: ARImageModel, batches: BatchSource, world: World, precision: str, conditions: Conditions | None = None
) -> None:
    """Before step 0 the policy is its reference: all log-ratios of the first micro-batch are 0 but for rounding.

    Called by all ranks with the model that has not been trained yet, in eval mode. Raises ConfigError on all of them
    where a log-ratio of any exceeds ``TOKEN_TOLERANCE`` times the root of the number of tokens.
    """
    _, batch = next(batches.micro_batches(0, rank=world.rank, world_size=world.size))
    batch = to_device(batch, world.device)
    model.to(world.device).eval()
    with autocast(world.device, precision):
        pos, neg = sequence_logps(scorer(model, conditions or ClassConditions()), batch)
    log_ratios = torch.stack([pos - batch.ref_pos_B, neg - batch.ref_neg_B]).abs() * batch.weight_B
    worst = log_ratios.max().double()
    dist.all_reduce(worst, dist.ReduceOp.MAX)
    limit = TOKEN_TOLERANCE[precision] * math.sqrt(model.spec.num_tokens)
    if not worst <= limit:  # NaN too
        raise ConfigError(
            f"the reference is not that of the base: a log-ratio is {worst:.3g} nats before the first step, and "
            f"rounding explains {limit:.2g}. Remove the reference directory, so that it is made again"
        )
