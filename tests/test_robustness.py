"""Table 5: made folders of every set, scored by hand, through the real command; layouts, wrong inputs, resuming."""

from __future__ import annotations

import json
import math
import shutil
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from sklearn.metrics import average_precision_score, roc_auc_score
from timm.data import create_transform, resolve_data_config

from conftest import colours, script_caller
from models_lut import LUT
from models_vit import Classifier
from ranks import Ranks
from scripts import robustness as script
from util.classifiers import open_classifier, without_border
from util.config import DataConfig, as_dict
from util.distributed import Processes
from util.pretrain_config import PretrainConfig
from util.results import read_results
from util.robustness import Look, accuracies, examples, outlier_scores
from util.robustness_sets import find_below, open_set, plan_tasks
from util.sources import FileSource, JoinedSource

CPU = torch.device("cpu")
OURS = Path(script.__file__).parent.parent / "util" / "robustness_data"
TIMM = resources.files("timm.data") / "_info"
WNIDS = (TIMM / "imagenet_synsets.txt").read_text().split()
REAL = json.loads((TIMM / "imagenet_real_labels.json").read_text())
VAL_LABELS = np.load(OURS / "imagenet_val_labels.npy").tolist()
OBJECTNET = json.loads((OURS / "objectnet_classes.json").read_text())
SI_SCORE = json.loads((OURS / "si_score_classes.json").read_text())
SUBSETS = {
    "a": [WNIDS.index(w) for w in (TIMM / "imagenet_a_synsets.txt").read_text().split()],
    "r": [WNIDS.index(w) for w in (TIMM / "imagenet_r_synsets.txt").read_text().split()],
    "o": [WNIDS.index(w) for w in (OURS / "imagenet_o_synsets.txt").read_text().split()],
}
POOL = 600  # random images to choose from
SIDE = 32  # pixels: the model's own size, so that nothing is resized
FLAGS = "--device cpu --amp fp32 --num_workers 0 --batch_size 7 --examples 0"
MEAN, STD = (torch.tensor(x).view(3, 1, 1) for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))


# ---- a classifier, images, and what it says of them -------------------------------------------------------


def normalised(images):
    """PIL images to what the model takes, without any code of ours."""
    pixels = torch.stack([torch.tensor(np.asarray(image)) for image in images])
    return (pixels.permute(0, 3, 1, 2).float() / 255 - MEAN) / STD


@torch.no_grad()
def logits_of(model, inputs):
    return torch.cat([model(part) for part in inputs.split(64)])


