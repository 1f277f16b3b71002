"""Submit a stage to SLURM, or run it in the background on this machine.

    python scripts/submit.py pretrain --ngpus 8 --partition gpu --job_dir RUN -- --recipe paper_vit_base --data_path IN
    python scripts/submit.py finetune --seeds 0 1 2 --grid "blr=5e-4,1e-3" -- --recipe finetune_vit_base --finetune PT
    python scripts/submit.py pretrain --cluster local --ngpus 0 --follow -- --recipe quickstart

The launcher's flags come before `--`, those of the stage (main_STAGE.py or scripts/probe.py) after it. A job that
meets its time limit, is preempted or loses a node is requeued and continues from its newest checkpoint. --dry_run
shows what would be submitted.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tyro.conf import Positional, UseAppendAction, arg

from util.cluster.code import copy_code, unused_folder
from util.cluster.launch import StageJob
from util.config.checks import check
from util.config.command_line import MAINS, flag_values, parse_config
from util.runtime.errors import UserError, nearest, run_main

if TYPE_CHECKING:  # submitit is imported where it is used: --help and a wrong flag should not wait for it
    from submitit import Job

    from util.cluster.jobs import Resources

QUEUE_FLAGS = ("partition", "account", "qos", "constraint", "exclude", "comment")


@dataclass(frozen=True)
class SubmitConfig:
    """Submit a stage: STAGE [these flags] -- [flags of the stage]."""

    stage: Annotated[Positional[str], arg(metavar="STAGE")]
    """pretrain, finetune, linprobe, segment or probe"""

    # processes
    nodes: int = 1
    """machines"""
    ngpus: int = 8
    """GPUs per node, one process per GPU; 0: run on CPUs, with --tasks_per_node processes"""
    tasks_per_node: int | None = None
    """processes per node of a run on CPUs; default: 1"""
    cpus_per_task: int | None = None
    """CPU cores per process; default: 10 with a GPU, else 1"""
    mem_gb: float | None = None
    """GB of memory per node; default: the cluster's"""

    # queue
    timeout: int = 1440
    """time limit in minutes, after which the job is requeued (SLURM only)"""
    signal_delay: int = 90
    """seconds before the time limit at which the job is told to save"""
    max_requeues: int = 50
    """most times that a job is requeued"""
    partition: str = ""
    """queue; default: the cluster's"""
    account: str = ""
    """account to charge"""
    qos: str = ""
    """quality of service"""
    constraint: str = ""
    """features that the nodes must have"""
    exclude: str = ""
    """nodes to avoid"""
    comment: str = ""
    """comment shown with the job; some clusters require one"""
    after: tuple[int, ...] = ()
    """numbers of jobs that must succeed before this one starts"""
    job_name: str = ""
    """name in squeue; default: lut-STAGE"""
    job_dir: str = ""
    """folder for logs, a copy of the code, and the run's --output_dir unless that is given; default: jobs/STAGE-DATE"""
    cluster: Literal["slurm", "local"] = "slurm"
    """local: a background process on this machine"""

    # software
    prologue: UseAppendAction[tuple[str, ...]] = ()
    """shell line to run before Python (module load, conda activate); can be repeated"""
    python: str = ""
    """interpreter of the job; default: this one, in a container python3"""
    container: str = ""
    """image for srun --container-image (needs pyxis); the job's folder and the current one are mounted in it"""
    container_mounts: tuple[str, ...] = ()
    """further mounts, as FROM:TO"""

    # several runs at once, each in a folder of its own
    seeds: tuple[int, ...] = ()
    """one run per seed"""
    grid: tuple[str, ...] = ()
    """one run per combination of values of the stage's flags: "blr=1e-3,2e-3" "mask_ratio=0.6,0.75" """
    array_parallelism: int = 256
    """most runs at the same time"""

    dry_run: bool = False
    """print the batch script and the commands, check the files that the runs read, submit nothing"""
    follow: bool = False
    """print the log as it grows, and exit with the job's status"""

    def __post_init__(self) -> None:
        if self.stage not in MAINS:
            raise UserError(f"STAGE {self.stage}: unknown{nearest(self.stage, MAINS)} (one of {', '.join(MAINS)})")
        for flag in ("nodes", "tasks_per_node", "cpus_per_task", "timeout", "array_parallelism"):
            value = getattr(self, flag)
            check(value is None or value >= 1, flag, value, "must be 1 or more")
        for flag in ("ngpus", "max_requeues", "signal_delay"):
            check(getattr(self, flag) >= 0, flag, getattr(self, flag), "must be 0 or more")
        check(self.mem_gb is None or self.mem_gb > 0, "mem_gb", self.mem_gb, "must be above 0")
        limit = 60 * self.timeout
        fix = f"must be less than the {limit} seconds of --timeout {self.timeout}, or the job is told to save at once"
        check(self.signal_delay < limit, "signal_delay", self.signal_delay, fix)
        fix = "a run on GPUs has one process per GPU, leave it out (or add --ngpus 0)"
        check(not (self.ngpus and self.tasks_per_node), "tasks_per_node", self.tasks_per_node, fix)
        check("%" not in self.job_dir, "job_dir", self.job_dir, "must not contain %")
        if self.stage == "probe":
            check(self.nodes == 1, "nodes", self.nodes, "probe runs in one process, leave it out")
            check(self.processes_per_node == 1, "ngpus", self.ngpus, "probe runs in one process, add --ngpus 1 or 0")
        if self.cluster == "local":
            check(self.nodes == 1, "nodes", self.nodes, "--cluster local has one node, leave it out")
            check(not (self.seeds or self.grid), "cluster", "local", "does one run, leave out --seeds and --grid")
            check(not self.container, "container", self.container, "needs --cluster slurm")
            check(not self.after, "after", self.after, "needs --cluster slurm")

    @property
    def processes_per_node(self) -> int:
        """Return the number of processes per node: one per GPU, or --tasks_per_node."""
        return self.ngpus or self.tasks_per_node or 1

    @property
    def processors(self) -> int:
        """Return the CPU cores per process: --cpus_per_task or its default."""
        return self.cpus_per_task or (10 if self.ngpus else 1)

    @property
    def interpreter(self) -> str:
        """Return --python or its default."""
        return self.python or ("python3" if self.container else sys.executable)


