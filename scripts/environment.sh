# Sourced by the other scripts: makes .venv beside the code from the requirements file given as the first argument,
# and again whenever that file has changed. Set PYTHON to build it from another interpreter than python3.
requirements=$1
stamp=.venv/installed-$(basename "$requirements" .txt)-$(cat requirements*.txt | cksum | cut -d' ' -f1)
if [ ! -e "$stamp" ]; then
    echo "making .venv from $requirements (about 6 GB with the CUDA build of PyTorch; a minute or two)"
    "${PYTHON:-python3}" -m venv .venv
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -r "$requirements"
    touch "$stamp"
fi