class Made:
    """A checkpoint, a pool of images with their logits, and folders of all sets with the right score of each column."""

    def __init__(self, root: Path):
        rng = np.random.default_rng(0)
        blobs = rng.integers(0, 256, (POOL, 4, 4, 3), dtype=np.uint8)
        self.images = [Image.fromarray(b).resize((SIDE, SIDE), Image.Resampling.BICUBIC) for b in blobs]
        torch.manual_seed(0)
        self.model = Classifier(
            dict(embed_dim=96, depth=1, num_heads=3),
            img_size=(SIDE, SIDE), patch_size=16, in_chans=3, num_classes=1000, head_std=0.3,
        ).eval()  # fmt: skip
        inputs = normalised(self.images)
        self.model.head.bias.data -= logits_of(self.model, inputs).mean(dim=0)  # answers of all kinds
        self.logits = logits_of(self.model, inputs)
        hidden = inputs.clone()
        hidden[:, :, 8:24, 8:24] = 0
        self.occluded = logits_of(self.model, hidden)
        self.said = self.logits.argmax(dim=1).tolist()
        self.root, self.free = root, list(range(POOL))
        self.checkpoint = root / "tuned" / "checkpoint-best.pth"
        self.checkpoint.parent.mkdir(parents=True)
        torch.save({"model": self.model.state_dict()}, self.checkpoint)
        self.scored = {}  # column -> [(image, classes that are right)]
        self.make_all()

    def take(self, number):
        """Other images than before."""
        taken, self.free = self.free[:number], self.free[number:]
        return taken

    def split(self, classes, number):
        """Some images whose answer is among the classes, and as many whose answer is not."""
        among = [image for image in range(POOL) if self.said[image] in classes]
        others = [image for image in range(POOL) if self.said[image] not in classes]
        return among[:number], others[:number]

    def best(self, image, among=range(1000), logits=None):
        """The classes by their logits, in plain Python."""
        row = (self.logits if logits is None else logits)[image].tolist()
        return sorted(among, key=lambda c: -row[c])

    def save(self, image, *path):
        path = self.root.joinpath("data", *path)
        path.parent.mkdir(parents=True, exist_ok=True)
        self.images[image].save(path)

    def make_all(self):
        self.make_imagenet()
        self.make_v2()
        for key, folder in (("a", "imagenet-a"), ("r", "imagenet-r")):
            self.make_wnids(key, folder, SUBSETS[key])
        self.make_wnids("sketch", "sketch", range(1000))
        self.make_objectnet()
        for key, folder, number in (("size", "object_size", 12), ("loc", "object_location", 8), ("rot", "rotation", 4)):
            self.make_si_score(key, folder, number)
        self.make_outliers()

    def make_imagenet(self):
        """Right for half of the images; some with several labels in ReaL, some with none, some that ReaL corrects."""
        self.scored["in1k"], self.scored["real"], self.scored["cocc"] = [], [], []
        with_label, empty, corrected = ({c: [] for c in range(1000)} for _ in range(3))
        for number, (label, real) in enumerate(zip(VAL_LABELS, REAL, strict=True)):
            (with_label if label in real else empty if not real else corrected)[label].append(number)
        said_anew = {c: n for found in corrected.values() for n in found for c in REAL[n]}
        for turn, image in enumerate(self.take(60)):
            label = self.said[image] if turn % 2 else self.best(image)[3 if turn % 4 else 700]
            number = (empty if turn % 5 == 0 and empty[label] else with_label)[label].pop()
            self.add_validation(image, number)
        for image in self.take(60):  # said what ReaL says, against the original label
            if self.said[image] in said_anew:
                self.add_validation(image, said_anew.pop(self.said[image]))

    def add_validation(self, image, number):
        label = VAL_LABELS[number]
        self.save(image, "imagenet", "val", WNIDS[label], f"ILSVRC2012_val_{number + 1:08d}.png")
        self.scored["in1k"].append((image, [label]))
        self.scored["cocc"].append((image, [label]))
        if REAL[number]:
            self.scored["real"].append((image, REAL[number]))

    def make_v2(self):
        """Half of them right; classes of one to three digits."""
        self.scored["v2"] = []
        for turn, image in enumerate(self.take(30)):
            label = self.best(image)[0] if turn % 2 else turn  # 0, 2, ..., 28
            self.save(image, "imagenetv2-matched-frequency-format-val", str(label), f"{turn}.png")
            self.scored["v2"].append((image, [label]))

    def make_wnids(self, key, folder, classes):
        """Two of three are right among the classes that compete."""
        self.scored[key] = []
        for turn, image in enumerate(self.take(30)):
            label = self.best(image, classes)[0 if turn % 3 else 2]
            self.save(image, folder, WNIDS[label], f"{key}_{turn}.png")
            self.scored[key].append((image, [label]))

    def make_objectnet(self):
        """In a red border of two pixels, in folders with one class and several, and in one that does not count."""
        self.scored["objnet"] = []
        meant = {c: folder for folder, classes in OBJECTNET.items() for c in classes}
        among, others = self.split(meant, 40)
        for turn, image in enumerate(among + others):
            folder = meant.get(self.said[image], "coaster" if turn % 3 == 0 else "banana")
            if folder != "coaster":
                self.scored["objnet"].append((image, OBJECTNET[folder]))
            framed = Image.new("RGB", (SIDE + 4, SIDE + 4), (255, 0, 0))
            framed.paste(self.images[image], (2, 2))
            path = self.root / "data" / "objectnet-1.0" / "images" / folder / f"{turn}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            framed.save(path)

    def make_si_score(self, key, folder, number):
        """Right where the answer has a label; else the label whose class is the most likely."""
        self.scored[f"si_{key}"] = []
        by_class = {c: label for label, c in SI_SCORE.items()}
        among, others = self.split(by_class, 12)
        for turn, image in enumerate(among[:number] + others):
            label = next(by_class[c] for c in self.best(image) if c in by_class)
            self.save(image, "si-score", folder, label, f"{turn}.png")
            self.scored[f"si_{key}"].append((image, [SI_SCORE[label]]))

    def make_outliers(self):
        """In folders of the classes that ImageNet's images have here, and against which they stand."""
        classes = {right[0] for _, right in self.scored["in1k"]} & set(SUBSETS["o"])
        self.outliers = self.take(25)
        for turn, image in enumerate(self.outliers):
            label = sorted(classes)[turn % len(classes)]
            self.save(image, "imagenet-o", WNIDS[label], f"o_{turn}.png")
        self.inliers = [image for image, right in self.scored["in1k"] if right[0] in classes]

    def expected(self, key):
        """The column's metrics, in plain Python."""
        if key == "o":
            scores = [(-self.confidence(image), True) for image in self.outliers]
            scores += [(-self.confidence(image), False) for image in self.inliers]
            return {"aupr": 100 * average_precision(scores), "images": len(scores), "bad_images": 0}
        logits = self.occluded if key == "cocc" else self.logits
        top1 = top5 = 0
        for image, right in self.scored[key]:
            ranked = self.best(image, SUBSETS.get(key, range(1000)), logits)
            top1 += ranked[0] in right
            top5 += any(c in right for c in ranked[:5])
        total = len(self.scored[key])
        return {"top1": 100 * top1 / total, "top5": 100 * top5 / total, "images": total, "bad_images": 0}

    def confidence(self, image):
        """The largest softmax probability among the 200 classes of ImageNet-O."""
        row = self.logits[image].tolist()
        powers = [math.exp(row[c]) for c in SUBSETS["o"]]
        return max(powers) / sum(powers)


