#!/usr/bin/env bash
# Makes the base images of the Dockerfiles and of the compose file where no registry can be reached:
# Debian's packages under the same names. Images that exist or can be pulled are left alone.
# Needs root, debootstrap, a network with Debian's packages, and a Docker engine.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly MIRROR=${MIRROR:-http://deb.debian.org/debian}
readonly CERTIFICATES=/etc/ssl/certs/ca-certificates.crt
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

has() { docker image inspect "$1" > /dev/null 2>&1 || docker pull --quiet "$1" 2> /dev/null; }

# debian SUITE PACKAGES: a root file system in $work/SUITE. It trusts what this machine trusts, for
# a network whose proxy has certificates of its own.
debian() {
  [[ -d $work/$1 ]] && return
  debootstrap --variant=minbase --include="$2" "$1" "$work/$1" "$MIRROR" "${3:-$1}" > "$work/$1.log" \
    || { tail -n 20 "$work/$1.log" >&2; return 1; }
  install -D -m 644 "$CERTIFICATES" "$work/$1$CERTIFICATES"
  rm -rf "$work/$1/var/cache/apt/archives" "$work/$1/var/lib/apt/lists"
  mkdir -p "$work/$1/var/lib/apt/lists/partial"
}

# image NAME SUITE [CHANGE...]: imports a root file system under a name.
image() {
  local name=$1 suite=$2 changes=()
  shift 2
  for change in "$@"; do changes+=(--change "$change"); done
  tar -C "$work/$suite" -c . | docker import "${changes[@]}" - "$name" > /dev/null
  echo "$name: a stand-in of Debian $suite"
}

trusting=("ENV PIP_CERT=$CERTIFICATES" "ENV SSL_CERT_FILE=$CERTIFICATES")

for name in $(sed -n 's/^FROM \(python:[^ ]*\).*/\1/p' docker/Dockerfile docker/Dockerfile.cpu | sort -u); do
  has "$name" && continue
  debian bookworm python3,python3-venv,python-is-python3,ca-certificates
  image "$name" bookworm "${trusting[@]}"
done

# The compose file's other images. Their files belong to the users that the real images have.
nginx=$(sed -n 's/.* image: \(nginxinc\/.*\)/\1/p' docker/docker-compose.yml)
prometheus=$(sed -n 's/.* image: \(prom\/.*\)/\1/p' docker/docker-compose.yml)
forky() { debian forky nginx-light,prometheus,wget,ca-certificates sid; }
if ! has "$nginx"; then
  forky
  image "$nginx" forky 'USER 101:101' 'ENTRYPOINT ["nginx"]' 'CMD ["-g", "daemon off;"]'
fi
if ! has "$prometheus"; then
  forky
  install -d -o 65534 -g 65534 "$work/forky/prometheus"
  image "$prometheus" forky 'USER 65534' 'ENTRYPOINT ["/usr/bin/prometheus"]'
fi

# vLLM's image: its package for CPUs, so that it also runs here.
vllm=$(sed -n 's/^FROM \(vllm\/.*\)/\1/p' docker/Dockerfile)
if ! has "$vllm"; then
  docker build --quiet --tag "$vllm" --file - . << DOCKERFILE > /dev/null
FROM $(sed -n 's/^FROM \(python:[^ ]*\) AS build/\1/p' docker/Dockerfile.cpu)
RUN apt-get update && apt-get install --yes --no-install-recommends libnuma1
COPY requirements requirements
RUN python -m venv /opt/uv \
 && /opt/uv/bin/pip install --no-cache-dir --require-hashes -r requirements/uv.txt \
 && ln -s /opt/uv/bin/uv /usr/local/bin/uv
ENV UV_BREAK_SYSTEM_PACKAGES=1 UV_COMPILE_BYTECODE=1
RUN uv pip install --system --no-cache --no-deps --require-hashes --no-build -r requirements/cpu.txt
DOCKERFILE
  echo "$vllm: a stand-in with vLLM for CPUs"
fi
