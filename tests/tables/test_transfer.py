"""scripts/transfer.py: what is searched, plans, results beside the paper, heat maps, wrong input, job arrays."""

from __future__ import annotations

import itertools
import math
import os
import re
import shlex
import signal
import statistics
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from scripts import submit
from scripts import transfer as script
from shared.calls import markdown_rows, script_caller
from shared.flags import TINY_CLASSIFIER
from shared.images import write_images
from shared.published import make_aircraft, make_cub200, make_flowers102, make_naturalist
from shared.transfer import TINY_GRID
from util.config.classifier import FinetuneConfig
from util.config.command_line import parse_config
from util.config.groups import as_dict
from util.data.published import DATASETS
from util.results.results import append_result
from util.runtime.errors import UserError
from util.tables.cost import flops
from util.tables.tables import load_tables
from util.tables.transfer import (
    Grid,
    Search,
    Target,
    check_same_start,
    find_targets,
    plan_cells,
    prune,
    read_grid,
    read_values,
)
from util.tables.transfer_view import heat_maps
from util.weights.checkpoint import lock_folder

SMALL_GRID = "--lrs 1e-3 4e-3 --weight_decays 0.05 0.2"


@pytest.fixture
def call(monkeypatch, capsys, tmp_path):
    """Call scripts/transfer.py from an empty folder: exit status, stdout, stderr."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGPIPE)}
    yield script_caller(monkeypatch, capsys, tmp_path, script)
    for number, handler in before.items():
        signal.signal(number, handler)


# ---- what is searched ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["1e-3"], (1e-3,)),
        (["5e-4", "1e-4"], (1e-4, 5e-4)),
        (["1e-4:1e-1:4"], (1e-4, 1e-3, 1e-2, 1e-1)),
        (["0", "1e-6:1e-3:7"], (0.0, 1e-6, 3.16e-6, 1e-5, 3.16e-5, 1e-4, 3.16e-4, 1e-3)),
    ],
)
def test_values(given, expected):
    assert read_values("weight_decays", given, allow_zero=True) == expected


def test_the_default_grid_is_logarithmic_and_has_what_table_d_prints():
    lrs, decays = (
        read_values("lrs", script.LRS, allow_zero=False),
        read_values("w", script.WEIGHT_DECAYS, allow_zero=True),
    )
    assert {2.5e-4, 5e-4, 1e-3} < set(lrs)  # ViT-B, S and L
    assert 0.05 in decays
    for values in (lrs, decays):
        steps = np.diff(np.log(values))
        np.testing.assert_allclose(steps, steps.mean(), rtol=0.03)


@pytest.mark.parametrize(
    ("datasets", "paths", "expected"),
    [
        (["cub200", "dogs"], ["D"], [("cub200", "cub200", "D"), ("dogs", "dogs", "D")]),
        (["cub200", "dogs"], ["C", "D"], [("cub200", "cub200", "C"), ("dogs", "dogs", "D")]),
        (["digits"], [], [("digits", "digits", "")]),
        (["torch/eurosat"], ["E"], [("torch_eurosat", "torch/eurosat", "E")]),
        ([], ["a/pets", "b/cars.tar"], [("pets", "", "a/pets"), ("cars", "", "b/cars.tar")]),
        ([], ["pets/train", "cars/train.tar"], [("pets", "", "pets/train"), ("cars", "", "cars/train.tar")]),
        ([], ["a/cifar10/"], [("cifar10-files", "", "a/cifar10/")]),  # perhaps a part of it: no number for Table 3
    ],
)
def test_data_sets_and_their_folders(datasets, paths, expected):
    targets = find_targets(datasets, paths, "")
    assert [(target.name, target.dataset, target.data_path) for target in targets] == expected


@pytest.mark.parametrize(
    ("dataset", "recipe", "given"),
    [
        ("cub200", "transfer_vit_base", ""),
        ("cifar100", "transfer_cifar_vit_base", ""),
        ("inat2019", "transfer_inat_vit_base", ""),
        ("inat2019", "other", "other"),
    ],
)
def test_each_data_set_has_its_recipe(dataset, recipe, given):
    assert find_targets([dataset], ["D"], given)[0].recipe == recipe


@pytest.mark.parametrize("name", ["transfer_vit_base", "transfer_cifar_vit_base", "transfer_inat_vit_base"])
def test_recipes_are_table_d_at_224_pixels(name):
    config = parse_config(FinetuneConfig, ["--recipe", name], "main_finetune.py")
    assert (config.architecture_name, config.resolved_input_size) == ("vit_base_patch16", (224, 224))
    tables = parse_config(FinetuneConfig, ["--recipe", "finetune_vit_base"], "main_finetune.py")
    for field in ("betas", "layer_decay", "drop_path", "aa", "smoothing", "reprob", "mixup", "cutmix", "min_lr"):
        assert getattr(config, field) == getattr(tables, field), field
    assert config.lr is None
    assert config.keep_last == 1


def test_every_column_of_the_papers_tables_is_a_data_set():
    tables = load_tables()
    keys = [column.key for name in ("2", "3") for column in tables[name].columns]
    assert sorted(keys) == sorted([*(DATASETS.keys() - {"aircraft_cropped"}), "avg"])
    for name in ("2", "3"):  # the paper's averages are those of its numbers
        for row in tables[name].rows:
            if "avg" in row.paper:
                others = [score.value for key, score in row.paper.items() if key != "avg"]
                assert abs(statistics.mean(others) - row.paper["avg"].value) < 0.051, row.name


# ---- plan ----------------------------------------------------------------------------------------------------------
def test_a_plan_has_a_command_for_each_cell_and_seed(call, tmp_path):
    make_cub200(tmp_path / "data")
    make_naturalist(2018)(tmp_path / "data")
    grid = "--lrs 1e-4 1e-3 --weight_decays 0 0.05 --seeds 2 --finetune_flags='--weights momentum --num_workers 4'"
    data = "--dataset cub200 inat2018 --data_path data"
    status, shown, errors = call(f"plan --finetune scratch --label LUT {data} {grid}")
    assert status == 0, errors
    commands = [line for line in shown.splitlines() if line and not line.startswith("#")]
    matches = [re.search(r"--dataset (\S+) .* --blr (\S+) --weight_decay (\S+) --seed (\d)", line) for line in commands]
    expected = itertools.product(("cub200", "inat2018"), ("0.0001", "0.001"), ("0.0", "0.05"), ("0", "1"))
    assert [match.groups() for match in matches] == list(expected)
    assert len({re.search(r"--output_dir (\S+) --auto_resume$", line)[1] for line in commands}) == 16
    recipes = [re.search(r"--recipe (\S+)", line)[1] for line in commands]
    assert recipes == 8 * ["transfer_vit_base"] + 8 * ["transfer_inat_vit_base"]
    config = parse_config(FinetuneConfig, shlex.split(commands[-1])[2:], "main_finetune.py")
    assert (config.dataset, config.blr, config.weight_decay, config.seed) == ("inat2018", 1e-3, 0.05, 1)
    assert (config.epochs, config.holdout, config.auto_resume) == (100, 0.0, True)
    assert (config.weights, config.num_workers) == ("momentum", 4)
    assert config.output_dir == "output/transfer/LUT/inat2018/test/lr_0.001-wd_0.05/seed_1"
    assert "# 2, 3 images per epoch, " in shown  # of CUB's and iNaturalist's training images
    assert os.listdir(tmp_path) == ["data"]


def test_more_processes_keep_the_images_of_an_update(call, tmp_path):
    make_naturalist(2018)(tmp_path)
    flags = "--finetune scratch --dataset inat2018 --data_path . --lrs 1e-3 --weight_decays 0.05"
    _, shown, _ = call(f"plan {flags} --processes 8")
    assert "torchrun --nproc_per_node=8 main_finetune.py --recipe transfer_inat_vit_base" in shown
    assert " --batch_size 128 --accum_iter 1 " in shown
    _, shown, _ = call(f"plan {flags} --processes 8 --finetune_flags='--batch_size 4'")
    assert "--accum_iter" not in shown


def test_a_holdout_is_told_to_the_runs(call, class_folders):
    _, shown, _ = call(f"plan {TINY_GRID} --data_path {class_folders} {SMALL_GRID} --holdout 0.25 --seeds 3")
    assert shown.count("--holdout 0.25 --auto_resume") == 12
    assert "/images/holdout_0.25/lr_0.001-wd_0.05/seed_0 " in shown
    assert "# then the best cell of each data set again, on all training images: 3 runs each" in shown
    assert "# 24 images per epoch" in shown


def test_a_limit_of_updates_limits_the_cost(tmp_path, class_folders):
    def cost(*flags: str) -> float:
        extra = (*f"{TINY_CLASSIFIER} --input_size 32".split(), *flags)
        search = Search(tmp_path / "out", "", (1e-3,), (0.05,), 1, 0.0, extra, 1)
        target = Target("images", "", str(class_folders), "transfer_vit_base")
        return flops(plan_cells(search, target, search.points)[0], images=0)

    assert cost("--max_steps", "3") == pytest.approx(cost() * 3 * 8 / (2 * 32))  # 2 epochs of 32 images
    assert cost("--max_steps", "9") == cost()


# ---- results -------------------------------------------------------------------------------------------------------
def finish(grid: Path, lr: float, decay: float, *values: float, **other) -> None:
    """Write what runs of a cell leave, one per seed."""
    for seed, value in enumerate(values):
        folder = grid / f"lr_{lr!r}-wd_{decay!r}" / f"seed_{seed}"
        folder.mkdir(parents=True)
        config = FinetuneConfig(blr=lr, weight_decay=decay, seed=seed, data_path="x", **other)
        append_result(folder, "finetune", as_dict(config), {"top1": value, "top5": 100.0}, 1.0, {})
        for name in ("checkpoint-9.pth", "checkpoint-9.pth.json"):
            (folder / name).write_text("x")


def test_a_grid_s_best_mean_and_deviation(tmp_path):
    cells = {(1e-3, 0.05): (70.0, 72.0), (1e-3, 0.0): (75.0,), (4e-3, 0.05): (60.0, 61.0, 65.0), (4e-3, 0.0): (75.0,)}
    for (lr, decay), values in cells.items():
        finish(tmp_path, lr, decay, *values)
    (tmp_path / "lr_0.016-wd_0.05" / "seed_0").mkdir(parents=True)  # not finished
    grid = read_grid(tmp_path)
    assert grid.cells == cells | {(0.016, 0.05): ()}
    means = [sum(values) / len(values) for values in cells.values()]
    mean = sum(means) / 4
    assert grid.spread[0] == pytest.approx(mean)
    assert grid.spread[1] == pytest.approx(math.sqrt(sum((x - mean) ** 2 for x in means) / 3))
    assert grid.best == (1e-3, 0.0)  # of two equal ones the lower learning rate
    assert read_grid(tmp_path / "none").best is None


def test_only_the_best_cell_keeps_its_checkpoints(tmp_path):
    finish(tmp_path, 1e-3, 0.05, 70.0, 71.0)
    finish(tmp_path, 1e-3, 0.1, 75.0, 74.0)
    (tmp_path / "lr_0.002-wd_0.05" / "seed_0").mkdir(parents=True)
    (tmp_path / "lr_0.002-wd_0.05" / "seed_0" / "checkpoint-1.pth").write_text("under way")
    prune(tmp_path, keep_best=True)
    left = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("checkpoint-*.pth"))
    best = [f"lr_0.001-wd_0.1/seed_{seed}/checkpoint-9.pth" for seed in (0, 1)]
    assert left == [*best, "lr_0.002-wd_0.05/seed_0/checkpoint-1.pth"]
    assert len(list(tmp_path.rglob("*.json"))) == 2
    prune(tmp_path, keep_best=False)
    assert [path.parent.parent.name for path in tmp_path.rglob("checkpoint-*")] == ["lr_0.002-wd_0.05"]
    assert len(list(tmp_path.rglob("results.jsonl"))) == 4


def test_ours_stand_below_the_papers_rows(call, tmp_path):
    out = tmp_path / "output" / "transfer"
    for i, value in enumerate((88.0, 89.6, 87.4)):
        finish(out / "LUT" / "aircraft" / "test", 1e-4 * 2**i, 0.05, value)
    finish(out / "LUT" / "inat2018" / "test", 1e-3, 0.05, 75.0)
    (out / "LUT" / "inat2018" / "test" / "lr_0.002-wd_0.05").mkdir()
    finish(out / "MAE" / "aircraft" / "test", 1e-3, 0.05, 80.0, 81.0)
    finish(out / "MAE" / "pets" / "test", 1e-3, 0.05, 91.0)
    status, shown, errors = call("show --format markdown")
    assert status == 0, errors
    rows, missing, empty = markdown_rows(shown), "–", ""
    assert ["LUT", "paper", "89.2 (88.3 ± 0.9)", "86.0 (85.3 ± 0.6)"] in [row[:4] for row in rows]
    assert ["LUT", "ours", "89.6 (88.3 ± 1.1)", *7 * [missing]] in rows
    assert ["LUT", "Δ to paper's LUT", "+0.4", *7 * [empty]] in rows
    assert ["MAE", "ours", "80.5", *7 * [missing]] in rows
    assert ["MAE", "Δ to paper's MAE", "-7.6", *7 * [empty]] in rows
    assert ["LUT", "ours", "75.0", missing, missing] in rows
    assert [row[0] for row in rows if row[1:2] == ["ours"]] == [
        "LUT",
        "LUT",
        "MAE",
        "MAE",
    ]  # none of missing ones alone
    assert shown.index("Table 2: ") < shown.index("Table 3: ") < shown.index("Data sets that the paper does not have")
    assert ["MAE", "ours", "91.0"] in rows
    assert "LUT, inat2018: 1 of 2 cells, best at learning rate 0.001, weight decay 0.05" in shown
    _, shown, _ = call("show")
    assert "LUT, aircraft: 3 of 3 cells, best at learning rate 0.0002, weight decay 0.05\n" in shown
    assert "\n\nMAE, ours\n  Aircraft   80.5\n  Birds      –\n" in shown  # too wide for columns: a block per row
    assert max(map(len, shown.partition("ours: ")[0].splitlines())) <= 100
    _, shown, _ = call("show --format latex --picture a/b.png")
    assert "LUT & ours & 89.6 (88.3 $\\pm$ 1.1) & -- &" in shown
    assert "LUT & $\\Delta$ to paper's LUT & +0.4 &" in shown
    assert all(line[0] in "%\\" or " & " in line for line in shown.splitlines() if line)  # all else is commented
    with Image.open(tmp_path / "a" / "b.png") as picture:
        assert (picture.format, min(picture.size) > 300) == ("PNG", True)


def test_the_average_needs_all_seven_sets(call, tmp_path):
    out = tmp_path / "output" / "transfer" / "mine"
    names = ("aircraft", "nabirds", "cub200", "cifar10", "cifar100", "dogs", "flowers102")
    for i, name in enumerate(names):
        _, shown, _ = call("show --format markdown") if i else (0, "", "")
        assert not i or markdown_rows(shown)[-2][-1] != "81.0"
        finish(out / name / "test", 1e-3, 0.05, 78.0 + i)
    _, shown, _ = call("show --format markdown")
    assert ["mine", "ours", *(f"{78 + i}.0" for i in range(7)), "81.0"] in markdown_rows(shown)
    difference = next(row for row in markdown_rows(shown) if row[1:2] == ["Δ to paper's LUT"])
    assert difference[-1] == "-10.1"


def test_a_chosen_cell_is_shown_with_its_accuracy_on_the_test_images(call, tmp_path):
    out = tmp_path / "output" / "transfer" / "LUT" / "dogs"
    for lr, value in ((1e-3, 91.0), (2e-3, 93.0), (4e-3, 92.0)):
        finish(out / "holdout_0.2", lr, 0.05, value)
    _, shown, _ = call("show --holdout 0.2 --format markdown")
    assert "; not yet trained on all training images" in shown
    assert markdown_rows(shown)[6][:2] == ["LUT", "ours"]
    assert set(markdown_rows(shown)[6][2:]) == {"–"}
    finish(out / "test", 2e-3, 0.05, 88.0)  # of a grid that is judged by the test images
    finish(out / "holdout_0.3/chosen", 2e-3, 0.05, 86.0)
    assert "; not yet trained on all training images" in call("show --holdout 0.2 --format markdown")[1]
    finish(out / "holdout_0.2/chosen", 2e-3, 0.05, 87.0)
    finish(out / "holdout_0.2/chosen", 1e-3, 0.05, 89.0)  # better, but not what the held-out images say
    _, shown, _ = call("show --holdout 0.2 --format markdown")
    assert "87.0 (92.0 ± 1.0)" in shown
    assert "not yet" not in shown
    assert "ours: the cell that is best on 20% of the training images, held out, trained again on all of them" in shown
    assert "--output_dir output/transfer: holds no grid of --holdout 0.1" in call("show --holdout 0.1")[2]
    prune(out / "holdout_0.2/chosen", keep_best=True)
    left = (out / "holdout_0.2/chosen").rglob("checkpoint-*.pth")
    assert [path.parent.parent.name for path in left] == ["lr_0.002-wd_0.05"]


@pytest.mark.parametrize(("name", "noted"), [("aircraft", True), ("dogs", False)])
def test_the_banner_of_aircraft_is_said_beside_its_numbers(call, tmp_path, name, noted):
    """The images of FGVC-Aircraft end in a banner of 20 pixels, which the reader of our data keeps.

    Source: the data set's page (Maji et al. 2013) says that the lowest 20 pixels are a banner with the copyright.
    """
    finish(tmp_path / "output/transfer/LUT" / name / "test", 1e-3, 0.05, 80.0)
    assert ("keep the banner of 20 pixels" in call("show")[1]) == noted


def test_the_retrained_choice_is_no_result_of_a_grid_judged_by_the_test(call, tmp_path):
    out = tmp_path / "output" / "transfer" / "LUT" / "dogs" / "holdout_0.2"
    finish(out, 1e-3, 0.05, 91.0)
    finish(out / "chosen", 1e-3, 0.05, 89.0)
    assert call("show --holdout 0.2")[0] == 0
    status, _, errors = call("show")
    assert (status, "holds no grid of --holdout 0 " in errors) == (2, True)


@pytest.mark.parametrize(("best", "message"), [(0, "lowest"), (1, ""), (2, "highest")])
def test_a_best_cell_at_the_edge_is_pointed_out(call, tmp_path, best, message):
    for i in range(3):
        finish(tmp_path / "output/transfer/x/pets/test", 1e-3 * 2**i, 0.05, 80.0 + (i == best))
    _, shown, _ = call("show")
    assert (f"(the {message} learning rate: widen --lrs)" in shown) == bool(message)
    assert ("widen" in shown) == bool(message)


def test_a_heat_map_has_a_number_for_each_cell_and_frames_the_best():
    cells = {
        (lr, decay): (10.0 * i + j,) for i, lr in enumerate((1e-3, 2e-3)) for j, decay in enumerate((0.0, 0.1, 0.2))
    }
    figure = heat_maps({"a": Grid(cells | {(2e-3, 0.2): ()}), "b": Grid({(1.0, 0.1): ()})}, "t", "some images")
    a, b = figure.axes
    shown = {(int(text.get_position()[0]), int(text.get_position()[1])): text.get_text() for text in a.texts}
    assert shown == {(0, 0): "0.0", (0, 1): "1.0", (0, 2): "2.0", (1, 0): "10.0", (1, 1): "11.0", (1, 2): "–"}
    (frame,) = a.patches
    assert (frame.get_x(), frame.get_y()) == (0.5, 0.5)
    assert [label.get_text() for label in a.get_xticklabels()] == ["0.001", "0.002"]
    assert [label.get_text() for label in a.get_yticklabels()] == ["0", "0.1", "0.2"]
    assert not b.patches
    assert [text.get_text() for text in b.texts] == ["–"]


# ---- finished runs are not mixed with others -----------------------------------------------------------------------
def test_other_weights_or_data_need_another_label(tmp_path, class_folders):
    for name in ("a.pth", "b.pth"):
        (tmp_path / name).write_text("")
    extra = tuple(f"{TINY_CLASSIFIER} --input_size 32".split())
    search = Search(tmp_path / "out", str(tmp_path / "a.pth"), (1e-3,), (0.05,), 1, 0.0, extra, 1)
    target = Target("images", "", str(class_folders), "transfer_vit_base")
    (run,) = plan_cells(search, target, search.points)
    run.folder.mkdir(parents=True)
    append_result(run.folder, "finetune", as_dict(run.config), {"top1": 50.0}, 1.0, {})
    check_same_start(plan_cells(search, target, search.points))
    for other, message in (
        (Search(tmp_path / "out", str(tmp_path / "b.pth"), (1e-3,), (0.05,), 1, 0.0, extra, 1), "a.pth, not .*b.pth;"),
        (Search(tmp_path / "out", "", (1e-3,), (0.05,), 1, 0.0, extra, 1), "a.pth, not none; choose another --label"),
        (Search(tmp_path / "out", search.finetune, (1e-3,), (0.05,), 1, 0.0, (*extra, "--epochs", "9"), 1), "epochs 2"),
    ):
        with pytest.raises(UserError, match=message):
            plan_cells(other, target, search.points)
    write_images(tmp_path / "images2/train/cat", 8)
    write_images(tmp_path / "images2/train/dog", 8)
    write_images(tmp_path / "images2/val/cat", 2)
    write_images(tmp_path / "images2/val/dog", 2)
    with pytest.raises(UserError, match=r"has finished with --data_path .*images, not .*images2"):
        plan_cells(search, Target("images", "", str(tmp_path / "images2"), "transfer_vit_base"), search.points)


# ---- wrong input: one line -----------------------------------------------------------------------------------------
WRONG = {
    "runn": "runn: unknown command, did you mean run? (one of plan, run, show)",
    "show": "--output_dir output/transfer: holds no grid of --holdout 0 (LABEL/DATA SET), see `run`",
    "plan --dataset dogs": "--finetune: give the pre-trained weights, or scratch",
    "plan --finetune x.pth --dataset dogs": "--finetune x.pth: there is no such file",
    "plan --finetune scratch": "--dataset: name data sets (inat2018, ",
    "plan --finetune scratch --dataset dogs": "--data_path: is missing, --dataset dogs needs the folder of Stanford",
    "plan --finetune scratch --dataset dogs --data_path x": "--data_path x: there is no such file or folder",
    "plan --finetune scratch --data_path x": "--data_path x: there is no such file or folder",
    "plan --finetune scratch --dataset cub --data_path x": "--dataset cub: unknown, did you mean cub200?",
    "plan --finetune scratch --dataset dogs cub200 flowers102 --data_path a b": "--data_path a b: give one",
    "plan --finetune scratch --dataset dogs dogs --data_path a b": "--dataset dogs dogs: dogs comes twice",
    "plan --finetune scratch --data_path a/x b/x": "--data_path a/x b/x: x comes twice",
    "plan --finetune scratch --dataset cub200 --data_path .": "; it holds FGVC-Aircraft (--dataset aircraft)",
    "plan --lrs": "--lrs: give one value or more",
    "plan --lrs=-1e-3": "--lrs -1e-3: must be above 0, and finite",
    "plan --lrs -1e-3": "--lrs -1e-3: must be above 0, and finite",
    "plan --lrs 0": "--lrs 0: must be above 0, and finite",
    "plan --lrs nan": "--lrs nan: must be above 0, and finite",
    "plan --lrs 1e-3:1e-2": "--lrs 1e-3:1e-2: give a number or LOW:HIGH:NUMBER",
    "plan --lrs 1e-2:1e-3:3": "--lrs 1e-2:1e-3:3: LOW must be above 0 and below HIGH",
    "plan --lrs 1e-3 0.001": "--lrs 1e-3 0.001: 0.001 comes twice",
    "plan --weight_decays -0.1": "--weight_decays -0.1: must be 0 or more, and finite",
    "plan --weight_decays 0.1:x:3": "--weight_decays 0.1:x:3: give a number or LOW:HIGH:NUMBER",
    "plan --label a/b": "--label a/b: letters, digits and . + - _ only",
    "plan --label ..": "--label ..: letters, digits and . + - _ only",
    "plan --holdout 1": "--holdout 1.0: must lie in [0, 1)",
    "plan --seeds 0": "--seeds 0: must be 1 or more",
    "plan {aircraft} --finetune_flags='--lr 1'": "--lr 1.0: leave it out, the",
    "plan {aircraft} --finetune_flags='--blr 3'": "--blr 3: is set for each cell, it does not belong to --finetune_f",
    "plan {aircraft} --finetune_flags='--eppochs 1'": "did you mean --epochs?",
    "plan {aircraft} --finetune_recipe transfer_vitbase": "did you mean transfer_",
    "plan {aircraft} --finetune_flags='--holdout 0.1'": "belongs to this script",
    "run --finetune scratch --dataset dogs --data_path x --download": "--download: torchvision cannot fetch Stanford",
    "run --finetune scratch --data_path x --download": "--download: give the names of what to fetch by --dataset",
    "run --finetune scratch --dataset torch/x --data_path x --download": "--download torch/x: give the names",
    "run {aircraft} --submit": "--submit: there is no sbatch here",
    "run {aircraft} -- --nodes 2": "`--`: flags of the launcher need --submit",
    "run --finetune scratch --dataset dogs --data_path . --submit -- --seeds 0 1": "--seeds 0 1: leave it out behind",
}


@pytest.mark.parametrize("flags", WRONG)
def test_wrong_input_is_one_line(call, monkeypatch, tmp_path, flags):
    make_aircraft(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    status, _, errors = call(flags.format(aircraft="--finetune scratch --dataset aircraft --data_path ."))
    assert status == 2
    assert len(errors.splitlines()) == 1
    assert errors.startswith("transfer.py: error: ")
    assert WRONG[flags] in errors
    assert os.listdir(tmp_path) == ["fgvc-aircraft-2013b"]


def test_a_folder_in_use_is_refused(call, tmp_path, class_folders):
    (tmp_path / "output/transfer/ours/images").mkdir(parents=True)
    lock = lock_folder(tmp_path / "output/transfer/ours/images")
    status, _, errors = call(f"run {TINY_GRID} --data_path {class_folders} {SMALL_GRID}")
    lock.close()
    assert status == 2
    assert errors.startswith(
        "transfer.py: error: --output_dir output/transfer/ours/images: another run writes there (process "
    )
    assert len(errors.splitlines()) == 1


# ---- SLURM ---------------------------------------------------------------------------------------------------------
def test_the_cells_of_each_data_set_are_an_array(call, tmp_path):
    make_naturalist(2018)(tmp_path)
    make_flowers102(tmp_path)
    flags = f"--finetune scratch --dataset inat2018 flowers102 --data_path . {SMALL_GRID} --holdout 0.2"
    status, shown, errors = call(f"run {flags} --submit --dry_run -- --ngpus 2 --partition gpu")
    assert status == 0, errors
    arrays = shown.split("#!/bin/bash")[1:]
    for text, name, batch in zip(arrays, ("inat2018", "flowers102"), ("128 --accum_iter 4", "64"), strict=True):
        assert f"--job-name=lut-transfer-{name}" in text
        assert "#SBATCH --array=0-3%" in text
        assert "#SBATCH --partition=gpu" in text
        commands = [line for line in text.splitlines() if "main_finetune.py" in line]
        assert len(commands) == 4
        assert all(f" --output_dir {tmp_path}/output/transfer/ours/{name}/holdout_0.2/lr_" in line for line in commands)
        assert all(f"--batch_size {batch} " in line and "--auto_resume" in line for line in commands)
    assert "once they have ended, the same command submits the best cell" in shown


def test_a_call_that_submits_first_deletes_what_the_last_one_s_jobs_left(call, monkeypatch, tmp_path, class_folders):
    extra = tuple(f"{TINY_CLASSIFIER} --input_size 32 --aa none --drop_path 0".split())
    search = Search(tmp_path / "output/transfer/ours", "", (1e-3, 4e-3, 9e-3), (0.05,), 1, 0.0, extra, 1)
    runs = plan_cells(search, Target("images", "", str(class_folders), "transfer_vit_base"), search.points)
    for run, top1 in zip(runs, (50.0, 60.0, None), strict=True):
        run.folder.mkdir(parents=True)
        (run.folder / "checkpoint-1.pth").write_text("x")
        if top1 is not None:
            append_result(run.folder, "finetune", as_dict(run.config), {"top1": top1}, 1.0, {})
    submitted = []
    monkeypatch.setattr(submit, "check_sbatch", lambda: None)
    monkeypatch.setattr(submit, "submit_array", lambda config, runs, *_: submitted.extend(runs))
    flags = f"run {TINY_GRID} --data_path {class_folders} --lrs 1e-3 4e-3 9e-3 --weight_decays 0.05 --submit"
    for more, numbers in (("--dry_run", [0, 1, 2]), ("--keep_checkpoints all", [0, 1, 2]), ("", [1, 2])):
        submitted.clear()
        status, _, errors = call(f"{flags} {more} -- --ngpus 0")
        assert status == 0, errors
        assert [run.name for run in submitted] == [runs[2].title]
        assert [i for i, run in enumerate(runs) if (run.folder / "checkpoint-1.pth").exists()] == numbers
