#!/bin/sh
# Removes what a running server never reads from a virtual environment: torch's headers and build files, and tests.
# pip stays: the server fetches the demo model with it.
#
#   sh docker/cut.sh /opt/guanaco
set -eu
packages=$(echo "$1"/lib/python3*/site-packages)
rm -rf "$packages"/torch/include "$packages"/torch/share "$packages"/torch/test
find "$packages/torch/bin" -type f ! -name torch_shm_manager -delete # `import torch` looks for this one
find "$packages" -name '*.a' -delete
find "$packages/numpy" "$packages/sympy" "$packages/networkx" "$packages/mpmath" -type d -name tests -prune -exec rm -rf {} +
