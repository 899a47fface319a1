#!/bin/sh
# A federation of three owners as real processes on loopback: they train on their own text and deliver their experts,
# the coordinator merges these with FlexOlmo and compares the models in a table.
#
#   sh examples/federation/run.sh [FOLDER]
#
# CORPORA   a folder with a folder for each owner (train.jsonl, valid.jsonl), of which the first three are used;
#           default: text that every installation has on its disk
# TOKENS    tokens per owner
# RECIPE    diloco or fedavg: train one shared model in ROUNDS rounds instead of merging experts; in the same FOLDER,
#           its row joins the table
set -eu
folder=${1:-federation-demo}
tokens=${TOKENS:-200000}
seed_tokens=${SEED_TOKENS:-400000}
recipe=${RECIPE:-flexolmo}
command=${EXPERTCTL:-expertctl}
mkdir -p "$folder"
folder=$(cd "$folder" && pwd)
here=$(cd "$(dirname "$0")" && pwd)
hub=$folder/hub
python=${PYTHON:-python3}

# A seed or experts of other settings would stand in the table under the same names.
settings="TOKENS=$tokens SEED_TOKENS=$seed_tokens CORPORA=${CORPORA:-}"
if [ -f "$folder/settings" ] && [ "$(cat "$folder/settings")" != "$settings" ]; then
    echo "$folder was made with $(cat "$folder/settings"), not with $settings: name another folder" >&2
    exit 1
fi
echo "$settings" >"$folder/settings"

# The coordinator: public text, a seed, and a door.
if [ ! -f "$hub/seed/seed.json" ]; then
    "$python" "$here/prepare.py" "$folder" --seed-tokens "$seed_tokens" ${CORPORA:+--corpora "$CORPORA"}
    $command -w "$hub" seed
fi
port=$("$python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
$command -w "$hub" federate serve --listen "127.0.0.1:$port" >"$folder/serve.log" 2>&1 &
serving=$!
joined=
# owners would wait for ever for a coordinator that is gone; their training goes on with the next run
trap 'kill $serving $joined 2>/dev/null || true; wait' EXIT
trap 'exit 1' INT TERM
until grep -q "owners can join" "$folder/serve.log"; do
    kill -0 $serving 2>/dev/null || { cat "$folder/serve.log"; exit 1; }
    sleep 1
done

# The owners: a key each, and text that stays where it is.
names=$(cat "$folder/owners")
for name in $names; do
    $command federate keys --state "$folder/owner-$name" >/dev/null
    $command -w "$hub" federate invite "$folder/owner-$name/owner.pub" --name "$name"
done
list=$(echo "$names" | tr ' ' ',')
case $recipe in
    diloco | fedavg) set -- --name "$recipe" --rounds "${ROUNDS:-5}" ;;
    *) set -- ;;
esac
[ -d "$hub/generalists/$recipe" ] || $command -w "$hub" federate ask --experts "$list" --recipe "$recipe" --tokens "$tokens" "$@"
echo "the owners train now, for some minutes unless they have delivered; how far they are: $command -w $hub federate status"
for name in $names; do
    $command federate join --server "127.0.0.1:$port" --ca "$hub/federation/network/certificates/ca.crt" \
        --data "$folder/private/$name.jsonl" --state "$folder/owner-$name" --name "$name" --yes --once >/dev/null &
    joined="$joined $!"
done
for one in $joined; do wait "$one"; done
$command -w "$hub" federate status

# What came of it. Only here, on one machine, can the owners' held-out text be looked at.
case $recipe in
    diloco | fedavg) while [ ! -f "$hub/generalists/$recipe/generalist.json" ]; do sleep 1; done ;;
    *) $command -w "$hub" merge campus --method flexolmo --force ;;
esac
$command -w "$hub" eval seed $(ls "$hub/experts" 2>/dev/null) $(ls "$hub/generalists")