@dataclass(frozen=True)
class Run:
    """One run of the stage; the only run of a job that is no array has an empty name."""

    name: str
    flags: tuple[str, ...]
    settings: Any = None  # the flags as the stage's settings


def main() -> None:
    """Check both kinds of flags, copy the code, submit the job, and follow it if asked."""
    launcher_flags, stage_flags = split(sys.argv[1:])
    config = parse_config(SubmitConfig, launcher_flags, Path(__file__).name)
    job_dir = Path(config.job_dir or f"jobs/{config.stage}-{time.strftime('%Y%m%d-%H%M%S')}").absolute()
    code = unused_folder(job_dir)
    runs = plan_runs(config, stage_flags, job_dir)
    jobs = [stage_job(config, code, run) for run in runs]
    resources = resources_of(config, job_dir)
    if config.dry_run:
        show(config, resources, runs, jobs, job_dir, code)
        show_inputs(config, runs)
        return
    if config.cluster == "slurm":
        check_sbatch("cluster slurm", "use --cluster local")
    submitted = submit(config, resources, jobs, job_dir, code)
    report(config, runs, submitted)
    if config.follow:
        from util.cluster.jobs import follow

        try:
            status = follow(submitted, [run.name for run in runs])
        except KeyboardInterrupt:
            print("the job continues in the background", file=sys.stderr)
            status = 128 + signal.SIGINT
        raise SystemExit(status)


# --------------------------------------------------------------------------------------------------------
# Flags
# --------------------------------------------------------------------------------------------------------