def average_precision(scores):
    """Mean over the positives of the precision among all that score as high or higher."""
    positives = [score for score, positive in scores if positive]
    total = 0.0
    for threshold in positives:
        above = [positive for score, positive in scores if score >= threshold]
        total += sum(above) / len(above)
    return total / len(positives)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return Made(tmp_path_factory.mktemp("robustness"))


@pytest.fixture
def call(monkeypatch, capsys, tmp_path):
    """Call scripts/robustness.py from an empty folder: exit status, stdout, stderr."""
    return script_caller(monkeypatch, capsys, tmp_path, script)


@pytest.fixture(scope="module")
def whole(made, tmp_path_factory):
    """What all sets came to, by one command: results by column, stdout, the folder."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("whole")
        said = []
        patch.setattr(
            "builtins.print", lambda *parts, **rest: said.append(" ".join(map(str, parts)) + rest.get("end", "\n"))
        )
        patch.setattr(
            "sys.argv",
            ["robustness.py", *f"{made.checkpoint} {everything(made)} --examples 5 --output_dir {folder}".split()],
        )
        script.main()
    lines = {line["config"]["column"]: line for line in read_results(folder)}
    return lines, "".join(said), folder


def everything(made):
    return f"--data_root {made.root}/data --partial {FLAGS}"


# ---- numbers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", script.COLUMNS)
def test_each_set_is_scored_as_by_hand(made, whole, key):
    expected, found = made.expected(key), whole[0][key]["metrics"]
    assert {name: found[name] for name in expected} == pytest.approx(expected, abs=1e-6)
    score = expected["aupr" if key == "o" else "top1"]
    assert 5 < score < 95  # of neither all nor nothing, so that a wrong rule shows
    shown = next(line for line in whole[1].splitlines() if line.startswith("tuned/best  "))
    assert f"{score:.1f}*" in shown.split()


def test_the_sets_differ_where_a_rule_is_left_out(made):
    """The made folders would not score the same without each set's own rule."""

    def top1(key, logits=None, among=None, right=lambda r: r):
        hits = [
            made.best(i, among or SUBSETS.get(key, range(1000)), logits)[0] in right(r) for i, r in made.scored[key]
        ]
        return 100 * sum(hits) / len(hits)

    for key in ("a", "r"):  # all 1,000 classes compete
        assert top1(key, among=range(1000)) < made.expected(key)["top1"]
    assert top1("cocc", made.logits) != made.expected("cocc")["top1"]
    assert top1("objnet", right=lambda r: r[:1]) < made.expected("objnet")["top1"]  # one class per folder
    text_order = sorted(map(str, range(1000)))
    assert top1("v2", right=lambda r: [text_order.index(str(r[0]))]) < made.expected("v2")["top1"]
    assert len(made.scored["real"]) < len(made.scored["in1k"])
    assert made.expected("real")["top1"] != made.expected("in1k")["top1"]


