"""Reads data/sampling_llamagen and data/sampling_var: probabilities after temperature, top-k and top-p against the
official filters."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cca_core.generate import Sampling, draw, filtered_probs

DATA = Path(__file__).parent / "data" / "sampling_llamagen"
CASES = json.loads((DATA / "filter.json").read_text())
VAR = Path(__file__).parent / "data" / "sampling_var"
VAR_CASES = json.loads((VAR / "filter.json").read_text())


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


@pytest.mark.parametrize("case", VAR_CASES, ids=lambda case: f"top_k{case['top_k']}-top_p{case['top_p']}")
def test_filtered_probabilities_of_var(case):
    # V4: the official top_p is off at 0, ours at 1. Beyond that, VAR's filter (no temperature) is LlamaGen's.
    tensors = load_file(VAR / "filter.safetensors")
    assert case["ambiguous_positions"] == []
    probs = filtered_probs(tensors["logits"].flatten(0, 1), Sampling(top_k=case["top_k"], top_p=case["top_p"] or 1.0))
    expected = tensors[f"case{case['case']:02d}.probs"]
    torch.testing.assert_close(probs.view_as(expected), expected, rtol=0, atol=1e-6)
    assert (probs.view_as(expected) > 0).sum(-1).tolist() == case["kept"]
