"""Reads a folder (local or s3://) that holds one folder of image files per class; writes nothing."""

from __future__ import annotations

import posixpath
from collections.abc import Iterable, Iterator

import pyarrow as pa

from cca_core.config import ConfigError, SourceConfig
from cca_core.sources.base import LISTING, RawImage
from cca_core.sources.files import IMAGE_EXTENSIONS, find_files, open_folder, read_files


class FolderSource:
    """The class is the first folder below the root; deeper folders are part of the image's id only."""

    def __init__(self, config: SourceConfig) -> None:
        self._uri = config.uri

    def list(self) -> tuple[pa.Table, tuple[str, ...]]:
        found = find_files(self._uri, IMAGE_EXTENSIONS)
        files = {file.relative: file for file in found if "/" in file.relative}
        class_names = tuple(sorted({_class_of(relative) for relative in files}))
        self._check(bool(found), class_names)

        ids = _image_ids(files)
        order = sorted(files, key=ids.__getitem__)
        labels = {name: label for label, name in enumerate(class_names)}
        columns = {
            "image_id": [ids[relative] for relative in order],
            "uri": [files[relative].uri for relative in order],
            "location": order,
            "label": [labels[_class_of(relative)] for relative in order],
            "stamp": [files[relative].stamp for relative in order],
        }
        return pa.table(columns, schema=LISTING), class_names

    def _check(self, any_image: bool, class_names: tuple[str, ...]) -> None:
        if not any_image:
            raise ConfigError(
                f"no image file found in {self._uri}: put {', '.join(IMAGE_EXTENSIONS)} files into one folder per class"
            )
        if not class_names:
            raise ConfigError(
                f"{self._uri} has images but no class folders: move the images of each class into a folder of its own"
            )
        if len(class_names) == 1:
            raise ConfigError(
                f"{self._uri} has only one class folder, {class_names[0]}, and CCA needs at least "
                "two classes: add another, or, if the class folders are inside it, add it to source.uri"
            )

    def read(self, listing: pa.Table) -> Iterator[RawImage]:
        fs, folder = open_folder(self._uri)
        yield from read_files(fs, folder, listing)


def _class_of(relative: str) -> str:
    return relative.split("/", 1)[0]


def _image_ids(relatives: Iterable[str]) -> dict[str, str]:
    """Relative path -> id: the path without extension, or the whole path where that is taken already.

    A file comes before those whose stem is its whole path ("a.jpg" before "a.jpg.png"), so ids are unique.
    """

    def preference(relative: str) -> tuple[str, int, str]:
        stem, extension = posixpath.splitext(relative)
        return stem, IMAGE_EXTENSIONS.index(extension.lower()), relative

    ids: dict[str, str] = {}
    taken: set[str] = set()
    for relative in sorted(relatives, key=preference):
        stem = posixpath.splitext(relative)[0]
        ids[relative] = relative if stem in taken else stem
        taken.add(ids[relative])
    return ids
