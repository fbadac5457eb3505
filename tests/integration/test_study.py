"""Writes a storage below a temporary folder: a study through `python -m cca_core`, its table and its picture."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_a_study_measures_bases_and_arms_on_the_recipes_own_images(tmp_path, write_images):
    recipe = {
        "source": {"kind": "folder", "uri": str(write_images(tmp_path / "images"))},
        "tokens": {"rows_per_shard": 30, "batch_size": 8},
        "tokenizer": {"epochs": 1, "codebook_size": 16},
        "features": {"width": 8, "feature_dim": 8, "epochs": 1},
        "base": {"dim": 16, "num_layers": 1, "num_heads": 2, "epochs": 1},
        "align": {"epochs": 1},
        "evaluate": {"num_samples": 16, "seeds": [0], "cfg_scales": [2.0], "temperatures": [], "batch_size": 8},
        "execution": {"device": "cpu"},
    }
    study = {
        "recipe": recipe,
        "variants": {"wide": {"base": {"dim": 32}}},
        "arms": {"auto": {"align": {"lambda_": "auto"}}},
        "measure": {"cfg_scales": [3.0]},
        "seeds": [0],
    }
    (tmp_path / "study.json").write_text(json.dumps(study))
    command = [sys.executable, "benchmarks/study.py", str(tmp_path / "study.json"), f"--storage={tmp_path / 'storage'}"]
    command.append(f"--plot={tmp_path / 'plot.png'}")
    first = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    labels = [line.split("|")[1].strip() for line in first.stdout.splitlines() if line.startswith("| ")]
    assert labels == ["sampler", "---", "wide base", "wide base, CFG 2", "wide auto", "wide auto, CFG 3"]
    done = [line.split(": ")[-1].split()[0] for line in first.stderr.splitlines()]
    assert done == ["train-tokenizer", "fit-base", "measure", "fit", "measure"]
    assert (tmp_path / "plot.png").stat().st_size > 10_000
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert again.stderr == "", "all of it was there"
    assert again.stdout == first.stdout