def split(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Return the arguments before and after the first `--`; --help needs none."""
    if "--" in arguments:
        place = arguments.index("--")
        return arguments[:place], arguments[place + 1 :]
    if arguments and not {"-h", "--help"} & set(arguments):
        raise UserError("`--` is missing: STAGE [flags of the launcher] -- [flags of the stage, or nothing]")
    return arguments, []


def plan_runs(config: SubmitConfig, stage_flags: list[str], job_dir: Path) -> list[Run]:
    """Return the runs; the settings of each are parsed here, so that a mistake shows before the job is submitted.

    Raises:
        UserError: a flag is wrong, or two runs have the same name.
    """
    settings, program = MAINS[config.stage].settings, MAINS[config.stage].program
    os.environ["WORLD_SIZE"] = str(config.nodes * config.processes_per_node)  # the settings check the batch with it
    try:
        given = parse_config(settings, stage_flags, program)
        fix = "a requeued job would start from this file again; put it into --output_dir and leave this out"
        ends_soon = getattr(given, "eval", False) or not hasattr(given, "resume")
        check(ends_soon or not given.resume, "resume", getattr(given, "resume", ""), fix)
        named = any(flag.partition("=")[0].replace("-", "_") == "__output_dir" for flag in stage_flags)
        folder = Path(given.output_dir).absolute() if named else job_dir
        runs = []
        for name, flags in combinations(config, settings):
            shared = ["--output_dir", str(folder / name)]
            resume = [] if ends_soon or given.auto_resume else ["--auto_resume"]
            flags = (*stage_flags, *flags, *shared, *resume)
            runs.append(Run(name, flags, parse_config(settings, flags, program)))
    finally:
        del os.environ["WORLD_SIZE"]
    names = [run.name for run in runs]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"--grid and --seeds: {twice} comes twice, each run needs a folder of its own")
    return runs


def combinations(config: SubmitConfig, settings: type) -> list[tuple[str, list[str]]]:
    """Return name and flags of each point of --grid x --seeds; without either, one point with an empty name."""
    axes: list[list[tuple[str, list[str]]]] = []
    for axis in (*config.grid, *(["seed=" + ",".join(map(str, config.seeds))] if config.seeds else [])):
        axes.append(flag_values(axis, settings, "grid"))
    product = itertools.product(*axes)
    return [("-".join(name for name, _ in point), [flag for _, flags in point for flag in flags]) for point in product]


def stage_job(config: SubmitConfig, code: Path, run: Run) -> StageJob:
    """Return the function that the job calls for a run."""
    command = (config.interpreter, "-u", str(code / MAINS[config.stage].program), *run.flags)
    local = config.processes_per_node if config.cluster == "local" else 0
    return StageJob(command, os.getcwd(), config.processors, local, config.max_requeues)


def resources_of(config: SubmitConfig, job_dir: Path) -> Resources:
    """Return the resources that the job requests."""
    from util.cluster.jobs import Resources

    srun = ["--kill-on-bad-exit=1", f"--cpus-per-task={config.processors}"]  # srun does not take it from sbatch
    if config.container:
        mounts = [f"{folder}:{folder}" for folder in dict.fromkeys((str(job_dir), os.getcwd()))]
        mounts = ",".join([*mounts, *config.container_mounts])
        srun += [f"--container-image={config.container}", f"--container-mounts={mounts}"]
    return Resources(
        name=config.job_name or f"lut-{config.stage}",
        nodes=config.nodes,
        gpus_per_node=config.ngpus,
        tasks_per_node=config.processes_per_node,
        cpus_per_task=config.processors,
        mem_gb=config.mem_gb,
        minutes=config.timeout,
        signal_delay=config.signal_delay,
        max_requeues=config.max_requeues,
        array_parallelism=config.array_parallelism,
        queue={flag: getattr(config, flag) for flag in QUEUE_FLAGS if getattr(config, flag)},
        dependency=f"afterok:{':'.join(map(str, config.after))}" if config.after else "",
        prologue=config.prologue,
        interpreter=config.interpreter,
        srun=tuple(srun),
    )


# --------------------------------------------------------------------------------------------------------
# Runs that other scripts plan
# --------------------------------------------------------------------------------------------------------


def config_of_arrays(stage: str, launcher_flags: Sequence[str], processes: int | None) -> SubmitConfig:
    """Return the settings after `--submit --` of a script that plans the runs itself.

    Args:
        processes: the value of its own --processes.
    """
    config = parse_config(SubmitConfig, [stage, *launcher_flags], "submit.py")
    check(config.cluster == "slurm", "cluster", config.cluster, "runs on this machine need no --submit")
    for flag in ("seeds", "grid", "follow"):
        check(not getattr(config, flag), flag, getattr(config, flag), "leave it out behind --submit")
    size = config.nodes * config.processes_per_node
    check(processes in (None, size), "processes", processes, f"the launcher starts {size} processes, leave it out")
    return config


def check_sbatch(flag: str = "submit", fix: str = "leave it out") -> None:
    """Raise UserError, which names the flag, if this machine has no sbatch."""
    if shutil.which("sbatch") is None:
        raise UserError(f"--{flag}: there is no sbatch here, submit from a login node or {fix}")


def submit_array(config: SubmitConfig, runs: list[Run], job_dir: Path, after: str, dry_run: bool) -> str:
    """Submit or print the runs and return the number of the job.

    Args:
        after: value of sbatch --dependency.
    """
    code = unused_folder(job_dir)
    jobs = [stage_job(config, code, run) for run in runs]
    resources = resources_of(config, job_dir)
    resources = dataclasses.replace(resources, dependency=after or resources.dependency)
    if dry_run:
        show(config, resources, runs, jobs, job_dir, code)
        return "JOB"
    submitted = submit(config, resources, jobs, job_dir, code)
    report(config, runs, submitted)
    return submitted[0].job_id.partition("_")[0]


# --------------------------------------------------------------------------------------------------------
# Submission
# --------------------------------------------------------------------------------------------------------


def submit(config: SubmitConfig, resources: Resources, jobs: list[StageJob], job_dir: Path, code: Path) -> list[Job]:
    """Copy the code and submit the jobs; if sbatch refuses them, delete what was written.

    Raises:
        UserError: the folder cannot be written, or sbatch refuses.
    """
    from util.cluster.jobs import Refused, submit_local, submit_slurm

    before = set(job_dir.iterdir()) if job_dir.is_dir() else None
    try:
        copy_code(code)
        if config.cluster == "local":
            return [submit_local(resources, jobs[0], job_dir, code)]
        return submit_slurm(resources, jobs, job_dir, code)
    except OSError as error:
        raise UserError(f"--job_dir {job_dir}: cannot be written ({error.strerror}), choose another") from error
    except Refused as refusal:
        for path in [job_dir] if before is None else set(job_dir.iterdir()) - before:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        raise UserError(f"sbatch refuses: {refusal}") from refusal


def show(
    config: SubmitConfig, resources: Resources, runs: list[Run], jobs: list[StageJob], job_dir: Path, code: Path
) -> None:
    """Print the batch script and the commands of --dry_run."""
    if config.cluster == "slurm":
        from util.cluster.jobs import batch_script

        print(batch_script(resources, job_dir, code, len(jobs)))
    for run, job in zip(runs, jobs, strict=True):
        print(f"# {run.name or config.stage}\n{shlex.join(job.command)}")


def show_inputs(config: SubmitConfig, runs: list[Run]) -> None:
    """Check the files that the runs would read, and print a line about each."""
    from util.weights.inputs import check_inputs

    lines = [line for run in runs for line in check_inputs(config.stage, run.settings, bool(config.after))]
    for line in dict.fromkeys(lines):
        print(line)


def report(config: SubmitConfig, runs: list[Run], jobs: list[Job]) -> None:
    """Print where the job's logs are, and how to follow and cancel it."""
    number = jobs[0].job_id.partition("_")[0]
    cancel = "scancel" if config.cluster == "slurm" else "kill"
    runs_of = f"{len(runs)} runs of " if len(runs) > 1 else ""
    print(f"job     {number}: {config.stage}, {runs_of}{config.nodes} x {config.processes_per_node} processes")
    for run, job in zip(runs, jobs, strict=True):
        print(f"log     {job.paths.stdout}{f'  ({run.name})' if run.name else ''}")
    print(f"follow  tail -F {shlex.quote(str(jobs[0].paths.stdout))}")
    print(f"cancel  {cancel} {number}", flush=True)


if __name__ == "__main__":
    run_main(Path(__file__).name, main)