def test_examples_are_drawn_as_the_model_sees_them(made, whole):
    assert Image.open(whole[2] / "examples-tuned_best.png").size[1] > 1000  # twelve rows
    look = Look(Processes(0, 1, CPU), None, 8, DataConfig(num_workers=0), occlusion=0.5, fill="black")
    model = open_classifier(str(made.checkpoint), "student", "", (), None, CPU, 1000, "CHECKPOINT")
    paths = {"imagenet": f"{made.root}/data/imagenet", "objectnet": f"{made.root}/data/objectnet-1.0"}
    tasks, _ = plan_tasks(["cocc", "objnet"], paths, partial=True)
    hidden, framed = (examples(model, task, 4, look) for task in tasks)
    assert len(hidden) == len(framed) == 4
    assert not any(example.image[8:24, 8:24].any() for example in hidden)
    known = {np.asarray(image).tobytes(): image_id for image_id, image in enumerate(made.images)}
    for example in framed:  # no border left
        assert example.said == made.said[known[example.image.tobytes()]]


def test_the_outliers_score_is_scikit_learns(made, whole):
    scores = [-made.confidence(image) for image in made.outliers + made.inliers]
    is_outlier = [1] * len(made.outliers) + [0] * len(made.inliers)
    found = whole[0]["o"]["metrics"]
    assert found["aupr"] == pytest.approx(100 * average_precision_score(is_outlier, scores), abs=1e-6)
    assert found["auroc"] == pytest.approx(100 * roc_auc_score(is_outlier, scores), abs=1e-6)


@given(st.lists(st.tuples(st.integers(0, 6), st.booleans()), min_size=2, max_size=30))
def test_average_precision_of_any_scores_and_ties(pairs):
    pairs = [*pairs, (3, True), (2, False)]
    confidence, outlier = (np.array(x) for x in zip(*pairs, strict=True))
    slow = average_precision([(-c, o) for c, o in pairs])
    assert outlier_scores(outlier, confidence / 7)["aupr"] == pytest.approx(100 * slow)


@given(st.lists(st.tuples(st.lists(st.integers(0, 9), min_size=1, max_size=4), st.permutations(range(10))), min_size=1))
def test_accuracies_of_any_answers(images):
    answers, ranked = zip(*images, strict=True)
    found = accuracies([tuple(a) for a in answers], torch.tensor([r[:5] for r in ranked]))
    first = [r[0] in a for a, r in images]
    five = [bool(set(r[:5]) & set(a)) for a, r in images]
    assert found == pytest.approx({"top1": 100 * np.mean(first), "top5": 100 * np.mean(five)})


def test_another_occlusion(made, call):
    status, _, said = call(
        f"{made.checkpoint} {everything(made)} --columns cocc --occlusion 0.25 --occlusion_fill black"
    )
    assert (status, said) == (0, "")
    inputs = normalised(made.images)
    inputs[:, :, 12:20, 12:20] = -MEAN / STD
    logits = logits_of(made.model, inputs)
    hits = [made.best(i, logits=logits)[0] in right for i, right in made.scored["cocc"]]
    (line,) = read_results("output/robustness")
    assert line["metrics"]["top1"] == pytest.approx(100 * sum(hits) / len(hits))
    assert line["config"]["occlusion"] == 0.25


@pytest.mark.slow
def test_two_processes_count_each_image_once(made, whole, tmp_path):
    columns = "real a o"
    command = f"{script.__file__} {made.checkpoint} {everything(made)} --output_dir {tmp_path} --columns {columns}"
    with Ranks(command.split(), number=2) as ranks:
        assert [status for status, _ in ranks.finish()] == [0, 0]
    found = {line["config"]["column"]: line["metrics"] for line in read_results(tmp_path)}
    assert found.keys() == set(columns.split())
    for key, metrics in found.items():
        assert metrics == pytest.approx(whole[0][key]["metrics"], abs=1e-4)


# ---- the table, going on, missing sets --------------------------------------------------------------------


