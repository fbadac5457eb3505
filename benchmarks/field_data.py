"""Reads scikit-learn's digits, writes them as Parquet with the faults of data in the field, for a study.

    python benchmarks/field_data.py .cca/field_data
    python benchmarks/study.py benchmarks/studies/field_data.json --storage .cca/field_study > report.md

``digits.parquet`` has the true labels and, in columns of their own, labels of which 10 % and 30 % are replaced by
another class. ``imbalanced.parquet`` has all images of the first class and a twentieth of the last, in equal ratios
between.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from cca_core.config import SourceConfig
from cca_core.sources import open_source

NOISE = (10, 30)
#: Images of the first class for one of the last.
IMBALANCE = 20
CLASSES = 10


def images() -> pa.Table:
    source = open_source(SourceConfig())
    rows = [(row.id, row.data, row.label) for row in source.read_rows(source.list()[0])]
    return pa.table(dict(zip(("id", "image", "label"), map(list, zip(*rows, strict=True)), strict=True)))


def noisy(labels_N: NDArray[np.int64], percent: int) -> NDArray[np.int64]:
    """That share of the labels, drawn anew for each percentage, becomes another class, each as likely."""
    rng = np.random.default_rng(percent)
    chosen = rng.permutation(len(labels_N))[: len(labels_N) * percent // 100]
    wrong_N = labels_N.copy()
    wrong_N[chosen] = (labels_N[chosen] + rng.integers(1, CLASSES, size=len(chosen))) % CLASSES
    return wrong_N


def imbalanced(table: pa.Table) -> pa.Table:
    """The rows of each class up to its share, in their order."""
    parts = []
    for label in range(CLASSES):
        rows = table.filter(pc.equal(table["label"], label))
        parts.append(rows.slice(0, round(rows.num_rows * IMBALANCE ** (-label / (CLASSES - 1)))))
    return pa.concat_tables(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    table = images()
    labels_N = table["label"].to_numpy()
    for percent in NOISE:
        table = table.append_column(f"label_{percent}", pa.array(noisy(labels_N, percent)))
    pq.write_table(table, folder / "digits.parquet")
    fewer = imbalanced(table)
    pq.write_table(fewer, folder / "imbalanced.parquet")
    counts = [pc.sum(pc.equal(fewer["label"], label)).as_py() for label in range(CLASSES)]
    print(f"{folder}: {table.num_rows} images; imbalanced: {fewer.num_rows}, by class {counts}")


if __name__ == "__main__":
    main()
