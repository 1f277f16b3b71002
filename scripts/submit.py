"""Submit a stage to SLURM, or run it in the background of this machine.

    python scripts/submit.py pretrain --ngpus 8 --partition gpu --job_dir RUN -- --recipe paper_vit_base --data_path IN
    python scripts/submit.py finetune --seeds 0 1 2 --grid "blr=5e-4,1e-3" -- --recipe finetune_vit_base --finetune PT
    python scripts/submit.py pretrain --cluster local --ngpus 0 --follow -- --recipe quickstart

The launcher's flags come before `--`, those of the stage (main_STAGE.py, and scripts/probe.py) after it. A job that
meets its time limit, is preempted or loses a node is queued again and goes on from its newest checkpoint. --dry_run
shows what would be submitted.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from submitit import Job
from tyro.conf import Positional, UseAppendAction, arg

from util.cluster.jobs import Refused, Resources, batch_script, follow, submit_local, submit_slurm
from util.cluster.launch import StageJob
from util.config.command_line import MAINS, flag_values, parse_config
from util.config.groups import check
from util.runtime.errors import UserError, nearest, run_main
from util.runtime.files import ROOT
from util.runtime.logs import git_state

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
    """GPUs per node, one process each; 0: run on CPUs, with --tasks_per_node processes"""
    tasks_per_node: int | None = None
    """processes per node of a run on CPUs; default: 1"""
    cpus_per_task: int | None = None
    """processors per process; default: 10 beside a GPU, else 1"""
    mem_gb: float | None = None
    """memory per node; default: the cluster's"""

    # queue
    timeout: int = 1440
    """minutes until the job has to be queued again (SLURM only)"""
    signal_delay: int = 90
    """seconds before that in which it saves"""
    max_requeues: int = 50
    """times that a job asks to be queued again"""
    partition: str = ""
    """queue; default: the cluster's"""
    account: str = ""
    """whom to charge"""
    qos: str = ""
    """quality of service"""
    constraint: str = ""
    """features that the nodes must have"""
    exclude: str = ""
    """nodes to avoid"""
    comment: str = ""
    """shown with the job; some clusters want one"""
    after: tuple[int, ...] = ()
    """numbers of jobs that must have ended well before this one starts"""
    job_name: str = ""
    """in squeue; default: lut-STAGE"""
    job_dir: str = ""
    """logs, the copy of the code, and the run's own --output_dir unless that is given; default: jobs/STAGE-DATE"""
    cluster: Literal["slurm", "local"] = "slurm"
    """local: a background process of this machine"""

    # software
    prologue: UseAppendAction[tuple[str, ...]] = ()
    """shell line to run before Python (module load, conda activate); may be repeated"""
    python: str = ""
    """interpreter of the job; default: this one, in a container python3"""
    container: str = ""
    """image for srun --container-image (needs pyxis); the job's and the current folder are mounted in it"""
    container_mounts: tuple[str, ...] = ()
    """more of them, as FROM:TO"""

    # several runs at once, each in a folder of its own
    seeds: tuple[int, ...] = ()
    """one run per seed"""
    grid: tuple[str, ...] = ()
    """one run per value of a stage's flag, and per combination: "blr=1e-3,2e-3" "mask_ratio=0.6,0.75" """
    array_parallelism: int = 256
    """most runs at a time"""

    dry_run: bool = False
    """print the batch script and the commands, submit nothing"""
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
        delay = self.signal_delay
        check(delay < 60 * self.timeout, "signal_delay", delay, f"must be less than --timeout {self.timeout} minutes")
        fix = "there is one process per GPU, leave it out (or --ngpus 0)"
        check(not (self.ngpus and self.tasks_per_node), "tasks_per_node", self.tasks_per_node, fix)
        check("%" not in self.job_dir, "job_dir", self.job_dir, "must not contain %")
        if self.stage == "probe":  # no launcher of processes is behind it
            check(self.nodes == 1, "nodes", self.nodes, "probe is one process")
            check(self.processes_per_node == 1, "ngpus", self.ngpus, "probe is one process: --ngpus 1, or 0")
        if self.cluster == "local":
            check(self.nodes == 1, "nodes", self.nodes, "--cluster local has one")
            check(not (self.seeds or self.grid), "cluster", "local", "does one run, leave out --seeds and --grid")
            check(not self.container, "container", self.container, "needs --cluster slurm")
            check(not self.after, "after", self.after, "needs --cluster slurm")

    @property
    def processes_per_node(self) -> int:
        """One per GPU, or --tasks_per_node."""
        return self.ngpus or self.tasks_per_node or 1

    @property
    def processors(self) -> int:
        """Of each process: --cpus_per_task, the default filled in."""
        return self.cpus_per_task or (10 if self.ngpus else 1)

    @property
    def interpreter(self) -> str:
        """--python, the default filled in."""
        return self.python or ("python3" if self.container else sys.executable)