def test_the_table_has_the_papers_rows_and_ours(made, whole, call, tmp_path):
    _, _, folder = whole
    status, shown, _ = call(f"--output_dir {folder} --format markdown --picture table.png")
    assert status == 0
    titles, _, *rows = [line.strip("| ").split(" | ") for line in shown.splitlines() if line.startswith("|")]
    assert [t.strip() for t in titles] == ["method", "numbers", "IN-1k", "IN-V2", "IN-Real", "IN-A", "IN-O", "Sketch",
                                           "IN-R", "Cocc", "ObjNet", "SI-size", "SI-loc", "SI-rot"]  # fmt: skip
    assert [row[0] for row in rows] == ["DINO†", "iBOT†", "MAE", "data2vec", "LUT", "tuned/best"]
    assert rows[4][2:] == [
        "84.2",
        "74.2",
        "88.6",
        "42.5",
        "64.1",
        "38.2",
        "52.1",
        "79.2",
        "38.9",
        "59.8",
        "40.7",
        "44.9",
    ]
    assert [row[1] for row in rows] == ["paper"] * 5 + ["ours"]
    assert "* ObjNet of tuned/best: " in shown
    assert Image.open(tmp_path / "table.png").size[0] > 500
    status, shown, _ = call(f"--output_dir {folder} --format latex")
    assert "\\begin{tabular}{llrrrrrrrrrrrr}" in shown


def test_what_has_finished_is_not_done_again(made, call, tmp_path):
    data = tmp_path / "data"
    for folder in ("imagenetv2-matched-frequency-format-val", "sketch"):
        shutil.copytree(made.root / "data" / folder, data / folder)
    bad = next((data / "sketch").rglob("*.png"))
    whole_image = bad.read_bytes()
    bad.write_bytes(whole_image[:100])
    command = f"{made.checkpoint} --data_root {data} --partial {FLAGS} --output_dir out"
    status, shown, said = call(command)
    assert status == 2
    assert str(bad) in said
    assert "--on_bad_image skip" in said
    assert [line["config"]["column"] for line in read_results("out")] == ["v2"]  # it was finished before

    bad.write_bytes(whole_image)
    status, shown, _ = call(command)
    assert status == 0
    assert "done before: IN-V2" in shown
    assert [line["config"]["column"] for line in read_results("out")] == ["v2", "sketch"]
    call(command)
    assert len(read_results("out")) == 2
    call(f"{command} --again --columns v2")
    assert [line["config"]["column"] for line in read_results("out")] == ["v2", "sketch", "v2"]


def test_another_model_of_the_same_name_is_another_row(made, call, tmp_path):
    checkpoint = tmp_path / "tuned" / "checkpoint-best.pth"
    checkpoint.parent.mkdir()
    shutil.copy(made.checkpoint, checkpoint)
    command = f"{checkpoint} {everything(made)} --columns v2"
    call(command)
    state = torch.load(checkpoint, weights_only=True)
    state["model"]["head.bias"] += torch.linspace(0, 100, 1000)
    torch.save(state, checkpoint)
    _, shown, _ = call(command)
    assert "done before" not in shown
    rows = [line for line in shown.splitlines() if line.startswith("tuned/best (")]
    assert len(rows) == 2
    assert rows[0].split()[-1] == rows[1].split()[-1] == "–"


def test_missing_sets_are_missing(made, call):
    v2 = made.root / "data" / "imagenetv2-matched-frequency-format-val"
    status, shown, _ = call(f"{made.checkpoint} --imagenet_v2 {v2} --partial {FLAGS}")
    assert status == 0
    row = next(line for line in shown.splitlines() if line.startswith("tuned/best  "))
    assert row.split()[2:] == ["–", f"{made.expected('v2')['top1']:.1f}*", *["–"] * 10]
    assert "missing: IN-Real, --imagenet is not given" in shown
    status, shown, _ = call(f"{made.checkpoint} --imagenet_v2 {v2} --columns in1k --dry_run")
    assert (status, "to do" in shown) == (0, False)


def test_bad_images_are_left_out_and_counted(made, call, tmp_path):
    sketch = tmp_path / "sketch"
    shutil.copytree(made.root / "data" / "sketch", sketch)
    (sketch / next(sketch.iterdir()).name / "broken.png").write_bytes(b"no image")
    status, shown, _ = call(f"{made.checkpoint} --sketch {sketch} --partial --on_bad_image skip {FLAGS}")
    assert status == 0
    (line,) = read_results("output/robustness")
    assert line["metrics"] == pytest.approx(made.expected("sketch") | {"bad_images": 1})
    assert "1 unreadable images left out" in shown


