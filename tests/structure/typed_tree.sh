#!/bin/sh
# Lay the packages out under their import names, as mypy wants to see them: typed_tree.sh FOLDER
set -eu
here=$(cd "$(dirname "$0")/../.." && pwd)
rm -rf "$1"
mkdir -p "$1/expertctl"
for folder in core experts merge plugins cli; do ln -s "$here/$folder" "$1/expertctl/$folder"; done
for file in "$here"/core/public/*; do ln -s "$file" "$1/expertctl/"; done