@dataclass(frozen=True)
class Run:
    """One run of the stage: of a job that is no array the only one, without a name."""

    name: str
    flags: tuple[str, ...]


def main() -> None:
    """Both kinds of flags; then the code is copied, the job submitted, and followed."""
    launcher_flags, stage_flags = split(sys.argv[1:])
    config = parse_config(SubmitConfig, launcher_flags, Path(__file__).name)
    job_dir = Path(config.job_dir or f"jobs/{config.stage}-{time.strftime('%Y%m%d-%H%M%S')}").absolute()
    code = unused_folder(job_dir)
    runs = plan_runs(config, stage_flags, job_dir)
    jobs = [stage_job(config, code, run) for run in runs]
    resources = resources_of(config, job_dir)
    if config.dry_run:
        show(config, resources, runs, jobs, job_dir, code)
        return
    if config.cluster == "slurm":
        check_sbatch("cluster slurm", "use --cluster local")
    submitted = submit(config, resources, jobs, job_dir, code)
    report(config, runs, submitted)
    if config.follow:
        try:
            status = follow(submitted, [run.name for run in runs])
        except KeyboardInterrupt:
            print("the job goes on", file=sys.stderr)
            status = 128 + signal.SIGINT
        raise SystemExit(status)


# --------------------------------------------------------------------------------------------------------
# Flags
# --------------------------------------------------------------------------------------------------------


def split(arguments: list[str]) -> tuple[list[str], list[str]]:
    """What stands before and after the first `--`; a question for --help needs none."""
    if "--" in arguments:
        place = arguments.index("--")
        return arguments[:place], arguments[place + 1 :]
    if arguments and not {"-h", "--help"} & set(arguments):
        raise UserError("`--` is missing: STAGE [flags of the launcher] -- [flags of the stage, or nothing]")
    return arguments, []


def plan_runs(config: SubmitConfig, stage_flags: list[str], job_dir: Path) -> list[Run]:
    """The flags of each run, all of them read by the stage's settings, so that a mistake shows now and not in a job.

    Raises:
        UserError: a flag is wrong, or two runs would be the same.
    """
    settings, program = MAINS[config.stage].settings, MAINS[config.stage].program
    os.environ["WORLD_SIZE"] = str(config.nodes * config.processes_per_node)  # batches are checked per process
    try:
        given = parse_config(settings, stage_flags, program)
        fix = "a job that is queued again would begin at this file anew; put it into --output_dir and leave this out"
        ends_soon = getattr(given, "eval", False) or not hasattr(given, "resume")
        check(ends_soon or not given.resume, "resume", getattr(given, "resume", ""), fix)
        named = any(flag.partition("=")[0].replace("-", "_") == "__output_dir" for flag in stage_flags)
        folder = Path(given.output_dir).absolute() if named else job_dir
        runs = []
        for name, flags in combinations(config, settings):
            shared = [
                "--output_dir",
                str(folder / name),
                *([] if ends_soon or given.auto_resume else ["--auto_resume"]),
            ]
            runs.append(Run(name, (*stage_flags, *flags, *shared)))
            parse_config(settings, runs[-1].flags, program)
    finally:
        del os.environ["WORLD_SIZE"]
    names = [run.name for run in runs]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"--grid and --seeds: {twice} comes twice, each run needs a folder of its own")
    return runs


def combinations(config: SubmitConfig, settings: type) -> list[tuple[str, list[str]]]:
    """Name and flags of each point of --grid x --seeds; a single nameless one where neither is given."""
    axes: list[list[tuple[str, list[str]]]] = []
    for axis in (*config.grid, *(["seed=" + ",".join(map(str, config.seeds))] if config.seeds else [])):
        axes.append(flag_values(axis, settings, "grid"))
    product = itertools.product(*axes)
    return [("-".join(name for name, _ in point), [flag for _, flags in point for flag in flags]) for point in product]


def stage_job(config: SubmitConfig, code: Path, run: Run) -> StageJob:
    """What the job calls for a run."""
    command = (config.interpreter, "-u", str(code / MAINS[config.stage].program), *run.flags)
    local = config.processes_per_node if config.cluster == "local" else 0
    return StageJob(command, os.getcwd(), config.processors, local, config.max_requeues)


