"""Names of classes that travel with a classifier: logits are put into the order of the data, or refused by name."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

import torch
from torch import nn

from util.runtime.errors import UserError
from util.weights.reader import shortened

SEGMENTERS = ("decode_head", "auxiliary_head")
HEADS = ("head", *SEGMENTERS)  # the parts of a model that give logits of classes


def has_other_classes(saved_names: Sequence[str] | None, data_names: Sequence[str] | None) -> bool:
    """Return True if both names are known and are not the same, in whatever order."""
    return None not in (saved_names, data_names) and sorted(composed(saved_names)) != sorted(composed(data_names))


def composed(names: Sequence[str]) -> list[str]:
    """Return names in Unicode's composed form; macOS writes an accent as a character of its own."""
    return [unicodedata.normalize("NFC", name) for name in names]


def class_permutation(
    saved_names: Sequence[str] | None, data_names: Sequence[str] | None, where: str = "the classifier"
) -> list[int] | None:
    """Return for each class of the data the place of its logit; None if the order is the same or names are unknown.

    `logits[:, class_permutation(saved, data)]` are in the order of the data.

    Args:
        where: flag and path of the classifier, which begin the message.

    Raises:
        UserError: the names differ, or are not unique and stand in another order.
    """
    if saved_names is None or data_names is None:
        return None
    saved_names, data_names = composed(saved_names), composed(data_names)
    if saved_names == data_names:
        return None
    only_saved, only_data = (sorted(set(a) - set(b)) for a, b in ((saved_names, data_names), (data_names, saved_names)))
    if only_saved or only_data or len(saved_names) != len(data_names):
        differences = [
            f"{len(names)} are only {place} ({shortened(names, most=3)})"
            for names, place in ((only_saved, "in the classifier"), (only_data, "in the data"))
            if names
        ] or [f"{len(saved_names)} in the classifier, {len(data_names)} in the data"]
        raise UserError(
            f"{where}: was trained on other classes than the data has: {'; '.join(differences)};"
            " give data with the same class names, or fine-tune on these"
        )
    places = {name: place for place, name in enumerate(saved_names)}
    if len(places) < len(saved_names):
        raise UserError(f"{where}: class names occur twice and stand in another order than the data's; rename them")
    return [places[name] for name in data_names]


def reorder_classes(model: nn.Module, permutation: Sequence[int] | None) -> None:
    """Permute the last layers of a Classifier, LinearProbe or UperNet in place, so that its logits follow the data.

    Args:
        permutation: see `class_permutation`; None changes nothing.
    """
    if permutation is None:
        return
    order = torch.as_tensor(permutation)
    parts = [model.get_classifier()] + [getattr(model, name).classifier for name in SEGMENTERS if hasattr(model, name)]
    layers = [layer for part in parts for layer in part.modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
    with torch.no_grad():
        for parameter in (parameter for layer in layers for parameter in layer.parameters()):
            parameter.copy_(parameter[order.to(parameter.device)])


def mapping_remark(permutation: Sequence[int] | None, saved_names: Sequence[str] | None) -> str:
    """Return the remark that the log line of an evaluated classifier ends with."""
    if permutation is not None:
        return "; the data has its classes in another order, logits are mapped by name"
    return "" if saved_names is not None else "; the file names no classes, they are taken in the order of the data"
