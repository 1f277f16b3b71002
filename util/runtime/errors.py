"""Errors that a person reads as one line, and the one place that prints them: every command ends through `run_main`."""

from __future__ import annotations

import atexit
import contextlib
import difflib
import errno
import io
import multiprocessing
import os
import re
import signal
import sys
import traceback
import unicodedata
from collections.abc import Callable, Iterable
from typing import NoReturn

import torch.distributed as dist

RUN_ERROR_STATUS = 1
USER_ERROR_STATUS = 2  # argparse and tyro exit with 2 as well, so that scripts see one status for bad input
REQUEUE_STATUS = 75  # EX_TEMPFAIL: saved and stopped before the end, run the same command again
INTERRUPT_STATUS = 130  # what shells report after Ctrl-C


class UserError(ValueError):
    """A wrong flag, file or data set: the message is one line that names the flag, its value and the fix."""


class RunError(RuntimeError):
    """A run that cannot continue though its input was right, for example because it diverged: one line says why."""


class Requeue(Exception):
    """The run was asked to stop before its end, and has saved: the message says why, where, and how to continue."""


# --------------------------------------------------------------------------------------------------------
# Text on a terminal
# --------------------------------------------------------------------------------------------------------


def printable(text: str, keep: str = "") -> str:
    """Escape control and format characters except those in `keep`; any script stays as it is.

    Names of files, classes and tensors may hold escape sequences, by which a terminal would move the cursor, rename the
    window or hide text.
    """
    unsafe = ("Cc", "Cf", "Cs", "Zl", "Zp")  # also characters that reverse the direction of the text around them
    keep += "\u200c\u200d"  # joiners, with which Persian, Indian scripts and emoji are written
    return "".join(
        character.encode("unicode_escape").decode()
        if unicodedata.category(character) in unsafe and character not in keep
        else character
        for character in text
    )


def one_line(text: str) -> str:
    """Return the text on one line, `printable`."""
    return printable(" ".join(text.split()))


def nearest(name: str, known: Iterable[str]) -> str:
    """Return `, did you mean X?` for the known name most like `name`, or nothing if none is similar."""
    match = difflib.get_close_matches(name, list(known), n=1)
    return f", did you mean {match[0]}?" if match else ""


def exit_with_error(program: str, message: str, status: int) -> NoReturn:
    """Print `program: error: message` as one line on stderr and exit."""
    print(f"{program}: error: {one_line(message)}", file=sys.stderr)
    raise SystemExit(status)


# --------------------------------------------------------------------------------------------------------
# Causes that lie in the machine
# --------------------------------------------------------------------------------------------------------

# Text of an error -> cause and cure. The text decides, as errors of loader workers arrive without their errno.
CAUSES = {
    r"Too many open files": "too many files are open: raise the limit (ulimit -n 65536), or use fewer --num_workers",
    r"(?i)CUDA out of memory|CUDA error: out of memory": "the GPU is out of memory: use a smaller --batch_size with a"
    " larger --accum_iter, or --checkpoint_activations",
    r"(?i)can(no|')t allocate memory|not enough memory|MemoryError": "this machine is out of memory: use a smaller"
    " --batch_size, fewer --num_workers or --cache none",
    r"shared memory|/torch_\d|/dev/shm": "shared memory is full: make /dev/shm larger (in Docker: --shm-size 8g), or"
    " use --num_workers 0",
    r"No space left on device|Disk quota exceeded": "the disk is full: free some space and run the same command again;"
    " checkpoints that were written before are intact",
    r"(?i)address already in use": "MASTER_PORT is taken by another program: give torchrun another --master_port",
    r"(?i)\bgloo\b|NCCL error|Connection (closed|reset) by peer|Dist(Network|Store|Backend)Error": "another process of"
    " the run has ended or hangs, and its own message says why; if it hangs, see --loader_timeout",
}
CURES = {
    errno.EPIPE: "the program that reads our output has ended; write to a file to keep all of it",
    errno.ENOENT: "was the folder deleted or renamed in the meantime?",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ENOTDIR: "was the folder replaced in the meantime?",
    errno.EISDIR: "a folder lies where a file is expected; move it away",
    errno.EACCES: "change its permissions, or choose another place",
    errno.EROFS: "the file system is read-only; choose another place",
}

LOADERS_DEATH = "DataLoader"  # the start of our own messages about a data loader worker that died or hung
_LOADERS_DEATH = re.compile(rf"{LOADERS_DEATH}: |DataLoader worker \(pid|DataLoader timed out")  # and of torch's


