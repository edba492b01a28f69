"""The result files of all runs in a store."""

from __future__ import annotations

from collections.abc import Iterator

import pyarrow as pa
import pyarrow.fs

from cast_ray.runtime.store.artifacts import ArtifactStore, read_each


def stored_results(store: ArtifactStore) -> Iterator[tuple[str, bytes]]:
    """Gives the place (path or URI) and the content of each result.json, several of which are read at a time."""
    fs, root = store._fs
    selector = pa.fs.FileSelector(f"{root}/runs", recursive=True, allow_not_found=True)
    paths = [i.path[len(root) + 1 :] for i in fs.get_file_info(selector) if i.base_name == "result.json"]
    for path, content in zip(paths, read_each(store.find_bytes, paths)):
        if content:
            yield store.uri(path), content
