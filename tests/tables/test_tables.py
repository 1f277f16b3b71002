"""The paper's tables: the data file, recipes that extend others, plans, results collected, runs that go on."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
import statistics
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from scripts import analyze, robustness, transfer
from scripts import tables as script
from shared.calls import one_line
from shared.tables import SCALES, TABLES, options
from util.config.command_line import parse_config, read_recipe, recipe_chain
from util.config.groups import as_dict
from util.config.pretrain import PretrainConfig
from util.config.segment import SegmentConfig
from util.data.published import DATASETS
from util.runtime.errors import UserError
from util.runtime.files import ROOT
from util.tables.cost import TimeEstimate, flops
from util.tables.plan import parse_flags, plan_runs, read_scale, work_behind
from util.tables.tables import FOLDER, PRETRAIN, PROBE, STAGES, Score, find_tables, load_tables, read_score
from util.tables.view import fill, text_table
from util.train.resume import share_batch

OURS = [(table, row) for table in TABLES.values() for row in table.rows if row.recipes]


# ---- the paper's numbers ------------------------------------------------------------------------------------
def test_every_table_is_there_with_all_its_rows():
    rows = {name: len(table.rows) for name, table in TABLES.items() if table.from_paper}
    expected = {"1": 23, "2": 7, "3": 5, "4a": 3, "4b": 3, "4c": 4, "4d": 4, "4e": 4, "4f": 4, "5": 5}
    assert rows == expected | {"A": 2, "B": 4, "C": 3}
    numbers = {name: sum(len(row.paper) for row in table.rows) for name, table in TABLES.items()}
    assert (numbers["1"], numbers["2"], numbers["3"], numbers["5"]) == (66, 21, 40, 60)


def test_the_average_column_is_the_mean_of_its_row():
    for row in TABLES["3"].rows:
        *scores, average = row.paper.values()
        assert average.value == pytest.approx(statistics.mean(score.value for score in scores), abs=0.051)


@pytest.mark.parametrize("name", ["2", "3"])
def test_the_best_of_a_grid_search_is_not_below_its_mean(name):
    scores = [score for row in TABLES[name].rows for score in row.paper.values() if score.mean is not None]
    assert len(scores) == {"2": 21, "3": 35}[name]
    assert all(score.mean <= score.value and score.std > 0 for score in scores)


def test_rows_that_are_the_same_run_have_the_same_numbers():
    numbers = {}
    for table, row in OURS:
        for key, recipe in row.recipes.items():
            if key in row.paper and table.name[0] in "4BC":
                score = numbers.setdefault((recipe, key), row.paper[key])
                assert score == row.paper[key], (table.name, row.name)
    assert numbers["ablation_lut", "ft"] == Score(83.5)
    assert numbers["ablation_mae", "lin"] == Score(61.5)


@pytest.mark.parametrize("text", ["82.8", "82.8†", "81.4‡", "69.8 (68.6 ± 0.9)"])
def test_a_number_is_printed_as_it_was_read(text):
    assert str(read_score("here", text)) == text


WRONG_FILES = [
    ("ft: 82.8", "lft: 82.8", "row 1: unknown key lft, did you mean ft?"),
    ("ft: 82.8", "ft: 82.83", "row 1, ft: 82.83 is not written as 82.8"),
    ("ft: 82.8", "ft: high", "row 1, ft: high is not written as 82.8"),
    ("ft: 82.8", "ft: 82.8, ft: 82.9", "ft is there twice"),
    ("case: none", "cse: none", "row 1: unknown key cse, did you mean case?"),
    ("case: none", "case: 0.5", "row 1: case 0.5 must be text, in quotes"),
    ("{case: none, ft: 82.8,", "{ft: 82.8,", "row 1: case is missing"),
    ("case: LUT", "case: none", "row 2: none is twice"),
    ("run: ablation_mae", "run: 7", "row 1: run 7 must name a recipe"),
    ("run: ablation_mae", "run: {lin: ablation_mae}", "row 1: unknown key lin"),
    ("run: ablation_lut", "flags: {alpha: 1}", "row 2: flags and epochs_times need run"),
    ("run: ablation_lut", "run: ablation_lut, epochs_times: 0", "row 2: epochs_times 0 must be above 0"),
    ("ours: finetune", "ours: finetun", "column ft: ours finetun is no stage, did you mean finetune?"),
    ("ours: finetune", "needs: segmentaton", "column ft: needs segmentaton is no tool, did you mean segmentation?"),
    ("ours: finetune", "needs: transfer, ours: finetune", "column ft: give one of ours and needs"),
    ("title: Own", "titel: Own", "unknown key titel, did you mean title?"),
    ('epochs: "3"', "epochs: 3", "epochs 3 must be text"),
    ("labels: [case]", "labels: [case", "cannot be read as YAML"),
    ("X:", "X: 3\nY:", "table X: 3 must be a mapping"),
    ("backbone: small", "backbone: small\n  seeds: 0", "seeds 0 must be 1 or more"),
    ("backbone: small", "backbone: small\n  notes: one", "notes one must be a list"),
]
OWN = """X:
  title: Own
  backbone: small
  epochs: "3"
  labels: [case]
  columns: {ft: {title: ft, ours: finetune}}
  rows:
    - {case: none, ft: 82.8, run: ablation_mae}
    - {case: LUT, ft: 83.5, run: ablation_lut}
