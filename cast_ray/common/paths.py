"""Local paths and object-store URIs behind one pair of functions, through pyarrow.fs."""

from __future__ import annotations

import os
import posixpath
import re
from functools import lru_cache
from urllib.parse import SplitResult, quote, unquote, urlsplit

from pyarrow import ArrowInvalid, fs

from cast_ray.common.files import write_atomically
from cast_ray.common.outages import patiently

SINGLE_UPLOADS = "allow_delayed_open=true"
"""Option of pyarrow's S3 filesystem: a file is not opened in the store before its first 5 MB are full or it ends."""
OBJECT_STORES = ("s3", "gcs", "abfs")
"""Types of filesystems where making a folder costs a request and is of no use."""
_SCHEME = re.compile(r"^[A-Za-z][A-Za-z0-9+.-]+://")


def is_uri(path: str) -> bool:
    """Whether a path is a URI (`s3://...`) and not a local path, which may hold any of `: ? # %`."""
    return _SCHEME.match(path) is not None


def absolute(root: str) -> str:
    """A folder as every process can find it: URIs as they are, local paths made absolute."""
    return root if is_uri(root) else os.path.abspath(os.path.expanduser(root))


def resolve(uri: str) -> tuple[fs.FileSystem, str]:
    """The filesystem of a local path or URI, and the path inside it.

    Raises:
        ValueError: a URI that pyarrow.fs does not know; the message names it.
    """
    if not is_uri(uri):
        return _local(), uri
    parts = urlsplit(uri.replace("#", "%23"))  # an unescaped # belongs to the name: fragments mean nothing here
    try:
        filesystem, base = _filesystem(_unsplit(parts, "/"))
    except (ArrowInvalid, NotImplementedError, ImportError) as error:
        raise ValueError(f"{uri}: not a path or URI that can be read ({error})") from None
    return filesystem, posixpath.join(base, unquote(parts.path).lstrip("/"))


def local_path(place: str) -> str | None:
    """The path of a file or folder on this machine, which may be given as a `file://` URI; None of another URI.

    Raises:
        ValueError: a URI that pyarrow.fs does not know.
    """
    filesystem, path = resolve(place)
    return path if isinstance(filesystem, fs.LocalFileSystem) else None


def join(root: str, name: str) -> str:
    """The path or URI of a file below a folder; `name` is a plain file name, never percent-encoded."""
    if not is_uri(root):
        return os.path.join(root, name)
    parts = urlsplit(root.replace("#", "%23"))
    return _unsplit(parts, f"{parts.path.rstrip('/')}/{quote(name)}")


def below(root: str, *parts: str) -> str:
    """The path or URI of what lies below a folder; a URI's options (`?endpoint_override=...`) stay at its end."""
    place, mark, options = root.partition("?") if is_uri(root) else (root, "", "")
    return "/".join([place.rstrip("/"), *parts]) + mark + options


def parent_and_name(uri: str) -> tuple[str, str]:
    """The URI of the folder that holds a folder, with the same options, and the folder's name."""
    place, mark, options = uri.partition("?")
    parent, _, name = place.rstrip("/").rpartition("/")
    return parent + mark + options, unquote(name)


def in_few_requests(uri: str) -> str:
    """A URI with the option that has S3 take a small file by one request, where a multipart upload are three."""
    if not uri.startswith("s3://") or SINGLE_UPLOADS.partition("=")[0] in urlsplit(uri).query:
        return uri
    return f"{uri}{'&' if '?' in uri else '?'}{SINGLE_UPLOADS}"


def make_folder(filesystem: fs.FileSystem, path: str) -> None:
    """Makes a folder that may be there already; of an object store nothing, where it is only a part of names."""
    if filesystem.type_name not in OBJECT_STORES:
        filesystem.create_dir(path, recursive=True)


def read_bytes(uri: str, num_bytes: int | None = None) -> bytes:
    """The whole of one file, or its first `num_bytes`."""
    filesystem, path = resolve(uri)
    if isinstance(filesystem, fs.LocalFileSystem):
        with open(path, "rb") as file:  # builtin open tells a folder from a missing file; arrow does not
            return file.read(num_bytes)
    return read_object(filesystem, path, num_bytes)


def write_bytes(uri: str, content: bytes) -> None:
    """Writes one file so that a reader sees the old content or the new, never a part."""
    filesystem, path = resolve(uri)
    if isinstance(filesystem, fs.LocalFileSystem):
        write_atomically(path, content)
    else:
        write_object(filesystem, path, content)


def read_object(filesystem: fs.FileSystem, path: str, num_bytes: int | None = None) -> bytes:
    """The whole of one object of a store, or its first `num_bytes`; tried again while the store does not answer."""

    def read() -> bytes:
        with filesystem.open_input_stream(path) as stream:
            return stream.read(num_bytes)

    return patiently(read)


def write_object(filesystem: fs.FileSystem, path: str, content: bytes) -> None:
    """Writes one object of a store; tried again while the store does not answer."""

    def write() -> None:
        with filesystem.open_output_stream(path) as stream:  # an object appears when its upload completes
            stream.write(content)

    patiently(write)


def real(uri: str) -> str:
    """What a file or folder is known by, through however many links it was reached; object stores have no links."""
    filesystem, path = resolve(uri)
    return os.path.realpath(path) if isinstance(filesystem, fs.LocalFileSystem) else uri.rstrip("/")


def _unsplit(parts: SplitResult, path: str) -> str:
    # urlunsplit drops the // of schemes it does not know when there is no host (hdfs:///data)
    return f"{parts.scheme}://{parts.netloc}{path}{'?' if parts.query else ''}{parts.query}"


@lru_cache(maxsize=1)
def _local() -> fs.LocalFileSystem:
    return fs.LocalFileSystem()


@lru_cache(maxsize=16)
def _filesystem(prefix: str) -> tuple[fs.FileSystem, str]:
    return fs.FileSystem.from_uri(
        in_few_requests(prefix)
    )  # cached: a client for each of 100,000 images would cost seconds
