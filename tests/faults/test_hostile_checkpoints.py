"""Checkpoints that announce what they do not hold: refused in one line by every program that reads one.

Each file is drawn from a seed: a good checkpoint with one thing wrong. docs/FAULTS.md, row 46.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import random
import resource
import shlex
import signal
import struct
import sys
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest
import torch

import main_finetune
import main_linprobe
import main_pretrain
import main_segment
import scripts.analyze as analyze
import scripts.convert as convert
import scripts.probe as probe
import scripts.report as report
import scripts.robustness as robustness
import scripts.visualize as visualize
from shared.calls import script_caller
from shared.flags import TINY, TINY_CLASSIFIER, TINY_SEGMENTER
from shared.images import write_images, write_masked
from shared.runs import complete, pretraining_lines, write_run
from util.runtime.errors import run_main

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="limits memory by /proc and rlimit")]

SECONDS = 20  # for one call: far more than it takes, far less than a hang on a busy machine
MEMORY = 3 * 2**30  # bytes beyond what the process has
HUGE = (10**12, 2**31, 10**30, -5, 0)
JUNK = ("x", -1, 10**30, float("nan"), None, [1, [2]], {"a": {}}, (3,), True, "\x1b[31m", [float("inf")])


class Hostile(NamedTuple):
    """A file with one thing wrong."""

    name: str
    path: Path
    refused_by: str  # `all`: by whatever reads its weights; `some`: harmless where that thing is not read


# ---- files -------------------------------------------------------------------------------------------------


def stretched(rng: random.Random, tensor: torch.Tensor) -> torch.Tensor:
    """Return one number under a huge shape."""
    shape = list(tensor.shape)
    shape[rng.randrange(tensor.ndim)] = rng.choice((10**9, 3 * 10**8 + 1, 10**12))
    return torch.zeros(1).as_strided(shape, [0] * len(shape))


KINDS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "sparse": lambda x: x.to_sparse(),
    "meta": lambda x: x.to("meta"),
    "quantised": lambda x: torch.quantize_per_tensor(x, 1.0, 0, torch.quint8),
    "integers": lambda x: x.to(torch.int64),
    "complex": lambda x: x.to(torch.complex64),
    "booleans": lambda x: x.bool(),
    "nan": lambda x: torch.full_like(x, float("nan")),
    "infinity": lambda x: torch.full_like(x, float("inf")),
    "empty": lambda x: x[:0],
    "no dimension": lambda x: x.sum(),
    "more dimensions": lambda x: x[None, None],
}


def with_tensor(good: dict, name: str, tensor: torch.Tensor | None) -> dict:
    """Return the checkpoint with another tensor in student and momentum encoder, or (None) without it."""
    changed = dict(good)
    for key, prefix in (("model", ""), ("model_ema", "ema.")):
        changed[key] = {n: x for n, x in good[key].items() if n != prefix + name}
        if tensor is not None and prefix + name in good[key]:
            changed[key][prefix + name] = tensor
    return changed


def renamed(good: dict, old: str, new: object) -> dict:
    """Return the checkpoint with names of the encoder that begin with `old` changed."""
    rename = lambda n: (new + n[len(old) :] if isinstance(new, str) else new) if n.startswith(old) else n  # noqa: E731
    return good | {"model": {rename(n): x for n, x in good["model"].items()}}


def nested(depth: int, make: Callable[[object], object]) -> object:
    """Containers inside each other."""
    inner: object = {}
    for _ in range(depth):
        inner = make(inner)
    return inner


def drawn(rng: random.Random, good: dict) -> Iterator[tuple[str, object, str]]:
    """Name, contents for torch.save, and who must refuse them."""
    encoder = [n for n in good["model"] if n.startswith(("blocks.", "patch_embed.proj.w", "pos_embed", "cls_token"))]
    for turn in range(4):
        name = rng.choice(encoder)
        yield f"stretched-{turn}", with_tensor(good, name, stretched(rng, good["model"][name])), "all"
    for kind, make in KINDS.items():
        name = rng.choice(encoder)
        yield f"kind-{kind.replace(' ', '_')}", with_tensor(good, name, make(good["model"][name])), "all"
    yield "patch-0", with_tensor(good, "patch_embed.proj.weight", torch.zeros(96, 1, 0, 0)), "all"
    for side in (65, 3000):
        kernel = torch.zeros(1).as_strided((96, 1, side, side), (0, 0, 0, 0))
        kernel = torch.zeros(1, 1, side, side).expand(96, -1, -1, -1).contiguous() if side < 100 else kernel
        yield f"patch-{side}", with_tensor(good, "patch_embed.proj.weight", kernel), "all"
    for number in (10**9, int("9" * 400)):
        extra = {f"blocks.{number}.attn.qkv.weight": torch.zeros(1)}
        yield f"block-{len(str(number))}-digits", good | {"model": good["model"] | extra}, "some"
    yield "prefix", renamed(good, "blocks.0.", "module." * 10_000 + "blocks.9."), "some"
    yield "number-for-name", renamed(good, "norm.bias", 5), "all"
    yield "escapes-in-name", renamed(good, "cls_token", "\x1b]0;title\x07cls_token"), "all"
    for turn in range(8):
        key = rng.choice(list(good["config"]))
        value = rng.choice((*JUNK, *HUGE))
        yield f"setting-{turn}-{key}", good | {"config": good["config"] | {key: value}}, "some"
    for key, value in (("decoder_depth", 10**7), ("head_mlp_dim", 10**12), ("input_size", [800_000, 800_000])):
        yield f"setting-huge-{key}", good | {"config": good["config"] | {key: value}}, "some"
    for key in ("updates", "optimizer", "scaler", "binding_settings", "model", "model_ema", "config", "best_metric"):
        yield f"{key}-junk", good | {key: rng.choice(JUNK[:4])}, "some"
        yield f"{key}-lacking", {name: value for name, value in good.items() if name != key}, "some"
    moments = {i: {n: x[..., None] for n, x in s.items()} for i, s in good["optimizer"]["state"].items()}
    yield "moments", good | {"optimizer": good["optimizer"] | {"state": moments}}, "some"
    yield "deep", nested(200, lambda x: [x]), "all"
    yield "list", [good], "all"
    own: dict = {}
    own["model"] = own
    yield "holds-itself", own, "all"


class Code:
    """Runs a command when it is unpickled the ordinary way."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def raw(folder: Path, good: Path, touched: Path) -> None:
    """Files that torch.save does not write."""
    content = good.read_bytes()
    (folder / "truncated.pth").write_bytes(content[: len(content) // 2])
    (folder / "nothing.pth").write_bytes(b"")
    (folder / "text.pth").write_text("hello")
    (folder / "code.pth").write_bytes(pickle.dumps({"model": Code(touched)}))
    torch.save({"model": Code(touched)}, folder / "code-in-zip.pth")
    os.mkfifo(folder / "pipe.pth")
    (folder / "folder.pth").mkdir()
    for name, pickled in (("dicts", b"\x80\x02" + b"}X\x01\0\0\0m" * 150_000 + b"N" + b"s" * 150_000 + b"."),
                          ("tuples", b"\x80\x02N" + b"\x85" * 500_000 + b".")):  # fmt: skip
        with zipfile.ZipFile(folder / f"{name}.pth", "w") as archive:
            archive.writestr("a/data.pkl", pickled)
            archive.writestr("a/version", "3\n")
    with zipfile.ZipFile(folder / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", bytes(2**28))
        archive.writestr("a/version", "3\n")
    headers = {
        "header-length": struct.pack("<Q", 2**63),
        "no-json": struct.pack("<Q", 4) + b"xxxx",
        "brackets": struct.pack("<Q", 100_000) + b"[" * 100_000,
    }
    shapes = {"shape": [10**9, 10**9], "overflow": [2**63, 2**63], "empty": [1, 0, 96]}
    for name, shape in shapes.items():
        offsets = [0, 0] if name == "empty" else [0, 4]
        text = json.dumps({"pos_embed": {"dtype": "F32", "shape": shape, "data_offsets": offsets}}).encode()
        headers[name] = struct.pack("<Q", len(text)) + text + b"0000"[: offsets[1]]
    for name, header in headers.items():
        (folder / f"{name}.safetensors").write_bytes(header)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """classes/ of images, and scenes/ of images with masks."""
    root = tmp_path_factory.mktemp("data")
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            write_images(root / "classes" / split / name, 6)
        write_masked(root / "scenes" / "images" / split, root / "scenes" / "masks" / split, 4)
    (root / "scenes" / "classes.json").write_text(json.dumps({"class_names": ["brick", "grass", "sky", "void"]}))
    return root


@pytest.fixture(scope="module")
def files(tmp_path_factory, data) -> list[Hostile]:
    """Write all of them, from a checkpoint of a pre-training of one update."""
    folder = tmp_path_factory.mktemp("hostile")
    run = folder / "run"
    with pytest.MonkeyPatch.context() as patched:
        flags = f"{TINY} --max_steps 1 --data_path {data / 'classes'} --output_dir {run}"
        patched.setattr(sys, "argv", ["main_pretrain.py", *shlex.split(flags)])
        run_main("main_pretrain.py", main_pretrain.main)
    (path,) = run.glob("checkpoint-*.pth")
    good = torch.load(path, weights_only=True)
    (folder / "made").mkdir()
    raw(folder / "made", path, folder / "made" / "touched")
    hostile = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # quantised tensors are deprecated
        for name, contents, refused_by in drawn(random.Random(0), good):
            torch.save(contents, folder / "made" / f"{name}.pth")
            hostile.append(Hostile(name, folder / "made" / f"{name}.pth", refused_by))
    names = {each.path for each in hostile}
    others = [path for path in sorted((folder / "made").iterdir()) if path not in names]
    return [Hostile("good", path, "none"), *hostile, *(Hostile(path.stem, path, "all") for path in others)]


# ---- programs ----------------------------------------------------------------------------------------------

PRETRAIN = f"{TINY} --max_steps 1 --data_path CLASSES"
CLASSIFIER = f"{TINY_CLASSIFIER} --max_steps 1 --data_path CLASSES"
SEGMENTER = f"{TINY_SEGMENTER} --max_updates 1 --warmup_updates 0 --data_path SCENES"
PROGRAMS: dict[str, tuple[ModuleType, str, str]] = {
    # name: (program, flags, what it makes of the good file)
    "pretrain init": (main_pretrain, f"{PRETRAIN} --init_from FILE --output_dir OUT", "works"),
    "pretrain resume": (main_pretrain, f"{PRETRAIN} --resume FILE --output_dir OUT", "works"),
    "pretrain elastic": (main_pretrain, f"{PRETRAIN} --elastic --resume FILE --output_dir OUT", "works"),
    "finetune": (main_finetune, f"{CLASSIFIER} --finetune FILE --output_dir OUT", "works"),
    "finetune resume": (main_finetune, f"{CLASSIFIER} --resume FILE --output_dir OUT", "refuses"),
    "finetune eval": (main_finetune, f"{CLASSIFIER} --eval --resume FILE --output_dir OUT", "refuses"),
    "linprobe": (main_linprobe, f"{CLASSIFIER} --finetune FILE --output_dir OUT", "works"),
    "segment": (main_segment, f"{SEGMENTER} --finetune FILE --output_dir OUT", "works"),
    "segment eval": (main_segment, f"{SEGMENTER} --eval --finetune FILE --output_dir OUT", "refuses"),
    "probe": (probe, "FILE --labels_per_class 2 --repeats 1 --no_logistic --device cpu --output_dir OUT", "works"),
    "analyze": (
        analyze, "attention --checkpoint FILE --dataset digits --show 1 --most_images 2 --device cpu --output_dir OUT",
        "works",
    ),
    "visualize": (
        visualize, "FILE --show 1 --target pixels --data_path CLASSES --device cpu --output OUT/x.png", "works",
    ),
    "convert timm": (convert, "FILE --to timm --output OUT/x.safetensors", "works"),
    "convert mae": (convert, "FILE --to mae --output OUT/x.pth", "works"),
    "analyze timm": (
        analyze, "attention --checkpoint timm:vit_tiny_patch16_224=FILE --dataset digits --show 1 --most_images 2"
        " --device cpu --output_dir OUT", "refuses",
    ),
    "robustness timm": (
        robustness, "timm:vit_tiny_patch16_224=FILE --data_root CLASSES --device cpu --output_dir OUT", "refuses",
    ),
    "robustness": (robustness, "FILE --data_root CLASSES --device cpu --output_dir OUT", "refuses"),
}  # fmt: skip


@contextlib.contextmanager
def bounded():
    """End a hang, and leave no memory to allocate what a file announces."""

    def late(*_):
        raise TimeoutError(f"more than {SECONDS} s")

    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = signal.signal(signal.SIGALRM, late), resource.getrlimit(resource.RLIMIT_AS)
    signal.alarm(SECONDS)
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, before[1][1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before[1])
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before[0])


@pytest.mark.parametrize("program", PROGRAMS)
def test_hostile_files_are_one_line(program, files, data, tmp_path, monkeypatch, capsys):
    script, flags, good = PROGRAMS[program]
    call = script_caller(monkeypatch, capsys, tmp_path, script)
    flags = flags.replace("CLASSES", str(data / "classes")).replace("SCENES", str(data / "scenes"))
    wrong = []
    for number, hostile in enumerate(files):
        output = tmp_path / f"out-{number}"
        begin = time.monotonic()
        try:
            with bounded():
                status, _, message = call(flags.replace("FILE", str(hostile.path)).replace("OUT", str(output)))
        except Exception as error:
            wrong.append(f"{hostile.name}: {type(error).__name__}: {str(error)[:200]}")
            continue
        errors = [line for line in message.splitlines() if ": error: " in line]
        expected = {"none": (0,) if good == "works" else (1, 2), "all": (1, 2), "some": (0, 1, 2)}[hostile.refused_by]
        if status not in expected or len(errors) != (status != 0) or "Traceback" in message:
            wrong.append(f"{hostile.name}: status {status} after {time.monotonic() - begin:.1f} s: {message[-300:]}")
    assert not wrong, "\n".join(wrong)
    assert not (files[-1].path.parent / "touched").exists()


def test_a_report_on_runs_with_hostile_checkpoints(files, tmp_path, monkeypatch, capsys):
    call = script_caller(monkeypatch, capsys, tmp_path, report)
    chosen = [each for each in files if each.refused_by == "all" and each.path.suffix == ".pth" and each.path.is_file()]
    for hostile in chosen:
        run = write_run(tmp_path / hostile.name, pretraining_lines(2, 4))
        (run / "checkpoint-1.pth").write_bytes(hostile.path.read_bytes())
        complete(run / "checkpoint-1.pth", epoch=1, step=8)
        with bounded():
            status, _, message = call(f"{run} --device cpu --output {tmp_path / 'page.html'}")
        assert status == 0, (hostile.name, message)
        assert "checkpoint-1.pth" in (tmp_path / "page.html").read_text(encoding="utf-8")