"""


@pytest.mark.parametrize(("old", "new", "message"), WRONG_FILES)
def test_a_mistake_in_the_file_is_one_line_that_says_where(tmp_path, old, new, message):
    (tmp_path / "study.yaml").write_text("{}")
    (tmp_path / "paper.yaml").write_text(OWN)
    assert load_tables(tmp_path)["X"].rows[1].paper["ft"].value == 83.5
    (tmp_path / "paper.yaml").write_text(OWN.replace(old, new, 1))
    with pytest.raises(UserError) as error:
        load_tables(tmp_path)
    assert message in one_line(error)
    assert one_line(error).startswith("paper.yaml")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda scale: scale.pop("images"), "scale tiny: images is missing"),
        (lambda scale: scale.update(images=0), "scale tiny: images 0 must be above 0"),
        (lambda scale: scale.update(imges=1), "scale tiny: unknown key imges, did you mean images?"),
        (lambda scale: scale["bases"].update(x={"fintune": {}}), "base x: unknown key fintune, did you mean finetune?"),
        (lambda scale: scale["bases"].update(x={"finetune": {}}), "base x, finetune: recipe is missing"),
    ],
)
def test_a_mistake_in_a_scale_is_one_line_that_says_where(tmp_path, change, message):
    plain = yaml.safe_load((FOLDER / "scales.yaml").read_text())
    change(plain["tiny"])
    (tmp_path / "scales.yaml").write_text(yaml.safe_dump(plain))
    with pytest.raises(UserError, match=re.escape(message)) as error:
        read_scale("tiny", tmp_path / "scales.yaml")
    one_line(error)


# ---- recipes ------------------------------------------------------------------------------------------------
def test_a_recipe_extends_another_and_its_own_settings_win(tmp_path):
    for name, text in dict(
        a="extends: b.yaml\nepochs: 7", b="extends: c.yaml\nalpha: 0.1", c="epochs: 9\nalpha: 1"
    ).items():
        (tmp_path / f"{name}.yaml").write_text(text.replace("extends: ", f"extends: {tmp_path}/"))
    config = parse_config(PretrainConfig, ["--recipe", str(tmp_path / "a.yaml"), "--warmup_epochs", "1"], "x")
    assert (config.epochs, config.alpha) == (7, 0.1)
    assert parse_config(PretrainConfig, ["--recipe", "ablation_lut"], "x").epochs == 400


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("extends: quickstrat", "--recipe quickstrat: unknown, did you mean quickstart?"),
        ("extends: {here}", "{here} extends itself"),
        ("extends: quickstart\nepoch: 3", "--recipe {here}: unknown key epoch, did you mean epochs?"),
    ],
)
def test_a_mistake_in_what_is_extended_is_one_line(tmp_path, text, message):
    path = tmp_path / "own.yaml"
    path.write_text(text.format(here=path))
    with pytest.raises(UserError, match=re.escape(message.format(here=path))) as error:
        read_recipe(str(path), PretrainConfig)
    one_line(error)


def test_headers_of_recipes_expect_what_the_tables_have():
    checked = 0
    for table, row in OURS:
        for key, recipe in row.recipes.items():
            if recipe.startswith("ablation_") and key in row.paper:
                header = (ROOT / "recipes" / f"{recipe}.yaml").read_text().partition("\nextends")[0]
                expected = re.search(r"# Expected: (.*)", header)[1]
                assert f"{row.paper[key]} %" in expected, recipe
                assert re.search(rf"\bTables? .*{table.name[0]}", header), recipe
                checked += 1
    assert checked > 40


def keys_of(config) -> dict:
    """Return the settings that say what is trained."""
    free = ("recipe", "output_dir", "seed", "data_path", "auto_resume")
    return {name: value for name, value in as_dict(config).items() if name not in free}


@pytest.mark.parametrize("scale", ["small", "cpu", "tiny"])
def test_a_smaller_scale_changes_a_row_in_the_same_way(scale):
    """A row differs from its base in the same settings at every scale."""
    compared = 0
    for row, column in [(row, column) for table, row in OURS for column in table.columns if column.stage]:
        if recipe := row.recipes.get(column.key):
            works = {name: work_behind(row, column, SCALES[name]) for name in ("paper", scale)}
            base = next((name for name, _ in recipe_chain(recipe) if name in SCALES[scale].bases), recipe)
            if works[scale] is None or base == recipe:
                continue
            changes, differ = {}, set()
            for name, work in works.items():
                start = {"recipe": base} if name == "paper" else SCALES[scale].bases[base][PRETRAIN]
                planned, from_base = (
                    keys_of(parse_flags(PRETRAIN, tuple(script_flags(settings))))
                    for settings in (work.stages[PRETRAIN], start)
                )
                changes[name] = planned
                differ |= {field for field in planned if planned[field] != from_base[field]}
            assert differ, recipe
            for field in differ:  # one scale's base may have it already
                assert changes["paper"][field] == changes[scale][field], recipe
            compared += 1
    assert compared > 10


def script_flags(settings: dict) -> list[str]:
    """Return a scale's settings as flags, written down anew."""
    flags = []
    for name, value in settings.items():
        if isinstance(value, bool):
            flags.append(f"--{'' if value else 'no_'}{name}")
        else:
            flags += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return flags


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", TABLES)
def test_every_run_of_every_table_is_a_command_that_its_main_takes(tmp_path, scale, name):
    runs = plan_runs([TABLES[name]], options(scale, tmp_path, seeds=1))
    assert len({run.folder for run in runs}) == len(runs)
    for place, run in enumerate(runs):
        settings = STAGES[run.stage].settings
        config = parse_config(settings, run.flags, run.command[1])
        if run.processes == 1:  # their number decides nothing that is parsed
            resumes = {} if run.main == PROBE else {"auto_resume": True}
            assert as_dict(config) == as_dict(run.config) | resumes
        if run.after is None:
            assert run.stage == PRETRAIN
        else:
            assert runs.index(run.after) < place
            assert (config.checkpoint if run.main == PROBE else config.finetune) == str(run.after.checkpoint)
            assert run.after.seed == run.seed == getattr(config, "seed", run.seed)
    expected = any(column.stage for column in TABLES[name].columns)
    assert bool(runs) == expected


