"""Where Ray Train keeps its checkpoints: in the store, without the folders that an object store does not need.

Train makes a folder for every run and every checkpoint. On an object store that costs one request for the bucket and
one for each folder on the way to it, whose only effect is an empty object.
"""

from __future__ import annotations

from typing import Any

from pyarrow import NativeFile, fs

from cast_ray.common.paths import OBJECT_STORES, absolute, resolve


class WithoutFolders(fs.FileSystemHandler):
    """An object store's filesystem for `pyarrow.fs.PyFileSystem` that makes no folders; all else is passed on."""

    def __init__(self, filesystem: fs.FileSystem):
        self.filesystem = filesystem

    def __eq__(self, other: object) -> bool:
        return isinstance(other, WithoutFolders) and self.filesystem == other.filesystem

    def __ne__(self, other: object) -> bool:
        return not self == other

    def create_dir(self, path: str, recursive: bool) -> None:
        pass

    def get_type_name(self) -> str:
        return self.filesystem.type_name

    def normalize_path(self, path: str) -> str:
        return self.filesystem.normalize_path(path)

    def get_file_info(self, paths: list[str]) -> list[fs.FileInfo]:
        return self.filesystem.get_file_info(paths)

    def get_file_info_selector(self, selector: fs.FileSelector) -> list[fs.FileInfo]:
        return self.filesystem.get_file_info(selector)

    def delete_dir(self, path: str) -> None:
        self.filesystem.delete_dir(path)

    def delete_dir_contents(self, path: str, missing_dir_ok: bool = False) -> None:
        self.filesystem.delete_dir_contents(path, missing_dir_ok=missing_dir_ok)

    def delete_root_dir_contents(self) -> None:
        raise NotImplementedError("nothing deletes all buckets")

    def delete_file(self, path: str) -> None:
        self.filesystem.delete_file(path)

    def move(self, src: str, dest: str) -> None:
        self.filesystem.move(src, dest)

    def copy_file(self, src: str, dest: str) -> None:
        self.filesystem.copy_file(src, dest)

    def open_input_stream(self, path: str) -> NativeFile:
        return self.filesystem.open_input_stream(path)

    def open_input_file(self, path: str) -> NativeFile:
        return self.filesystem.open_input_file(path)

    def open_output_stream(self, path: str, metadata: Any) -> NativeFile:
        return self.filesystem.open_output_stream(path, metadata=metadata)

    def open_append_stream(self, path: str, metadata: Any) -> NativeFile:
        return self.filesystem.open_append_stream(path, metadata=metadata)


def train_storage(folder: str) -> dict[str, Any]:
    """Returns `storage_path` and, for an object store, `storage_filesystem` of `ray.train.RunConfig`.

    Args:
        folder: local path or URI.
    """
    filesystem, path = resolve(absolute(folder))
    if filesystem.type_name not in OBJECT_STORES:
        return {"storage_path": folder}
    return {"storage_path": path, "storage_filesystem": fs.PyFileSystem(WithoutFolders(filesystem))}
