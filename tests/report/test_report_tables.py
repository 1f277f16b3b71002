"""The paper's tables in a report: the rows that runs stand in."""

from __future__ import annotations

from pathlib import Path

from shared.runs import write_run
from util.config.classifier import FinetuneConfig, LinprobeConfig
from util.config.command_line import parse_config
from util.config.groups import as_dict
from util.config.pretrain import PretrainConfig
from util.config.segment import SegmentConfig
from util.report.paper_rows import paper_tables
from util.results.run_folder import open_runs


def paper_run(folder: Path, settings: type, flags: list[str], stage: str, finished: dict | None) -> Path:
    config = as_dict(parse_config(settings, flags, f"main_{stage}.py"))
    epochs = config.get("epochs", 1)
    lines = [{"step": config.get("max_updates", 5 * epochs), "epoch": epochs, "loss": 1.0}]
    return write_run(folder, lines, config, stage=stage, finished=finished)


def test_a_fine_tuned_run_stands_in_the_row_of_its_pre_training(tmp_path):
    before = paper_run(tmp_path / "lut", PretrainConfig, ["--recipe", "ablation_lut"], "pretrain", {})
    start = ["--finetune", str(before / "checkpoint-399.pth")]
    tuned = paper_run(
        tmp_path / "tuned", FinetuneConfig, ["--recipe", "finetune_vit_base", *start, "--epochs", "50"], "finetune",
        {"top1": 83.1},
    )  # fmt: skip
    probed = paper_run(
        tmp_path / "probed", LinprobeConfig, ["--recipe", "linprobe_vit_base", *start], "linprobe", {"top1": 60.0}
    )
    shown, homeless = paper_tables(open_runs([str(tuned), str(probed)]))
    assert homeless == []
    assert {each.heading.split(":")[0] for each in shown} == {
        f"Table {name}" for name in ("4a", "4b", "4c", "4d", "4e", "4f", "B")
    }
    first = next(each for each in shown if each.heading.startswith("Table 4a"))
    titles, row = first.rows[0], first.rows[3]
    cells = dict(zip(titles, row, strict=True))
    assert (cells["ft, paper"], cells["ft, ours"], cells["ft, diff."]) == ("83.5", "83.1", "-0.4")
    assert (cells["lin, paper"], cells["lin, ours"], cells["lin, pooled, ours"]) == ("67.9", "60.0", "–")
    assert first.marked == [2]
    assert "tuned, finetune with other settings than finetune_vit_base: epochs 50 (planned: 100)" in first.remarks
    assert any("was measured on unknown data" in remark for remark in first.remarks)


def test_transfer_learning_is_not_the_number_on_imagenet(tmp_path):
    before = paper_run(tmp_path / "lut", PretrainConfig, ["--recipe", "paper_vit_base"], "pretrain", {})
    start = ["--finetune", str(before / "checkpoint-1599.pth")]
    birds = ["--recipe", "transfer_vit_base", *start, "--dataset", "cub200", "--data_path", "/birds"]
    grid = [
        paper_run(tmp_path / f"cell_{blr}", FinetuneConfig, [*birds, "--blr", blr], "finetune", {"top1": 80.0})
        for blr in ("1e-3", "2e-3")
    ]
    others = {
        "by_recipe": ["--recipe", "transfer_vit_base", "--data_path", "/mine"],
        "by_data": ["--recipe", "finetune_vit_base", "--dataset", "dogs", "--data_path", "/dogs"],
        "held_out": ["--recipe", "finetune_vit_base", "--holdout", "0.1", "--data_path", "/imagenet"],
    }
    others = [
        paper_run(tmp_path / name, FinetuneConfig, [*flags, *start], "finetune", {"top1": 80.0})
        for name, flags in others.items()
    ]
    tuned = paper_run(
        tmp_path / "tuned", FinetuneConfig, ["--recipe", "finetune_vit_base", *start], "finetune", {"top1": 84.0}
    )
    assert paper_tables(open_runs([str(each) for each in grid]))[0] == []
    shown, homeless = paper_tables(open_runs([str(each) for each in (*grid, *others, tuned)]))
    assert homeless == [
        "cell_1e-3 (transfer to cub200 /birds)",
        "cell_2e-3 (transfer to cub200 /birds)",
        "by_recipe (transfer to /mine)",
        "by_data (transfer to dogs /dogs)",
        "held_out (judged by a share of 0.1 of the training images of /imagenet)",
    ]
    table = next(each for each in shown if each.heading.startswith("Table 1"))
    (cells,) = (dict(zip(table.rows[0], table.rows[1:][row], strict=True)) for row in table.marked)
    assert (cells["method"], cells["ViT-B, ours"]) == ("LUT", "84.0")


