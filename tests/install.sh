#!/bin/sh
# Installs Postgres and Redis where they are missing, for the throw-away servers of the demo and the tests, and each
# program that is named as an argument and has a package of its own name. Those servers are private ones on free ports:
# the services that Debian makes of the packages are neither used nor needed.
set -eu

missing=
has() { command -v "$1" >/dev/null 2>&1 || ls /usr/lib/postgresql/*/bin/"$1" >/dev/null 2>&1; }
if ! { has postgres && has pgbench && has psql; }; then missing="postgresql"; fi
has cc || missing="$missing gcc libc6-dev"
for program in redis-server openssl "$@"; do
    has "$program" || missing="$missing $program"
done
[ -n "$missing" ] || exit 0

if ! command -v apt-get >/dev/null; then
    echo "Missing: $missing. Install by this system's own means and try again." >&2
    exit 1
fi
as_root=
if [ "$(id -u)" -ne 0 ]; then
    as_root=sudo
    if ! command -v sudo >/dev/null; then
        echo "Missing: $missing. As root: apt-get install --no-install-recommends $missing" >&2
        exit 1
    fi
fi
echo "Installing with apt-get: $missing"
$as_root apt-get update -q
# shellcheck disable=SC2086 # a list of packages
$as_root env DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends $missing
