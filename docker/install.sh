#!/bin/sh
# Installs medseg with its hospital node from the folder this is run in: install.sh VIRTUAL_ENVIRONMENT cpu|cuda
# The same steps in a container and on a bare Debian: needs python3 (3.11 or newer) with venv, and a package index.
set -eu
environment=$1
case $2 in
  # the CPU build is a tenth of the size; it has an index of its own
  cpu) torch="--extra-index-url https://download.pytorch.org/whl/cpu" ;;
  cuda) torch="" ;;
  *) echo "install.sh: $2 found, expected cpu or cuda" >&2; exit 2 ;;
esac
python3 -m venv "$environment"
# shellcheck disable=SC2086  # an option and its value are two words
"$environment/bin/python" -m pip install --constraint constraints.txt ${INSTALL_OPTIONS-$torch} ".[hospital]"
"$environment/bin/medseg" models
"$environment/bin/medseg-hospital" --help >/dev/null