def loaders_death(error: BaseException) -> BaseException | None:
    """Return the error about a data loader worker that died or hung, if `error` is one or follows from one.

    torch raises it wherever the program happens to be, so other errors may lie over it, such as an unfinished file.
    """
    cause: BaseException | None = error
    while cause is not None and not _LOADERS_DEATH.match(str(cause)):
        cause = cause.__cause__ or cause.__context__
    return cause


def explain(error: BaseException) -> str | None:
    """Return cause and cure of an error that lies in the machine, None for any other: that is a bug of ours."""
    death = loaders_death(error) if isinstance(error, RuntimeError) else None
    if death is not None:
        kill_loaders()
    elif not isinstance(error, OSError | MemoryError | RuntimeError):
        return None
    text = f"{type(error).__name__}: {error}" if death is None else str(death)
    detail = text.strip().splitlines()[-1]  # an error of a data loader worker ends with its own message
    for pattern, cure in CAUSES.items():
        if re.search(pattern, text):
            return f"{cure} ({detail})"
    if death is not None:
        return f"a data loader worker died or hung: {death}; see --loader_timeout"
    if isinstance(error, OSError) and error.errno is not None:
        place = f" ({os.fsdecode(error.filename)})" if isinstance(error.filename, str | bytes) else ""
        return f"{error.strerror}{place}: {CURES.get(error.errno, 'check the disk or the network behind it')}"
    return None


def kill_loaders() -> None:
    """Kill the processes of torch's DataLoaders: one that hangs would be waited for at the exit, for ever."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would raise
    for loader in multiprocessing.active_children():
        loader.kill()


def ignore_unfinished_loaders() -> None:
    """Print no traceback when Python deletes a DataLoader that could not start all of its processes."""
    previous = sys.unraisablehook

    def hook(unraisable: sys.UnraisableHookArgs) -> None:
        if "DataLoaderIter" not in repr(unraisable.object):
            previous(unraisable)

    sys.unraisablehook = hook


# --------------------------------------------------------------------------------------------------------
# The end of every command
# --------------------------------------------------------------------------------------------------------


def run_main(program: str, main: Callable[[], None]) -> None:
    """Run a script's main with errors of one line, see `call_main`; one process of several then ends at once."""
    try:
        call_main(program, main)
    except SystemExit as end:
        if not dist.is_initialized():
            raise
        end_at_once(end)


def call_main(program: str, main: Callable[[], None]) -> None:
    """Call a script's main and turn each error into one line on stderr and an exit status.

    UserError gives status 2, Requeue 75, Ctrl-C 130, RunError and a fault of the machine (`explain`) 1. Any other error
    is a bug of ours: its traceback is followed by a line that says what to report.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # names that the encoding lacks are printed with escapes
            stream.reconfigure(errors="backslashreplace")
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # see util/runtime/before_torch.py
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        main()
        sys.stdout.flush()  # else a closed pipe would be met while Python shuts down
    except UserError as error:
        # from a data loader worker it comes wrapped in that process's traceback, its own message last
        exit_with_error(program, str(error).rpartition(f"{UserError.__name__}: ")[2], USER_ERROR_STATUS)
    except RunError as error:
        exit_with_error(program, str(error), RUN_ERROR_STATUS)
    except Requeue as stop:
        print(f"{program}: {one_line(str(stop))}", file=sys.stderr)
        raise SystemExit(REQUEUE_STATUS) from None
    except KeyboardInterrupt:
        kill_loaders()
        print(f"{program}: stopped by Ctrl-C", file=sys.stderr)
        raise SystemExit(INTERRUPT_STATUS) from None
    except Exception as error:
        if isinstance(error, BrokenPipeError):
            discard_stdout()
        message = explain(error)
        if message is not None:
            ignore_unfinished_loaders()
            exit_with_error(program, message, RUN_ERROR_STATUS)
        traceback.print_exc()
        attach = "the lines above, the command, and the run's config.yaml and run.json"
        exit_with_error(program, f"this is a bug; please open an issue of this project with {attach}", RUN_ERROR_STATUS)


def discard_stdout() -> None:
    """Send what stdout still holds nowhere: its reader is gone, and Python would complain while it shuts down."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def end_at_once(end: SystemExit) -> NoReturn:
    """End this process of several with its exit status, without Python's shutdown.

    During that, a thread of gloo that gives a tensor back ends the process by SIGABRT, and schedulers would see neither
    "wrong input" nor "requeue". Leaving the process group first would mean waiting for ranks that may hang.
    """
    status = end.code
    if isinstance(status, str):
        print(status, file=sys.stderr)
        status = RUN_ERROR_STATUS
    atexit._run_exitfuncs()  # data loader workers are ended, files closed
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status or 0)
