#!/usr/bin/env bash
# pyarrow 26.0.1, FileInfo of a local file whose name is not UTF-8 (a photograph from a disk with Latin-1 names).
#
# One would guess: Python's own convention, surrogateescape, so that the name can be read, compared and opened again, as
# from os.listdir; or an error from the listing.
#
# What happens: the listing succeeds and counts the file, and `path` and `base_name` of that one entry raise
# UnicodeDecodeError, far from the call that listed the folder and without naming the folder. The entry's raw name cannot
# be had at all, and a path with surrogates as os.listdir gives it is refused too (UnicodeEncodeError).
#
# Output seen:
#   os.listdir: ['caf\udce9.txt'], opened: 2 bytes
#   listed: 1 entry, size 2
#   base_name: UnicodeDecodeError
#   path: UnicodeDecodeError
#   get_file_info of os.listdir's name: UnicodeEncodeError
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q pyarrow==26.0.1
mkdir "$folder/data"
echo x > "$folder/data/"$'caf\xe9.txt'
"$folder/venv/bin/python" - "$folder/data" <<'PYTHON'
import os
import sys

from pyarrow import fs


def error_of(call):
    try:
        call()
    except UnicodeError as error:
        return type(error).__name__
    return "no error"


folder = sys.argv[1]
local = fs.LocalFileSystem()
(name,) = os.listdir(folder)
print(f"os.listdir: [{ascii(name)}], opened: {len(open(os.path.join(folder, name), 'rb').read())} bytes")
(info,) = local.get_file_info(fs.FileSelector(folder))
print("listed: 1 entry, size", info.size)
errors = {
    "base_name": error_of(lambda: info.base_name),
    "path": error_of(lambda: info.path),
    "get_file_info of os.listdir's name": error_of(lambda: local.get_file_info(os.path.join(folder, name))),
}
for what, error in errors.items():
    print(f"{what}: {error}")
assert list(errors.values()) == ["UnicodeDecodeError", "UnicodeDecodeError", "UnicodeEncodeError"]
PYTHON
