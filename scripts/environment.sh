# Sourced by the other scripts: makes .venv beside the code from the requirements file given as the first argument,
# and again whenever that file or the constraints have changed. Set PYTHON to build it from another interpreter.
requirements=$1
# the oldest GPU decides: the newest torch has no kernels for those with a compute capability below 7.5
constraints=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null |
    awk '$1 + 0 > 0 && $1 < 7.5 { old = 1 } END { if (old) print "constraints-volta.txt" }' || true)
stamp=.venv/installed-$(basename "$requirements" .txt)-$(cat requirements*.txt $constraints | cksum | cut -d' ' -f1)
if [ ! -e "$stamp" ]; then
    echo "making .venv from $requirements $constraints (about 6 GB with the CUDA build of PyTorch; a minute or two)"
    "${PYTHON:-python3}" -m venv .venv
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -r "$requirements" ${constraints:+-c "$constraints"}
    touch "$stamp"
fi