# ---- layouts ----------------------------------------------------------------------------------------------


def test_validation_images_in_one_folder(made, call, tmp_path):
    flat = tmp_path / "flat"
    flat.mkdir()
    for path in (made.root / "data" / "imagenet" / "val").rglob("*.png"):
        shutil.copy(path, flat)
    status, _, _ = call(f"{made.checkpoint} --imagenet {flat} --columns in1k real --partial {FLAGS}")
    assert status == 0
    for line in read_results("output/robustness"):
        assert line["metrics"] == pytest.approx(made.expected(line["config"]["column"]))


def test_validation_images_without_numbers_have_no_real_labels(made, call, tmp_path):
    for i, path in enumerate(sorted((made.root / "data" / "imagenet" / "val").rglob("*.png"))):
        target = tmp_path / "named" / path.parent.name / f"{i}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    _, shown, _ = call(f"{made.checkpoint} --imagenet {tmp_path}/named --columns in1k real --partial {FLAGS}")
    (line,) = read_results("output/robustness")
    assert line["metrics"] == pytest.approx(made.expected("in1k"))
    assert "missing: IN-Real, the names of --imagenet's images have no number" in shown


def test_known_labels():
    assert (WNIDS[VAL_LABELS[0]], WNIDS[VAL_LABELS[1]]) == ("n01751748", "n09193705")  # sea snake, alp
    assert set(map(VAL_LABELS.count, range(1000))) == {50}
    agree = [VAL_LABELS[n] in REAL[n] for n in range(50_000) if REAL[n]]
    assert len(agree) == 46_837
    assert 0.89 < np.mean(agree) < 0.91
    assert [len(SUBSETS[key]) for key in "aro"] == [200] * 3
    assert (len(OBJECTNET), sum(map(len, OBJECTNET.values()))) == (113, 125)


def complete(folder: Path, names, each: int, ending=".JPEG") -> Path:
    """Empty files: only names are looked at."""
    for name in names:
        (folder / name).mkdir(parents=True)
        for i in range(each):
            (folder / name / f"{i}{ending}").touch()
    return folder


def test_complete_sets_need_no_leave(tmp_path):
    images = open_set("imagenet_o", str(complete(tmp_path / "o", [WNIDS[c] for c in SUBSETS["o"]], 10)), partial=False)
    assert (len(images.places), images.lacking) == (2000, "")
    v2 = open_set("imagenet_v2", str(complete(tmp_path / "v2", map(str, range(1000)), 10)), partial=False)
    assert (len(v2.places), v2.lacking) == (10_000, "")
    by_place = {
        v2.source.class_names[label]: answer for label, answer in zip(v2.source.labels, v2.answers, strict=True)
    }
    assert all(answer == (int(name),) for name, answer in by_place.items())
    released = (OURS / "si_score_released.txt").read_text().split()
    assert open_set("si_size", str(complete(tmp_path / "area", released, 1)), partial=False).lacking == ""


def test_sets_are_found_under_their_usual_names(tmp_path):
    names = "ImageNet imagenet-v2 ImageNet-Sketch objectnet-1.0 SI-Score/object_size si-score/location20_area02_min0pc"
    for name in (*names.split(), "other"):
        (tmp_path / name).mkdir(parents=True, exist_ok=True)
    (tmp_path / "si-score" / "location20_area02_min0pc").rename(tmp_path / "SI-Score" / "location20_area02_min0pc")
    (tmp_path / "si-score").rmdir()
    found = {flag: Path(path).name for flag, path in find_below(tmp_path).items()}
    assert found == {
        "imagenet": "ImageNet", "imagenet_v2": "imagenet-v2", "sketch": "ImageNet-Sketch", "objectnet": "objectnet-1.0",
        "si_size": "object_size", "si_location": "location20_area02_min0pc",
    }  # fmt: skip


def test_joined_sources(tmp_path):
    paths = [tmp_path / name for name in "abc"]
    for path in paths:
        path.write_bytes(path.name.encode())
    joined = JoinedSource(
        [FileSource([str(p)], None, None) for p in paths[:1]] + [FileSource([*map(str, paths[1:])], None, None)]
    )
    assert [joined.read(i) for i in range(len(joined))] == [b"a", b"b", b"c"]
    assert joined.name(2) == str(paths[2])


