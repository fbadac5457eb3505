"""Reads data/sampling_llamagen: probabilities after temperature, top-k and top-p against the official filter."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cca_core.generate import Sampling, draw, filtered_probs

DATA = Path(__file__).parent / "data" / "sampling_llamagen"
CASES = json.loads((DATA / "filter.json").read_text())


def name(case: dict) -> str:
    return f"temperature{case['temperature']}-top_k{case['top_k']}-top_p{case['top_p']}"


@pytest.fixture(scope="module")
def golden() -> dict[str, torch.Tensor]:
    return load_file(DATA / "filter.safetensors")


@pytest.mark.parametrize("case", CASES, ids=name)
def test_filtered_probabilities(golden, case):
    logits = golden["logits"][:, -1]
    sampling = Sampling(temperature=case["temperature"], top_k=case["top_k"], top_p=case["top_p"])
    probs = filtered_probs(logits, sampling)
    # Equal logits across the nucleus boundary: which of them stays depends on the order of the sort.
    clear = [row for row in range(len(logits)) if row not in case["ambiguous_rows"]]
    expected = golden[f"case{case['case']:02d}.probs"]
    torch.testing.assert_close(probs[clear], expected[clear], rtol=0, atol=1e-6)
    assert (probs > 0).sum(-1)[clear].tolist() == [case["kept"][row] for row in clear]
    assert (probs > 0).sum(-1).tolist() == case["kept"], "how many stay does not depend on the order"


@pytest.mark.parametrize("case", CASES, ids=name)
def test_most_likely_token(golden, case):
    logits = golden["logits"][:, -1]
    sampling = Sampling(temperature=case["temperature"], top_k=case["top_k"], top_p=case["top_p"])
    expected = golden[f"case{case['case']:02d}.argmax"][:, 0]
    assert torch.equal(filtered_probs(logits, sampling).argmax(-1), expected)
    if sampling.temperature == 0:
        assert torch.equal(draw(logits, torch.rand(len(logits), dtype=torch.float64), sampling), expected)
