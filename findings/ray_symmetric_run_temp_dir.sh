#!/usr/bin/env bash
# Ray 2.60.0: `ray symmetric-run --address HOST:PORT --min-nodes 2 --temp-dir DIR -- COMMAND`, as on each node of a job.
#
# One would guess: the first node starts a head, waits for the second node in that cluster, and runs the command. Options
# of `ray start` such as --temp-dir are said to be supported.
#
# What happens: the head starts, but the first node then looks for it in Ray's default folder, where it is not, and starts
# a second Ray of its own, without a word of warning. It waits there for a second node, which never comes, although it has
# joined the head. Without --temp-dir, or with RAY_TMPDIR=DIR in its place, the node connects to its own head.
#
# Here the second node is left out: what counts is which Ray the first node waits in. All runs in a PID namespace of its
# own, with which it ends.
#
# Output seen:
#   --temp-dir: Started a local Ray instance
#   RAY_TMPDIR: Connecting to existing Ray cluster
set -euo pipefail
if [ "${1:-}" = inside ]; then
  folder=$2 way=$3
  export PATH=$folder/venv/bin:$PATH RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT=10
  ip link set lo up
  ip addr add 10.98.0.1/24 dev lo
  if [ "$way" = RAY_TMPDIR ]; then
    export RAY_TMPDIR=$folder/$way
    options=()
  else
    options=(--temp-dir "$folder/d")
  fi
  exec ray symmetric-run --address 10.98.0.1:6379 --min-nodes 2 "${options[@]}" -- true
fi
folder=$(mktemp -d /tmp/sym-XXXXXX)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q 'ray[default]==2.60.0' 2> /dev/null
for way in --temp-dir RAY_TMPDIR; do
  unshare --user --map-root-user --pid --net --fork --mount-proc --kill-child "$0" inside "$folder" "$way" \
    > "$folder/log$way" 2>&1 || true # a node without the second one gives up after 10 s
  seen=$(grep -oE 'Started a local Ray instance|Connecting to existing Ray cluster' "$folder/log$way" | head -1 || true)
  echo "$way: $seen"
  echo "$seen" >> "$folder/seen"
done
printf 'Started a local Ray instance\nConnecting to existing Ray cluster\n' | diff - "$folder/seen"