def resources_of(config: SubmitConfig, job_dir: Path) -> Resources:
    """What the job asks the cluster for."""
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
# Runs that other scripts have planned
# --------------------------------------------------------------------------------------------------------


def config_of_arrays(stage: str, launcher_flags: Sequence[str], processes: int | None) -> SubmitConfig:
    """The settings behind `--submit --` of a script that plans the runs itself.

    Args:
        processes: what its own --processes says.
    """
    config = parse_config(SubmitConfig, [stage, *launcher_flags], "submit.py")
    check(config.cluster == "slurm", "cluster", config.cluster, "runs on this machine need no --submit")
    for flag in ("seeds", "grid", "follow"):
        check(not getattr(config, flag), flag, getattr(config, flag), "leave it out behind --submit")
    size = config.nodes * config.processes_per_node
    check(processes in (None, size), "processes", processes, f"the launcher starts {size}, leave it out")
    return config


def check_sbatch(flag: str = "submit", fix: str = "leave it out") -> None:
    """UserError, which names the flag that asked for it, where no job can be submitted."""
    if shutil.which("sbatch") is None:
        raise UserError(f"--{flag}: there is no sbatch here, submit from a login node or {fix}")


def submit_array(config: SubmitConfig, runs: list[Run], job_dir: Path, after: str, dry_run: bool) -> str:
    """Submit or print the runs, after what sbatch calls `after`; the number of the job."""
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
# Folder, submission
# --------------------------------------------------------------------------------------------------------


def unused_folder(job_dir: Path) -> Path:
    """JOB_DIR/code, or code-2, ...: that of an earlier submission may belong to a job still queued."""
    return next(path for n in itertools.count(1) if not (path := job_dir / (f"code-{n}" if n > 1 else "code")).exists())


def copy_code(target: Path) -> None:
    """Copy what a stage needs, so that later changes do not reach a queued job; COMMIT says which state it was."""
    for source in code_files():
        copy = target / source.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, copy)
    commit, dirty = git_state(ROOT)
    (target / "COMMIT").write_text(f"{commit}{' with changes' if dirty else ''}\n" if commit else "unknown\n")


def code_files() -> list[Path]:
    """All Python files and recipes, but for what git ignores, where git can tell.

    Others are not ours but copies in the folders of earlier jobs.
    """
    patterns = ("*.py", "scripts/*.py", "util/*/*.py", "recipes/*.yaml")
    command = ["git", "-C", str(ROOT), "ls-files", "-co", "--exclude-standard", "-z", "--"]
    command += [f":(glob){pattern}" for pattern in patterns]
    try:
        listed = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout.split("\0")
        found = [ROOT / name for name in listed if name]
    except (OSError, subprocess.SubprocessError):
        found = []
    found = found or [
        path for pattern in patterns for path in ROOT.glob(pattern) if not path.parent.name.startswith(".")
    ]
    return [path for path in dict.fromkeys(found) if path.is_file()]  # one deleted but not committed is listed too


def submit(config: SubmitConfig, resources: Resources, jobs: list[StageJob], job_dir: Path, code: Path) -> list[Job]:
    """The submitted jobs; where that fails, nothing of them stays behind.

    Raises:
        UserError: the folder cannot be written, or sbatch refuses.
    """
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
    """--dry_run: the batch script and the commands."""
    if config.cluster == "slurm":
        print(batch_script(resources, job_dir, code, len(jobs)))
    for run, job in zip(runs, jobs, strict=True):
        print(f"# {run.name or config.stage}\n{shlex.join(job.command)}")


def report(config: SubmitConfig, runs: list[Run], jobs: list[Job]) -> None:
    """Say where the job is, and how to follow and end it."""
    number = jobs[0].job_id.partition("_")[0]
    cancel = "scancel" if config.cluster == "slurm" else "kill"
    runs_said = f"{len(runs)} runs of " if len(runs) > 1 else ""
    print(f"job     {number}: {config.stage}, {runs_said}{config.nodes} x {config.processes_per_node} processes")
    for run, job in zip(runs, jobs, strict=True):
        print(f"log     {job.paths.stdout}{f'  ({run.name})' if run.name else ''}")
    print(f"follow  tail -F {shlex.quote(str(jobs[0].paths.stdout))}")
    print(f"cancel  {cancel} {number}", flush=True)


if __name__ == "__main__":
    run_main(Path(__file__).name, main)
