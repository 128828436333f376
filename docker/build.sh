#!/bin/sh
# Builds an image with docker, podman or buildah, whichever works here, and writes its bill of materials.
#
#   sh docker/build.sh cpu           guanaco:cpu from docker/Dockerfile.cpu
#   sh docker/build.sh gpu           guanaco:gpu from docker/Dockerfile
#
# BUILDER=podman            this one and no other
# BASE=localhost/debian12   another base image: a Debian or Ubuntu with Python 3.11 or newer
# TORCH="torch==2.13.0 …"   what pip installs as torch
# ARGS="--volume …"         further arguments of the builder
set -eu
cd "$(dirname "$0")/.."
kind=${1:-}
case $kind in
cpu) file=docker/Dockerfile.cpu ;;
gpu) file=docker/Dockerfile ;;
*) echo "say cpu or gpu: sh docker/build.sh cpu" >&2; exit 2 ;;
esac

works() { # the docker command may be there without its daemon
  case $1 in
  docker) docker info >/dev/null 2>&1 ;;
  *) command -v "$1" >/dev/null ;;
  esac
}

builder=${BUILDER:-}
for one in docker podman buildah; do
  [ -n "$builder" ] || ! works "$one" || builder=$one
done
[ -n "$builder" ] || { echo "no builder: install docker (and start it), podman or buildah" >&2; exit 1; }
# Images in OCI's format have no health check: podman and buildah must be told to write docker's.
case $builder in
docker) set -- docker build ;;
podman) set -- podman build --format docker ;;
buildah) set -- buildah build --format docker ;;
*) echo "BUILDER=$builder: this must be docker, podman or buildah" >&2; exit 2 ;;
esac
[ -z "${BASE:-}" ] || set -- "$@" --build-arg "BASE_IMAGE=$BASE"
[ -z "${TORCH:-}" ] || set -- "$@" --build-arg "TORCH=$TORCH"
revision=$(git rev-parse HEAD 2>/dev/null || echo unknown)
# shellcheck disable=SC2086 # ARGS holds several words
set -- "$@" --build-arg "REVISION=$revision" --file "$file" --tag "guanaco:$kind" ${ARGS:-} .
echo "== $*"
"$@"

mkdir -p build
sbom=build/guanaco-$kind.cdx.json
inside=/usr/share/doc/guanaco/sbom.cdx.json
if [ "$builder" = buildah ]; then
  container=$(buildah from --pull-never "guanaco:$kind")
  trap 'buildah rm "$container" >/dev/null' EXIT
  cat "$(buildah mount "$container")$inside" >"$sbom"
  buildah umount "$container" >/dev/null
else # a container that never starts: some build machines may not run any
  container=$("$builder" create "guanaco:$kind")
  trap '"$builder" rm "$container" >/dev/null' EXIT
  "$builder" cp "$container:$inside" "$sbom"
fi
echo "== bill of materials: $sbom"
"$builder" images "guanaco:$kind"