def test_a_segmentation_fills_the_column_of_its_own(tmp_path):
    before = paper_run(tmp_path / "lut", PretrainConfig, ["--recipe", "paper_vit_base"], "pretrain", {})
    flags = ["--finetune", str(before / "checkpoint-1599.pth"), "--data_path", "/ADE20K"]
    recipe = ["--recipe", "segment_vit_base", "--pictures", "0", "--drop_path", "0.2"]
    ours = paper_run(tmp_path / "ours", SegmentConfig, [*recipe, *flags], "segment", {"miou": 48.0})
    streets = ["--recipe", "camvid_segment", *flags]
    camvid = paper_run(tmp_path / "camvid", SegmentConfig, streets, "segment", {"miou": 70.0})
    shown, homeless = paper_tables(open_runs([str(ours), str(camvid)]))
    assert homeless == ["camvid (segmentation of /ADE20K, recipe camvid_segment)"]
    (table,) = shown
    assert table.heading.startswith("Table 1")
    (cells,) = (dict(zip(table.rows[0], table.rows[1:][row], strict=True)) for row in table.marked)
    texts = [cells[f"ADE20K mIoU, {part}"] for part in ("paper", "ours", "diff.")]
    assert (cells["method"], *texts) == ("LUT", "49.5", "48.0", "-1.5")
    assert cells["ViT-B, ours"] == "–"
    assert [remark for remark in table.remarks if "pre-training" not in remark] == [
        "ours, segment with other settings than segment_vit_base: drop_path 0.2 (planned: 0.1)",
        "ours was measured on /ADE20K",
    ]


def test_a_pre_training_marks_its_rows_and_other_recipes_have_none(tmp_path):
    lut = paper_run(tmp_path / "lut", PretrainConfig, ["--recipe", "mae_vit_large"], "pretrain", None)
    other = paper_run(tmp_path / "other", PretrainConfig, ["--recipe", "quickstart"], "pretrain", None)
    (table,), homeless = paper_tables(open_runs([str(lut), str(other)]))
    assert table.heading.startswith("Table 1")
    assert [table.rows[1:][row][0] for row in table.marked] == ["MAE"]
    assert homeless == ["other (recipe quickstart)"]


def test_runs_of_a_table_are_shown_with_all_of_its_rows(tmp_path):
    for work, accuracy in (("ablation_lut", 50.0), ("ablation_mae", 40.0)):
        folder = tmp_path / "tables" / "tiny" / work / "seed_0" / "finetune"
        paper_run(folder, FinetuneConfig, ["--recipe", "digits_finetune"], "finetune", {"top1": accuracy})
    run = tmp_path / "tables" / "tiny" / "ablation_lut" / "seed_0" / "finetune"
    shown, homeless = paper_tables(open_runs([str(run)]))
    assert homeless == []
    first = next(each for each in shown if each.heading.startswith("Table 4a"))
    assert first.heading.endswith(", scale tiny")
    cells = [dict(zip(first.rows[0], row, strict=True)) for row in first.rows[1:]]
    assert [row["ft, ours"] for row in cells] == ["40.0", "–", "50.0"]
    assert cells[2]["ft, Δ ours"] == "+10.0"
    assert first.marked == [2]