def test_a_border_is_cut_off():
    image = torch.arange(3 * 7 * 6).view(3, 7, 6)
    assert torch.equal(without_border(image, lambda x: x, 2), image[:, 2:5, 2:4])
    with pytest.raises(ValueError, match="6 x 4 pixels are all border"):
        without_border(image[:, :4], lambda x: x, 2)


# ---- models -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["test_vit", "test_resnet"])
def test_timms_models_see_what_timm_shows_them(tmp_path, name):
    torch.manual_seed(1)
    model = timm.create_model(name).eval()
    torch.save({"state_dict": {f"module.{n}": x for n, x in model.state_dict().items()}}, tmp_path / "timm.pth")
    found = open_classifier(f"timm:{name}={tmp_path}/timm.pth", "student", "", (), None, CPU, 1000, "CHECKPOINT")
    picture = colours(200, 300)
    config = resolve_data_config(model=model, use_test_size=True)
    with torch.no_grad():
        expected = model(create_transform(**config, is_training=False)(picture)[None])
        pixels = found.view(torch.tensor(np.asarray(picture)).permute(2, 0, 1))
        logits = found.model(found.normalise(pixels[None]))
    assert torch.allclose(logits, expected, atol=1e-4)
    assert found.label == name


def test_timms_models_take_another_size():
    common = (None, CPU, 1000, "CHECKPOINT")
    found = open_classifier("timm:test_vit", "student", "tiny", (96, 64), *common)
    assert found.model(torch.zeros(1, 3, 96, 64)).shape == (1, 1000)
    assert found.view(torch.zeros(3, 50, 50, dtype=torch.uint8)).shape == (3, 96, 64)
    assert found.said == "timm:test_vit: random weights"


def test_the_moving_average_of_a_run(made, tmp_path):
    average = {n: x + 1 for n, x in made.model.state_dict().items()}
    torch.save({"model": made.model.state_dict(), "model_ema": average}, tmp_path / "tuned.pth")
    for weights, state in (("student", made.model.state_dict()), ("momentum", average)):
        found = open_classifier(f"{tmp_path}/tuned.pth", weights, "", (), None, CPU, 1000, "CHECKPOINT")
        assert torch.equal(found.model.head.bias, state["head.bias"])


# ---- wrong inputs -----------------------------------------------------------------------------------------


