"""Made folders of every set of Table 5 and a checkpoint, with the right scores in plain Python."""

from __future__ import annotations

import json
import math
from importlib import resources
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from models_vit import Classifier
from scripts import robustness as script

CPU = torch.device("cpu")
OURS = Path(script.__file__).parent.parent / "util" / "robustness" / "data"
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
        self.predicted = self.logits.argmax(dim=1).tolist()
        self.root, self.free = root, list(range(POOL))
        self.checkpoint = root / "tuned" / "checkpoint-best.pth"
        self.checkpoint.parent.mkdir(parents=True)
        torch.save({"model": self.model.state_dict()}, self.checkpoint)
        self.scored = {}  # column -> [(image, classes that are right)]
        self.make_all()

    def take(self, number):
        """Return other images than before."""
        taken, self.free = self.free[:number], self.free[number:]
        return taken

    def split(self, classes, number):
        """Return some images whose answer is among the classes, and as many whose answer is not."""
        among = [image for image in range(POOL) if self.predicted[image] in classes]
        others = [image for image in range(POOL) if self.predicted[image] not in classes]
        return among[:number], others[:number]

    def best(self, image, among=range(1000), logits=None):
        """Return the classes by their logits, in plain Python."""
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
        image_of_class = {c: n for images in corrected.values() for n in images for c in REAL[n]}
        for turn, image in enumerate(self.take(60)):
            label = self.predicted[image] if turn % 2 else self.best(image)[3 if turn % 4 else 700]
            number = (empty if turn % 5 == 0 and empty[label] else with_label)[label].pop()
            self.add_validation(image, number)
        for image in self.take(60):  # said what ReaL says, against the original label
            if self.predicted[image] in image_of_class:
                self.add_validation(image, image_of_class.pop(self.predicted[image]))

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
        """Save images of which two of three are right among the classes that compete."""
        self.scored[key] = []
        for turn, image in enumerate(self.take(30)):
            label = self.best(image, classes)[0 if turn % 3 else 2]
            self.save(image, folder, WNIDS[label], f"{key}_{turn}.png")
            self.scored[key].append((image, [label]))

    def make_objectnet(self):
        """Save images with a red border of two pixels, in folders of one class, of several, and of none that counts."""
        self.scored["objnet"] = []
        folder_of_class = {c: folder for folder, classes in OBJECTNET.items() for c in classes}
        among, others = self.split(folder_of_class, 40)
        for turn, image in enumerate(among + others):
            folder = folder_of_class.get(self.predicted[image], "coaster" if turn % 3 == 0 else "banana")
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
        """Save ImageNet-O's outliers in folders of classes of ImageNet's images; those images are the inliers."""
        classes = {right[0] for _, right in self.scored["in1k"]} & set(SUBSETS["o"])
        self.outliers = self.take(25)
        for turn, image in enumerate(self.outliers):
            label = sorted(classes)[turn % len(classes)]
            self.save(image, "imagenet-o", WNIDS[label], f"o_{turn}.png")
        self.inliers = [image for image, right in self.scored["in1k"] if right[0] in classes]

    def expected(self, key):
        """Return the column's metrics, in plain Python."""
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
        """Return the largest softmax probability among the 200 classes of ImageNet-O."""
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


def everything(made):
    """Return the flags for all of them."""
    return f"--data_root {made.root}/data --partial {FLAGS}"
