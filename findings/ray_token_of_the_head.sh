#!/usr/bin/env bash
# Ray 2.60.0: the command that `ray start --head` prints for adding a node fails where a token was ever made.
#
# Once `ray get-auth-token --generate` has been run, or a program has made ~/.ray/auth_token, `ray start --head` turns
# token authentication on by itself, and prints `ray start --address=...` as the next step. The guess: that command joins,
# since the token is in the home folder of the same user. Seen: it runs without the token ("RAY_AUTH_MODE is currently
# 'disabled'") and exits with 1; with RAY_AUTH_MODE=token it joins. Clusters made by scripts of earlier releases stop
# working by a file that nobody looks at.
#
# Installs pinned packages in a temporary folder, starts a head and a node there, and fails if the behaviour is another.
set -euo pipefail
folder=$(mktemp -d)
ray=("$folder/env/bin/ray")
export HOME="$folder" RAY_TMPDIR="$folder"
unset RAY_AUTH_MODE RAY_AUTH_TOKEN RAY_ADDRESS
trap '"${ray[@]}" stop --force >/dev/null 2>&1 || true; rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet --disable-pip-version-check ray==2.60.0
"${ray[@]}" --version
"${ray[@]}" get-auth-token --generate >/dev/null
small=(--num-cpus=1 --object-store-memory=80000000 --disable-usage-stats)
address=$(hostname -I | cut -d' ' -f1)
said=$("${ray[@]}" start --head --port=6399 --node-ip-address="$address" --include-dashboard=false "${small[@]}" 2>&1)
grep -F "Token authentication is enabled" <<<"$said"
next=$(grep -o "ray start --address='[^']*'" <<<"$said")
echo "the head says: $next"
words=$(tr -d "'" <<<"${next#ray }")
code=0
# shellcheck disable=SC2086
refused=$("${ray[@]}" $words "${small[@]}" 2>&1) || code=$?
echo "as it says: exit code $code"
grep -o "RAY_AUTH_MODE is currently 'disabled'" <<<"$refused" | head -1
# shellcheck disable=SC2086
RAY_AUTH_MODE=token "${ray[@]}" $words "${small[@]}" >/dev/null 2>&1
echo "with RAY_AUTH_MODE=token: exit code 0"
[ "$code" = 1 ] || { echo "the behaviour is another now"; exit 1; }
