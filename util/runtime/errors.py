"""Exceptions that a person reads as one line, and the one place that prints them."""

from __future__ import annotations

import atexit
import difflib
import errno
import io
import multiprocessing
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, NoReturn

import torch.distributed as dist

if TYPE_CHECKING:
    pass

RUN_ERROR_STATUS = 1
USER_ERROR_STATUS = 2  # what argparse and tyro exit with, so that scripts see one status for bad input
REQUEUE_STATUS = 75  # EX_TEMPFAIL: saved and stopped before the end, run the same command again


class UserError(ValueError):
    """A wrong flag, file or data set: the message is one line naming the flag, its value and the fix.

    Anything else that is raised is a bug of ours and keeps its traceback.
    """


class RunError(RuntimeError):
    """A run that cannot go on though its input was right: diverged, out of disk. One line says what and why."""


class Requeue(Exception):
    """The run stopped before its end because it was asked to, and has saved: the message says why and where."""


def exit_with_error(program: str, message: str, status: int) -> NoReturn:
    """Print `program: error: message` as one line on stderr and exit."""
    print(f"{program}: error: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(status)


LOADERS_DEATH = "DataLoader"  # what our own messages of it begin with
_LOADERS_DEATH = re.compile(rf"{LOADERS_DEATH}: |DataLoader worker \(pid|DataLoader timed out")  # and torch's


def loaders_death(error: BaseException) -> BaseException | None:
    """What was raised when a process of torch's DataLoader died or hung, if that is what `error` comes from.

    It is raised wherever the program stands, so that other errors may lie over it: a file left unfinished, say.
    """
    found: BaseException | None = error
    while found is not None and not _LOADERS_DEATH.match(str(found)):
        found = found.__cause__ or found.__context__
    return found


def kill_loaders() -> None:
    """End what torch's DataLoaders have left: one that hangs would be waited for at the exit, for ever."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would raise
    for loader in multiprocessing.active_children():
        loader.kill()


def end_at_once(error: Exception | SystemExit) -> NoReturn:
    """End this process of several with the status that the error asks for, without Python's shutdown.

    While that goes on, a thread of gloo that gives a tensor back ends the process by SIGABRT: a scheduler or a launcher
    would then see neither "wrong input" nor "requeue". To leave the process group first would be to wait for ranks
    that may hang.
    """
    status = error.code if isinstance(error, SystemExit) else RUN_ERROR_STATUS
    if not isinstance(error, SystemExit):
        traceback.print_exception(error)
    elif isinstance(status, str):
        print(status, file=sys.stderr)
        status = RUN_ERROR_STATUS
    atexit._run_exitfuncs()  # loader processes are ended, files closed
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status or 0)


def run_main(program: str, main: Callable[[], None]) -> None:
    """Run a script's main with errors of one line, see `call_main`; one process of several then ends at once."""
    try:
        call_main(program, main)
    except (Exception, SystemExit) as error:
        if not dist.is_initialized():
            raise
        end_at_once(error)


def call_main(program: str, main: Callable[[], None]) -> None:
    """Call a script's main; UserError, RunError and Requeue become one line on stderr, with status 2, 1 and 75.

    So do a full disk and the death of a loader process, wherever they are met (1). Names that no encoding knows are
    printed with escapes: a file may have one.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        main()
    except UserError as error:
        # from a loader process it comes wrapped in that process's traceback, its own message last
        exit_with_error(program, str(error).rpartition(f"{UserError.__name__}: ")[2], USER_ERROR_STATUS)
    except RunError as error:
        exit_with_error(program, str(error).rpartition(f"{type(error).__name__}: ")[2], RUN_ERROR_STATUS)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        place = f" ({error.filename})" if error.filename else ""
        said = f"{error.strerror}{place}; checkpoints are whole, free some space and go on from the last one"
        exit_with_error(program, said, RUN_ERROR_STATUS)
    except RuntimeError as error:
        death = loaders_death(error)
        if death is None:
            raise
        kill_loaders()
        exit_with_error(program, f"a loader process died or hung: {death}; see --loader_timeout", RUN_ERROR_STATUS)
    except Requeue as stop:
        print(f"{program}: {stop}", file=sys.stderr)
        raise SystemExit(REQUEUE_STATUS) from None


def nearest(name: str, known: Iterable[str]) -> str:
    """`, did you mean X?` for the known name most like `name`, or nothing where none is alike."""
    match = difflib.get_close_matches(name, list(known), n=1)
    return f", did you mean {match[0]}?" if match else ""
