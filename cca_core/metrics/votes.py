"""Reads votes in memory, writes nothing: how often reviewers prefer the aligned model, and how far they agree."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations

from cca_core.votes import CHOICES, Vote, counting, reviewer_key

#: Standard normal quantile of a two-sided 95 % interval.
Z_95 = 1.959963984540054


@dataclass(frozen=True)
class Tally:
    """Votes for the aligned model (wins), for the other (losses), and for neither (equal)."""

    wins: int = 0
    losses: int = 0
    equal: int = 0

    @property
    def votes(self) -> int:
        return self.wins + self.losses + self.equal

    @property
    def win_rate(self) -> float:
        """Wins and half of the equals, over votes; NaN without a vote."""
        return (self.wins + self.equal / 2) / self.votes if self.votes else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % Wilson score interval of the win rate, as if every vote were independent."""
        return wilson_interval(self.win_rate, self.votes)


@dataclass(frozen=True)
class Agreement:
    """How far reviewers agree on what both have voted on; over more than two, the mean over couples, weighed by the
    pairs that they share."""

    #: Votes that were compared: pairs of images, summed over couples of reviewers.
    compared: int
    #: Share of equal choices; NaN where nobody shares a pair.
    share: float
    #: Cohen's kappa: agreement beyond chance, 1 at best; NaN where chance alone agrees always.
    kappa: float


@dataclass(frozen=True)
class VoteSummary:
    """What the votes that count say."""

    tally: Tally
    reviewers: int
    #: Pairs of images with at least one vote.
    pairs: int
    agreement: Agreement
    by_class: dict[str, Tally]


def summarize(votes: Iterable[Vote]) -> VoteSummary:
    """Count the last vote of each reviewer on each pair.

    Args:
        votes: of one comparison, in the order in which they were given.
    """
    counted = counting(votes)
    names = sorted({vote.class_name for vote in counted})
    return VoteSummary(
        tally=_tally(counted),
        reviewers=len({reviewer_key(vote.reviewer) for vote in counted}),
        pairs=len({vote.pair for vote in counted}),
        agreement=agreement(counted),
        by_class={name: _tally([vote for vote in counted if vote.class_name == name]) for name in names},
    )


def wilson_interval(rate: float, count: int, z: float = Z_95) -> tuple[float, float]:
    """Wilson's score interval of a rate among ``count`` votes; NaN without any.

    A half-counted equal makes the rate no share of yes and no: the interval is then a little too wide.
    """
    if not count:
        return math.nan, math.nan
    square = z * z / count
    centre = (rate + square / 2) / (1 + square)
    half = z / (1 + square) * math.sqrt(rate * (1 - rate) / count + square / (4 * count))
    return max(0.0, centre - half), min(1.0, centre + half)


def agreement(counted: Iterable[Vote]) -> Agreement:
    """Agreement of every couple of reviewers that share pairs of images."""
    chosen: dict[str, dict[int, str]] = {}
    for vote in counted:
        chosen.setdefault(reviewer_key(vote.reviewer), {})[vote.pair] = vote.choice
    couples = []
    for one, other in combinations(chosen.values(), 2):
        shared = [(one[pair], other[pair]) for pair in sorted(one.keys() & other.keys())]
        if shared:
            couples.append((len(shared), percent_agreement(shared), cohen_kappa(shared)))
    compared = sum(count for count, _, _ in couples)
    share = sum(count * same for count, same, _ in couples) / compared if compared else math.nan
    with_kappa = [(count, kappa) for count, _, kappa in couples if not math.isnan(kappa)]
    weight = sum(count for count, _ in with_kappa)
    kappa = sum(count * value for count, value in with_kappa) / weight if weight else math.nan
    return Agreement(compared, share, kappa)


def percent_agreement(shared: Sequence[tuple[str, str]]) -> float:
    """Share of the pairs on which two reviewers chose the same."""
    return sum(one == other for one, other in shared) / len(shared)


def cohen_kappa(shared: Sequence[tuple[str, str]]) -> float:
    """Cohen's kappa of two reviewers' choices; NaN where both always chose one and the same."""
    count = len(shared)
    one, other = (Counter(choices) for choices in zip(*shared, strict=True))
    by_chance = sum(one[choice] * other[choice] for choice in CHOICES) / count**2
    return (percent_agreement(shared) - by_chance) / (1 - by_chance) if by_chance < 1 else math.nan


def _tally(votes: Sequence[Vote]) -> Tally:
    counts = Counter(vote.choice for vote in votes)
    return Tally(wins=counts["aligned"], losses=counts["guided"], equal=counts["equal"])
