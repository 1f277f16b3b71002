"""The one reader of checkpoint files. No code in a file is run, and nothing is allocated because a file announces it.

Sizes and kinds are checked here for every tensor; what a run's own state must hold is checked in run_state.py.
"""

from __future__ import annotations

import argparse
import re
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from util.runtime.errors import UserError, printable
from util.runtime.files import IS_LFS_POINTER, LFS_POINTER

# `args` of other programs may hold paths; Python 3.13 moved their class into pathlib._local
PATHS = [type("PosixPath", (PurePosixPath,), {"__module__": module}) for module in ("pathlib", "pathlib._local")]

MOST_PICKLED = 8 * 2**20  # bytes of names, shapes and settings; a ViT-H with its optimiser has less than 1 MiB
MOST_DEPTH = 32  # containers inside each other; an optimiser's state has 4
MOST_CONTAINERS = 100_000  # dicts or lists in a pickle
TOO_DEEP = f"holds more than {MOST_DEPTH} containers inside each other, is it a checkpoint?"
NESTED = re.compile(rb"([\x85-\x87(\[\]{}])\1{255}")  # opcodes of containers, without anything between them
SHOWN = 6  # names in a message


def read_checkpoint(path: Path, where: str) -> dict[str, Any]:
    """Read a .pth or .safetensors file of any program onto the CPU.

    The tensors of a .safetensors file are returned under `state_dict`, its metadata under `metadata`.

    Args:
        where: flag and path, which begin every message.

    Raises:
        UserError: the file is damaged, is no checkpoint, holds code, or a tensor is not what it announces.
    """
    with path.open("rb") as file:
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            raise UserError(f"{where}: is {IS_LFS_POINTER}")
    try:
        state = read_safetensors(path) if path.suffix == ".safetensors" else read_pickle(path, where)
    except UserError:
        raise
    except SafetensorError as error:
        raise UserError(f"{where}: is no intact safetensors file ({error})") from error
    except Exception as error:  # torch and pickle raise nearly anything for a file that is not theirs
        reason = "it holds code, and none of it was run" if "Unsupported global" in str(error) else type(error).__name__
        raise UserError(f"{where}: cannot be read as a checkpoint ({reason}); is it another file?") from error
    if not isinstance(state, dict):
        raise UserError(f"{where}: holds a {type(state).__name__}, not a checkpoint")
    check_tensors(state, path.stat().st_size, where)
    return state


def read_safetensors(path: Path) -> dict[str, Any]:
    """Read the tensors under `state_dict`, and the texts of the header under `metadata`."""
    with safe_open(path, "pt") as file:
        return {"state_dict": {name: file.get_tensor(name) for name in file.keys()}, "metadata": file.metadata() or {}}  # noqa: SIM118


def read_pickle(path: Path, where: str) -> Any:
    """Read a file of torch.save, with torch's list of harmless types alone."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            check_archive(archive, path.stat().st_size, where)
    with torch.serialization.safe_globals([argparse.Namespace, *PATHS]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of kinds of tensors that are refused just after
        return torch.load(path, map_location="cpu", weights_only=True)


def check_archive(archive: zipfile.ZipFile, size: int, where: str) -> None:
    """Raise UserError if a zip file of `size` bytes would unpack to more, or its pickle is too long or deep."""
    members = archive.infolist()
    if sum(member.file_size for member in members) > size:
        raise UserError(f"{where}: unpacks to more than its {size} bytes, torch.save writes no such file")
    for member in members:
        if member.filename.endswith("data.pkl") and member.file_size > MOST_PICKLED:
            raise UserError(
                f"{where}: describes its tensors in {member.file_size} bytes, more than the {MOST_PICKLED} allowed;"
                " save the weights alone"
            )
        if member.filename.endswith("data.pkl") and is_nested(archive.read(member)):
            raise UserError(f"{where}: {TOO_DEEP}")


def is_nested(pickled: bytes) -> bool:
    """True if a pickle makes so many containers that unpickling would take seconds before their depth is known."""
    return NESTED.search(pickled) is not None or max(pickled.count(opcode) for opcode in b"}]") > MOST_CONTAINERS


def check_tensors(state: dict[str, Any], size: int, where: str) -> None:
    """Raise UserError if a tensor is sparse, quantised or on meta, or announces more numbers than the file holds."""
    storages: dict[int, int] = {}
    for name, tensor in all_tensors(state, where):
        kind = unusual_kind(tensor)
        if kind:
            raise UserError(f"{where}: {short_name(name)} is a {kind} tensor, save it as an ordinary one")
        storage = tensor.untyped_storage()
        if tensor.numel() * tensor.element_size() > storage.nbytes():
            raise UserError(
                f"{where}: {short_name(name)} announces the shape {list(tensor.shape)} but holds {storage.nbytes()}"
                " bytes; save it with .contiguous()"
            )
        storages[storage.data_ptr()] = storage.nbytes()
    if sum(storages.values()) > size:
        raise UserError(f"{where}: its tensors announce {sum(storages.values())} bytes, but the file has {size}")


def unusual_kind(tensor: Tensor) -> str:
    """Return `sparse`, `quantised` or `meta`, or an empty text for a tensor of numbers in memory."""
    if tensor.is_quantized:
        return "quantised"
    if tensor.layout is not torch.strided:
        return "sparse"
    return "" if tensor.device.type == "cpu" else tensor.device.type


def all_tensors(state: dict[str, Any], where: str) -> Iterator[tuple[str, Tensor]]:
    """Yield each tensor in nested containers with its name; each container is entered once, so that cycles end.

    Raises:
        UserError: the containers are nested too deeply.
    """
    pending: list[tuple[str, Any, int]] = [("", state, 0)]
    entered: set[int] = set()
    while pending:
        name, value, depth = pending.pop()
        if isinstance(value, Tensor):
            yield name, value
            continue
        if isinstance(value, argparse.Namespace):
            value = vars(value)
        if not isinstance(value, dict | list | tuple | set) or id(value) in entered:
            continue
        if depth == MOST_DEPTH:
            raise UserError(f"{where}: {TOO_DEEP}")
        entered.add(id(value))
        items = value.items() if isinstance(value, dict) else enumerate(value)
        pending += [(f"{name}.{key}" if name else str(key), each, depth + 1) for key, each in items]


def short_name(name: object, most: int = 100) -> str:
    """Return a text from a file as one line of at most `most` characters, without control characters."""
    text = str(name)
    text = text if len(text) <= most else f"{text[: most * 2 // 3]}...{text[-most // 4 :]}"
    return printable(text)


def shortened(names: list[str], most: int = SHOWN) -> str:
    """Return the first few names, and the number of the others."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(short_name, names[:most])) + more
