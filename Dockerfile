# SPDX-License-Identifier: Apache-2.0
#
# The image for Cloud Run: the server, the libraries that it loads, and a model's weights.
#
#     DOCKER_BUILDKIT=1 docker build --secret id=hf_token,env=HF_TOKEN -t gemma .
#
# Build arguments:
#   CUDA=1                            0: without the CUDA engine, for machines without a GPU
#   MODEL_NAME=google/gemma-3-1b-it   empty: without weights; they come by a volume on /model-cache
#   MODEL_REVISION=main               a commit of the model, to get the same weights for ever
#   HF_ENDPOINT=https://huggingface.co
#   COMMIT=                           what the server says of itself: COMMIT=$(git rev-parse --short HEAD)
#   BASE=debian:trixie-slim           Debian 13, or a copy of it in a registry of your own
#
# tests/image_test builds and tries this file on a machine that has no Docker.
ARG BASE=debian:trixie-slim

# [1] The compiler, and the server -----------------------------------------------------------------
FROM ${BASE} AS build
ARG CUDA=1
# nvidia-cuda-toolkit is in non-free; it is CUDA 12.4, whose programs run on every driver from 525
# on, so also on Cloud Run's L4 (535). cpp-httplib comes from backports, which has the newer one;
# apt takes a package from there only if it is told to.
RUN set -eu; \
    sed -i -e 's/^Components: .*/Components: main contrib non-free/' \
        -e '/^Suites: .*-updates/s/$/ trixie-backports/' /etc/apt/sources.list.d/debian.sources; \
    printf 'Package: libcpp-httplib*\nPin: release n=trixie-backports\nPin-Priority: 500\n' \
        >/etc/apt/preferences.d/cpp-httplib; \
    toolkit=; \
    [ "${CUDA}" = 0 ] || toolkit=nvidia-cuda-toolkit; \
    apt-get update -qq; \
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
        g++ cmake ninja-build pkg-config libcpp-httplib-dev libssl-dev nlohmann-json3-dev \
        libsentencepiece-dev libyaml-cpp-dev ${toolkit}; \
    apt-get clean; \
    rm -rf /var/lib/apt/lists/*
COPY . /source
ARG COMMIT=
# Cloud Run promises AVX2 and no more, which is x86-64-v3. /libraries gets what ldd names, and four
# libraries that glibc keeps, empty, for programs of old: the driver's libcuda.so.1 asks for them.
# Dates are taken from the package, or set to zero, so that the same libraries are the same layer.
RUN set -eu; \
    case $(uname -m) in x86_64) march=x86-64-v3 ;; *) march=armv8-a ;; esac; \
    cuda=AUTO; \
    [ "${CUDA}" != 0 ] || cuda=OFF; \
    cmake -S /source -B /build -G Ninja -DGEMMA_MARCH=$march -DGEMMA_CUDA=$cuda \
        -DGEMMA_COMMIT="${COMMIT}"; \
    ninja -C /build gemma-server; \
    strip -o /gemma-server /build/gemma-server; \
    libraries=$(ldd /gemma-server | sed -nE 's/^.*[[:space:]](\/[^ ]+) \(0x.*$/\1/p'); \
    libc=$(dirname "$(echo "$libraries" | grep '/libc\.so')"); \
    mkdir /libraries; \
    for library in $libraries $libc/libm.so.6 $libc/libdl.so.2 $libc/libpthread.so.0 $libc/librt.so.1; do \
        cp -pLu --parents "$library" /libraries; \
        package=$(dpkg-query -S "$(realpath "$library")" | cut -d : -f 1); \
        cp -pLu --parents "/usr/share/doc/$package/copyright" /libraries; \
    done; \
    cp /source/LICENSE /libraries/LICENSE; \
    touch -d @0 /libraries/LICENSE; \
    find /libraries -type d -exec touch -d @0 '{}' +

# [2] The weights ----------------------------------------------------------------------------------
# Nothing of the server is here: a change of the code leaves this stage, and its gigabytes, as they
# are. The token is a file while the command runs, and in no layer and no history afterwards.
FROM ${BASE} AS weights
RUN set -eu; \
    apt-get update -qq; \
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends ca-certificates curl; \
    apt-get clean; \
    rm -rf /var/lib/apt/lists/*
COPY tools/fetch /tools/fetch
ARG MODEL_NAME=google/gemma-3-1b-it
ARG MODEL_REVISION=main
ARG HF_ENDPOINT=https://huggingface.co
# Dates are set to zero, so that the same weights, fetched once more, are the same layer.
RUN --mount=type=secret,id=hf_token set -eu; \
    export HF_HOME=/weights/model-cache; \
    mkdir -p "$HF_HOME/hub"; \
    [ -z "${MODEL_NAME}" ] || bash /tools/fetch "${MODEL_NAME}" --revision "${MODEL_REVISION}"; \
    rm -rf "$HF_HOME/hub/.locks"; \
    chmod -R a+rX /weights; \
    find /weights -exec touch -h -d @0 '{}' +

# [3] The image ------------------------------------------------------------------------------------
# No shell, no package manager, no CUDA library. The largest layer comes first: what follows can
# change without it.
FROM scratch
COPY --from=weights /weights/ /
COPY --from=build /libraries/ /
COPY --from=build /gemma-server /gemma-server
ARG MODEL_NAME=google/gemma-3-1b-it
ARG COMMIT=
LABEL org.opencontainers.image.title="gemma.cu" \
    org.opencontainers.image.description="Gemma 3 over the OpenAI API" \
    org.opencontainers.image.licenses="Apache-2.0" \
    org.opencontainers.image.revision="${COMMIT}"
# libcuda.so.1 is the driver's, and the host puts it into the container: Cloud Run into
# /usr/local/nvidia/lib64, NVIDIA's container toolkit into /usr/lib64, or into the directory of the
# other libraries, where the loader looks by itself.
ENV HF_HOME=/model-cache \
    HF_HUB_OFFLINE=1 \
    MODEL_NAME=${MODEL_NAME} \
    MAX_MODEL_LEN= \
    PORT=8080 \
    LD_LIBRARY_PATH=/usr/local/nvidia/lib64:/usr/lib64
EXPOSE 8080
USER 1000:1000
ENTRYPOINT ["/gemma-server", "--gpu-memory-utilization=0.90"]
