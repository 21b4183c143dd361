# SPDX-License-Identifier: Apache-2.0
# Call 2, and the first step of every call that carries something: park what lies in work/gpu-kit/ outside of the tree,
# where later calls find it, and say what is there. A call with nothing to park says so and ends with an error.
set -euo pipefail
case "${1:-}" in
-h | --help)
  sed -n '2,3s/^# //p' "$0"
  exit 0
  ;;
esac
from=$(cd "$(dirname "$0")/../.." && pwd)/work/gpu-kit
room=${TMPDIR:-/tmp}/hidden-transfer-gpu
if ! ls "$from"/*.part? >/dev/null 2>&1; then
  echo "call 2: there is no part in work/gpu-kit to park: name one in carry." >&2
  exit 1
fi
mkdir -p "$room"
mv "$from"/*.part? "$room"/
ls -l "$room"
df -h "$room" | tail -1
