#!/usr/bin/env bash
# pytest-xdist 3.8.0 under pytest 9.2.0 and 8.4.2: `--dist loadgroup` with tests that are marked `xdist_group`.
#
# One would guess: tests of one group run in one worker process, or the two versions refuse each other. pip installs them
# together, and the option is accepted. Suites that keep tests with a GPU, a port or a cluster apart rely on it.
#
# What happens: under pytest 8.4.2 the group runs in one process. Under 9.2.0 the marks have no effect and nothing is said:
# xdist writes the group into a private attribute of each test's id, which pytest no longer reads, so every test goes to
# whichever worker is free.
#
# Output seen:
#   pytest 8.4.2: 12 tests of one group ran in 1 process
#   pytest 9.2.0: 12 tests of one group ran in 2 processes
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/test_group.py" <<'PYTHON'
import os
import time
from pathlib import Path

import pytest


@pytest.mark.xdist_group("one")
@pytest.mark.parametrize("number", range(12))
def test_which_process(number):
    Path(os.environ["SEEN"], str(os.getpid())).touch()
    time.sleep(0.2)
PYTHON
for version in 8.4.2 9.2.0; do
  python3 -m venv "$folder/$version"
  "$folder/$version/bin/pip" install -q "pytest==$version" pytest-xdist==3.8.0
  mkdir "$folder/seen-$version"
  SEEN="$folder/seen-$version" "$folder/$version/bin/python" -m pytest -q -p no:cacheprovider -n 2 --dist loadgroup \
    "$folder/test_group.py" > "$folder/log-$version" || { cat "$folder/log-$version"; exit 1; }
  count=$(find "$folder/seen-$version" -type f | wc -l)
  echo "pytest $version: 12 tests of one group ran in $count process$([ "$count" = 1 ] || echo es)"
done
[ "$(find "$folder/seen-8.4.2" -type f | wc -l)" = 1 ]
[ "$(find "$folder/seen-9.2.0" -type f | wc -l)" = 2 ]