def test_runs_that_tables_share_are_done_once(tmp_path):
    parts = [TABLES[f"4{letter}"] for letter in "abcdef"]
    rows = sum(len(table.rows) for table in parts)
    runs = plan_runs(parts, options("tiny", tmp_path))
    pretrainings = [run for run in runs if run.stage == PRETRAIN]
    assert (rows, len(pretrainings), len(runs)) == (22, 12, 48)
    # at the small scale Table C's 100 epochs are Table 4's 400
    both = plan_runs([*parts, TABLES["C"]], options("tiny", tmp_path))
    assert len([run for run in both if run.stage == PRETRAIN]) == 13


def test_seeds_come_one_after_the_other_so_that_a_table_fills_early(tmp_path):
    runs = plan_runs([TABLES["B"]], options("tiny", tmp_path, seeds=3))
    assert [run.seed for run in runs] == [0] * 16 + [1] * 16 + [2] * 16
    assert len(plan_runs([TABLES["study"]], options("tiny", tmp_path))) % 3 == 0


def test_more_epochs_are_counted_from_those_of_the_flags(tmp_path):
    extra = {"pretrain": ["--epochs", "30"]}
    runs = plan_runs([TABLES["study"]], options("tiny", tmp_path, seeds=1, extra=extra))
    longer = next(run for run in runs if "epochs_x2" in run.title and run.stage == "probe")
    assert longer.after.config.epochs == 60
    assert longer.config.checkpoint.endswith("ablation_mae-epochs_x2/seed_0/pretrain/checkpoint-59.pth")


@given(st.integers(1, 5000), st.integers(1, 64), st.integers(1, 512))
def test_an_update_is_shared_out_exactly_or_refused(images, processes, most):
    if images % processes:
        with pytest.raises(UserError, match="--x: the"):
            share_batch(images, processes, most, "--x")
    else:
        batch_size, accum_iter = share_batch(images, processes, most, "--x")
        assert batch_size * accum_iter * processes == images
        assert batch_size <= most


