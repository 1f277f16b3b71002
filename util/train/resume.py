"""Which checkpoint a run resumes from, and what it must share with the run that wrote it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from torch.utils.data import IterableDataset

from util.config.same_run import NAMES
from util.data.sources import ImageSource, fingerprint
from util.runtime.distributed import from_all_ranks, is_main, world_size
from util.runtime.errors import UserError
from util.runtime.files import writable_folder
from util.weights.checkpoint import CheckpointStore, checkpoints_in, load_checkpoint
from util.weights.run_state import check_resumable


def store_of(config: Any) -> CheckpointStore:
    """Return the checkpoints in --output_dir, locked against other runs. A folder that does not exist is not made.

    Raises:
        UserError: a folder that exists cannot be written, or another run writes there.
    """
    path = Path(config.output_dir)
    store = CheckpointStore(path, config.keep_last, config.keep_every, "best" in config.save_periods)
    if path.exists():
        writable_folder(path, "output_dir")
        if is_main():
            store.lock()
    return store


def lock_output(config: Any, store: CheckpointStore) -> None:
    """Make --output_dir and --log_dir, and lock the former against other runs, just before files are written.

    Raises:
        UserError: a folder cannot be written, or another run writes there.
    """
    writable_folder(config.output_dir, "output_dir")
    if config.log_dir:
        writable_folder(config.log_dir, "log_dir")
    if is_main():
        store.lock()


def settings_to_share(config: Any, source: ImageSource) -> dict[str, Any]:
    """Return the settings and the data's fingerprint that a resumed run must share with its checkpoint."""
    settings = config.resume_settings(len(source)) | {NAMES: fingerprint(source)}
    if isinstance(source, IterableDataset):  # a stream deals its parts to the workers
        settings["num_workers"] = config.resolved_num_workers
    return settings


def checkpoint_to_resume(config: Any, store: CheckpointStore) -> dict[str, Any] | None:
    """Return the checkpoint that --resume or --auto_resume asks for; None begins a fresh run.

    Raises:
        UserError: no checkpoint is intact, the folder holds some and none was asked for, --resume goes back behind
            those in the folder, or the ranks do not see the same one.
    """
    checkpoint = find_checkpoint(config, store)
    updates = dict.fromkeys(from_all_ranks(None if checkpoint is None else checkpoint.get("updates", 0)))
    if len(updates) > 1:
        each = " and ".join("nothing" if n is None else f"a checkpoint after update {n}" for n in updates)
        where = f"--resume {config.resume}" if config.resume else f"--output_dir {config.output_dir}"
        raise UserError(f"{where}: the processes find {each}; it must be one and the same for all nodes")
    return checkpoint


def find_checkpoint(config: Any, store: CheckpointStore) -> dict[str, Any] | None:
    """Return the checkpoint that this rank sees; see `checkpoint_to_resume`."""
    start_flag = "--finetune" if hasattr(config, "finetune") else "--init_from"
    if config.resume:
        checkpoint = load_checkpoint(Path(config.resume), flag="--resume")
        check_resumable(checkpoint, f"--resume {config.resume}", start_flag)
        # later checkpoints of an abandoned branch would count as the newest of this run
        later = [path.name for path, m in store.list(with_best=True) if m.step > checkpoint.get("updates", 0)]
        if later:
            raise UserError(
                f"--resume {config.resume}: --output_dir {config.output_dir} holds what was trained after it"
                f" ({', '.join(later)}); delete these, or choose another folder"
            )
        return checkpoint
    newest = store.load_latest()
    if newest is None:
        return None
    checkpoint, path = newest
    if not config.auto_resume:
        raise UserError(
            f"--output_dir {config.output_dir}: holds {path.name} of an earlier run;"
            " add --auto_resume to resume it, or choose another folder"
        )
    check_resumable(checkpoint, f"--auto_resume {path}", start_flag)
    return checkpoint


def resumes(config: Any) -> bool:
    """True where a checkpoint will replace the weights that a run starts from; their file may be gone by then."""
    return bool(config.resume) or (config.auto_resume and bool(checkpoints_in(Path(config.output_dir))))


def share_saved_batch(config: Any) -> Any:
    """Return, with --elastic, settings whose batch size and accumulation keep the images of the saved run's update.

    Raises:
        UserError: the images cannot be shared out among these processes.
    """
    if not config.elastic:
        return config
    store = CheckpointStore(Path(config.output_dir), config.keep_last, config.keep_every, keep_best=False)
    saved = load_checkpoint(Path(config.resume)) if config.resume else (store.load_latest() or ({},))[0]
    images = saved.get("binding_settings", {}).get("effective batch")
    if images is None or images == config.effective_batch:
        return config
    batch_size, accum_iter = share_batch(images, world_size(), config.batch_size, "--elastic")
    return dataclasses.replace(config, batch_size=batch_size, accum_iter=accum_iter)


def share_batch(images: int, processes: int, most: int, flag: str) -> tuple[int, int]:
    """Return batch_size (at most `most`) and accum_iter with which all processes see `images` images per update.

    Raises:
        UserError: naming `flag`, where the images cannot be shared out.
    """
    if images % processes:
        raise UserError(f"{flag}: the {images} images of an update cannot be shared by {processes} processes")
    share = images // processes
    batch_size = max(n for n in range(1, min(most, share) + 1) if share % n == 0)
    return batch_size, share // batch_size
