"""Writes a token data set to a temporary folder: condition indices as classes and as captions, up to an alignment."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cca_core.config import ExecutionConfig, OptimConfig
from cca_core.dataset import TokenDataset
from cca_core.models import Captions, ClassIds, load_model
from cca_core.models.conditions import CaptionConditions, ClassConditions
from cca_core.objectives import CCA
from cca_core.pairs import Purpose
from cca_core.train.batches import BatchSource, OnlineReference
from cca_core.train.distributed import world
from cca_core.train.fit import fit

TEXT = Path(__file__).parents[1] / "parity" / "data" / "gpt_t2i"
NULL = 3


@pytest.fixture
def text_model():
    return load_model(str(TEXT / "ckpt.pt"), num_tokens=16, num_heads=4, num_cond_tokens=8)


@pytest.fixture
def captions(text_model) -> CaptionConditions:
    golden = load_file(TEXT / "reference.safetensors")
    null = text_model.null_cond(Captions(golden["caption"][:1], None)).features_BTD[0]
    return CaptionConditions(golden["caption"], golden["emb_mask"], null)


def test_a_class_is_its_index():
    index = torch.tensor([2, 0, NULL])
    assert ClassConditions().lookup(index) == ClassIds(index)


def test_captions_are_looked_up_and_the_index_behind_the_last_is_null(captions):
    found = captions.lookup(torch.tensor([1, NULL, 0]))
    assert torch.equal(found.features_BTD[[0, 2]], captions.features_NTD[[1, 0]])
    assert torch.equal(found.mask_BT[[0, 2]], captions.mask_NT[[1, 0]])
    assert torch.equal(found.features_BTD[1], captions.null_TD)
    assert found.mask_BT[1].all(), "nothing of the null condition is masked"


def test_a_text_model_is_aligned_by_the_same_loop(tmp_path, write_tokens, text_model, captions):
    reference = load_model(str(TEXT / "ckpt.pt"), num_tokens=16, num_heads=4, num_cond_tokens=8)
    batches = BatchSource(
        TokenDataset(write_tokens(tmp_path)),
        seed=0,
        global_batch_size=24,
        micro_batch_size=12,
        null_label=NULL,
        null_share=0.2,
        null_purpose=Purpose.NULL,
        reference=OnlineReference(reference, captions),
    )
    with world(torch.device("cpu")) as group:
        result = fit(
            text_model,
            CCA(beta=0.1, lambda_=1.0),
            batches,
            OptimConfig(lr=3e-3),
            epochs=4,
            dropout=0.0,
            world=group,
            execution=ExecutionConfig(log_every_steps=1),
            conditions=captions,
        )
    first, last = result.curve[0], result.curve[-1]
    assert abs(first["log_ratio_pos"]) < 1e-4, "the policy starts as its reference, captions and null rows alike"
    assert abs(first["log_ratio_null"]) < 1e-4
    assert last["margin"] > first["margin"] + 1
    assert last["accuracy"] > 0.8
