#!/usr/bin/env bash
# pyarrow 26.0.1, LocalFileSystem.get_file_info(FileSelector(folder)).
#
# One would guess: a listing names everything that os.listdir names, a link that leads nowhere with FileType.NotFound
# (which get_file_info gives when it is asked for that path), and a recursive listing either follows no linked folders
# (as os.walk) or enters each folder once (as find -L, which reports the loop).
#
# What happens: a link that leads nowhere is left out of the listing without a word, so that a count of the listing is
# not a count of the folder. A recursive listing follows a link to the folder itself until the kernel refuses (40 links),
# then stops without an error: a folder of one file lists it 41 times.
#
# Output seen:
#   os.listdir: ['a.txt', 'lost', 'loop']
#   listed: ['a.txt', 'loop']
#   asked for the lost link: NotFound
#   recursive: 41 times a.txt, 41 files in all
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q pyarrow==26.0.1
mkdir "$folder/data"
echo x > "$folder/data/a.txt"
ln -s gone "$folder/data/lost"
ln -s . "$folder/data/loop"
"$folder/venv/bin/python" - "$folder/data" <<'PYTHON'
import os
import sys

from pyarrow import fs

folder = sys.argv[1]
local = fs.LocalFileSystem()
named = sorted(os.listdir(folder), key=["a.txt", "lost", "loop"].index)
listed = sorted(info.base_name for info in local.get_file_info(fs.FileSelector(folder)))
asked = local.get_file_info(f"{folder}/lost").type
files = [i.base_name for i in local.get_file_info(fs.FileSelector(folder, recursive=True)) if i.is_file]
print("os.listdir:", named)
print("listed:", listed)
print("asked for the lost link:", asked.name)
print(f"recursive: {files.count('a.txt')} times a.txt, {len(files)} files in all")
assert listed == ["a.txt", "loop"] and asked == fs.FileType.NotFound
assert files.count("a.txt") == len(files) == 41
PYTHON