@pytest.mark.parametrize("processes", [1, 2, 8, 16])
def test_the_images_of_an_update_do_not_depend_on_the_processes(tmp_path, monkeypatch, processes):
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    for run in plan_runs([TABLES["4f"]], options("paper", tmp_path, processes=processes)):
        expected = {"pretrain": 4096, "finetune": 1024, "linprobe": 16384, "linprobe_pooled": 16384}[run.stage]
        assert parse_config(STAGES[run.stage].settings, run.flags, "x").effective_batch == expected
    by_hand = {"pretrain": ["--batch_size", "32"]}
    (run, *_) = plan_runs([TABLES["4f"]], options("paper", tmp_path, processes=processes, extra=by_hand))
    assert (run.config.batch_size, run.config.accum_iter) == (32, 4)


def test_the_time_follows_what_runs_have_reached(tmp_path):
    run, second, *_ = plan_runs([TABLES["C"]], options("tiny", tmp_path))
    estimate = TimeEstimate(1e9, images=100)
    assert estimate.seconds(run) == pytest.approx(flops(run, 100) / 1e9)
    run.folder.mkdir(parents=True)
    log = [{"images_per_second": speed} for speed in (10, 50, 1000)] + [{"knn": 3.0}, {"images_per_second": "nan"}]
    (run.folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log) + '{"images_')
    estimate.add_log(run)
    assert estimate.seconds(run, 0.5) == pytest.approx(0.5 * 100 * run.config.epochs / 50)
    assert estimate.seconds(second) == pytest.approx(flops(second, 100) / 1e9)
    estimate.add_run(second, 0.5, 30.0)
    assert estimate.seconds(second) == pytest.approx(60)


def test_a_mistake_in_a_recipe_names_the_row(monkeypatch, tmp_path):
    path = tmp_path / "own.yaml"
    path.write_text("extends: ablation_lut\nalpah: 1")
    table = load_with(tmp_path, OWN.replace("ablation_lut", str(path)))
    with pytest.raises(
        UserError, match=r"^table X, LUT: --recipe .*own.yaml: unknown key alpah, did you mean alpha\?$"
    ):
        plan_runs([table], options("paper", tmp_path))


def load_with(folder: Path, text: str):
    """Return the table X of a file with this text."""
    (folder / "study.yaml").write_text("{}")
    (folder / "paper.yaml").write_text(text)
    return load_tables(folder)["X"]


# ---- docs ---------------------------------------------------------------------------------------------------
def test_every_command_of_the_reproduction_page_is_taken(tmp_path):
    text = (ROOT / "docs" / "REPRODUCE.md").read_text()
    blocks = re.findall(r"```bash\n(.*?)```", text, re.S)
    lines = [line.split(" #")[0] for block in blocks for line in block.splitlines()]
    commands = [shlex.split(line) for line in [*lines, *re.findall(r"`((?:python|torchrun) [^`]*)`", text)]]
    mains = {stage.program: stage.settings for stage in STAGES.values()} | {"main_segment.py": SegmentConfig}
    recipes = set()
    for command in commands:
        place = next(i for i, word in enumerate(command) if word.endswith(".py"))
        program, flags = command[place], command[place + 1 :]
        if program == "scripts/tables.py":
            given = parse_config(script.COMMANDS[flags[0]], flags[1 : (*flags, "--").index("--")], program)
            assert plan_runs(find_tables(given.table), dataclasses.replace(given.options, seeds=1)), command
        elif program == "scripts/analyze.py":
            assert parse_config(analyze.COMMANDS[flags[0]], flags[1:], program).checkpoint
        elif program == "scripts/transfer.py":
            given = parse_config(transfer.COMMANDS[flags[0]], flags[1:], program)
            assert set(getattr(given, "dataset", ())) <= DATASETS.keys()
        elif program == "scripts/robustness.py":
            assert parse_config(robustness.RobustnessConfig, flags, program).output_dir
        else:
            recipes.add(parse_config(mains[program], flags, program).recipe)
    assert {recipe for table, row in OURS if table.from_paper for recipe in row.recipes.values()} <= recipes


SHOWN = [("study", "."), ("parts", "."), ("tuning", "."), ("brief", "tiny_imagenet")]  # with their folders


@pytest.mark.parametrize(("name", "folder"), SHOWN)
def test_the_results_page_shows_what_the_kept_results_say(name, folder):
    """Every number of its tables has a line in docs/results."""
    filled = fill(TABLES[name], options("cpu", ROOT / "docs" / "results" / folder))
    page = (ROOT / "docs" / "RESULTS.md").read_text(encoding="utf-8")
    assert text_table(filled, "baseline").render("markdown") in page
    assert len(filled.cells[0]["pooled"].ours) == 3
    assert not filled.remarks  # all ran as planned