def wrong_inputs(made, tmp_path):
    """Flags -> what the line has to say."""
    data, tuned = made.root / "data", made.checkpoint
    v2 = data / "imagenetv2-matched-frequency-format-val"
    val = data / "imagenet" / "val"
    other_classes = tmp_path / "ten.pth"
    state = made.model.state_dict()
    torch.save(
        {"model": state | {"head.weight": state["head.weight"][:10], "head.bias": state["head.bias"][:10]}},
        other_classes,
    )
    settings = PretrainConfig(model="lut_vit_nano_patch4", patch_size=8, decoder_depth=1, head_mlp_dim=16)
    pretrained = tmp_path / "checkpoint-3.pth"
    torch.save({"model": LUT(**settings.model_arguments).state_dict(), "config": as_dict(settings)}, pretrained)
    no_file = tmp_path / "notes.pth"
    no_file.write_text("no checkpoint")
    resnet = tmp_path / "resnet.pth"
    torch.save(timm.create_model("test_resnet", num_classes=7).state_dict(), resnet)
    a = complete(tmp_path / "some", [WNIDS[c] for c in SUBSETS["a"]], 1)
    train = complete(tmp_path / "train", WNIDS[:2], 3)
    misplaced = tmp_path / "misplaced" / WNIDS[7]
    misplaced.mkdir(parents=True)
    (misplaced / "ILSVRC2012_val_00000001.JPEG").touch()
    twice = complete(tmp_path / "twice", ["x", "y"], 0)
    for name in "xy":
        (twice / name / "ILSVRC2012_val_00000009.JPEG").touch()
    si = data / "si-score" / "object_location"
    return {
        f"{tuned} --imagenet_v2 {val}": "ImageNet-1k's validation images (ILSVRC2012_val_...), not ImageNet-V2",
        f"{tuned} --imagenet_v2 {data}/sketch": "folders are unknown there (n0",
        f"{tuned} --imagenet {v2}": "is not ImageNet-1k's validation images; ",
        f"{tuned} --imagenet_r {a} --partial": "is not ImageNet-R; ",
        f"{tuned} --imagenet_r {a}": "it looks like ImageNet-A",
        f"{tuned} --sketch {a}": "holds 200 of 1000 classes and 200 of 50889 images of ImageNet-Sketch",
        f"{tuned} --imagenet_v2 {v2}": "--partial scores what is there",
        f"{tuned} --imagenet {a}": "it looks like ImageNet-A",
        f"{tuned} --imagenet {train}": "holds 2 of 1000 classes and 6 of 50000 images",
        f"{tuned} --imagenet {tmp_path}/misplaced --partial": "1 of 1 images lie in another folder than their class's",
        f"{tuned} --imagenet {twice} --partial": "holds 1 images twice",
        f"{tuned} --objectnet {a}": "is not ObjectNet; 200 of its 200 folders are unknown there",
        f"{tuned} --si_size {si}": "object_location: is named as the images of --si_location are",
        f"{tuned} --si_size {a}": "is not SI-Score, size; ",
        f"{tuned} --sketch {tmp_path}/nowhere": "nowhere: there is no such file or folder",
        f"{tuned} --data_root {tmp_path}/nowhere": "--data_root",
        f"{tuned} --data_root {val}": "holds none of the sets under its usual name",
        f"{tuned}": "--data_root: is missing, give it or one of --imagenet",
        f"{tuned} --imagenet_o {data}/imagenet-o": "is set against ImageNet's images, add --imagenet",
        f"{tuned} --imagenet_v2 {v2} --columns si_lok": "--columns si_lok: unknown, did you mean si_loc?",
        f"{tuned} --imagenet_v2 {v2} --occlusion 0": "--occlusion 0.0: must lie in (0, 1]",
        f"{tuned} --imagenet_v2 {v2} --picture out.txt": "--picture out.txt: give the name of a .png",
        f"{tuned} --imagenet_v2 {v2} --partial --output_dir {no_file}": "notes.pth: cannot be written",
        f"{tuned} --imagenet_v2 {v2} --weights momentum": "holds no momentum encoder",
        f"{other_classes} --imagenet_v2 {v2}": "has 10 classes, give a classifier of ImageNet-1k's 1000",
        f"{pretrained} --imagenet_v2 {v2}": "holds an encoder without a classifier, fine-tune it first",
        f"{no_file} --imagenet_v2 {v2}": "cannot be read as a checkpoint",
        f"{tmp_path}/nothing.pth --imagenet_v2 {v2}": "nothing.pth: there is no such file",
        f"timm:vit_bose_patch16_224 --imagenet_v2 {v2}": "did you mean vit_base_patch16_224?",
        f"timm:test_resnet={resnet} --imagenet_v2 {v2}": "has 7 classes",
        f"timm:test_resnet={tuned} --imagenet_v2 {v2}": "does not fit timm's test_resnet",
        f"timm:test_vit --imagenet_v2 {v2} --input_size 50": "--input_size 50: no multiple of the patch, 16 pixels",
        "": "holds no results yet, give a CHECKPOINT",
    }


def test_wrong_inputs_are_one_line(made, call, tmp_path):
    unlike = {}
    for flags, message in wrong_inputs(made, tmp_path).items():
        status, _, said = call(f"{flags} {FLAGS}")
        one_line = said.startswith("robustness.py: error: ") and said.count("\n") == 1
        if not (status == 2 and one_line and message in said):
            unlike[message] = (status, said)
    assert not unlike
    assert not Path("output").exists()


def test_an_image_that_is_all_border(made, call, tmp_path):
    path = tmp_path / "objectnet" / "banana" / "1.png"
    path.parent.mkdir(parents=True)
    Image.new("RGB", (4, 9)).save(path)
    status, _, said = call(f"{made.checkpoint} --objectnet {tmp_path}/objectnet --partial {FLAGS}")
    assert (status, "4 x 9 pixels are all border" in said, str(path) in said) == (2, True, True)
    status, _, said = call(f"{made.checkpoint} --objectnet {tmp_path}/objectnet --partial --on_bad_image skip {FLAGS}")
    assert (status, "nothing of objnet is left" in said) == (2, True)
