"""Reads a folder (local or s3://) that holds one folder of image files per class; writes nothing."""

from __future__ import annotations

import posixpath
from collections.abc import Iterator

import pyarrow as pa

from cca_core.config import ConfigError
from cca_core.sources.base import FoundRows, RawImage, Source
from cca_core.sources.files import IMAGE_EXTENSIONS, find_files, no_file, open_folder, read_files


class FolderSource(Source):
    """The class is the first folder below the root; deeper folders are part of the image's id only.

    The id is the path without extension; an image beside the class folders has no label.
    """

    def find(self) -> FoundRows:
        files = find_files(self.config, IMAGE_EXTENSIONS)
        folders = [file.relative.split("/", 1)[0] if "/" in file.relative else None for file in files]
        self._check(bool(files), {folder for folder in folders if folder})
        columns = {
            "image_id": [posixpath.splitext(file.relative)[0] for file in files],
            "uri": [file.uri for file in files],
            "location": [file.relative for file in files],
            "label": pa.array(folders, pa.string()),
            "stamp": [file.stamp for file in files],
            "error": ["" if folder else "no label: it lies in no class folder" for folder in folders],
        }
        return FoundRows(pa.table(columns), f"the class folders of {self.config.uri}")

    def _check(self, any_image: bool, folders: set[str]) -> None:
        uri = self.config.uri
        if not any_image:
            raise no_file(
                self.config, "image file", f"put {', '.join(IMAGE_EXTENSIONS)} files into one folder per class"
            )
        if not folders:
            raise ConfigError(
                f"{uri} has images but no class folders: move the images of each class into a folder of its own"
            )
        if len(folders) == 1:
            raise ConfigError(
                f"{uri} has only one class folder, {folders.pop()}, and CCA needs at least two classes: add another, "
                "or, if the class folders are inside it, add it to source.uri"
            )

    def read_rows(self, listing: pa.Table) -> Iterator[RawImage]:
        fs, folder = open_folder(self.config.uri)
        yield from read_files(fs, folder, listing)
