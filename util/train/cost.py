"""What a model costs before it is run: parameters, FLOPs per image, memory."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from models_encoder import Encoder
from models_lut import LUT, MomentumEncoder, Student
from util.weights.layouts import part_of

_BATCH = 2  # BatchNorm needs two images; everything else is proportional


@dataclass(frozen=True)
class Cost:
    """The cost of one pre-training step."""

    student_parameters: int
    encoder_parameters: int
    momentum_parameters: int
    flops_per_image: int  # forward and backward, matrix products only, 2 per multiply-add
    state_bytes: int  # weights, gradients, AdamW's two moments, momentum encoder, all fp32
    activation_bytes_per_image: int  # saved for the backward pass, in fp32

    def memory_bytes(self, batch_size: int, bytes_per_number: int = 4) -> int:
        """Estimate for a step of `batch_size` images per process; workspace and fragmentation come on top."""
        return self.state_bytes + self.activation_bytes_per_image * batch_size * bytes_per_number // 4


def count_parameters(module: nn.Module) -> int:
    """Count the numbers that training changes."""
    return sum(p.numel() for p in module.parameters())


def pretrain_cost(
    model_arguments: dict, symmetric: bool, student_type: type[Student] = LUT, checkpoint_activations: bool = False
) -> Cost:
    """Count one step on the meta device, where tensors have shapes and no memory."""
    with torch.device("meta"):
        student = student_type(**model_arguments)
        momentum_encoder = MomentumEncoder(student) if model_arguments["heads"] is not None else None
        for block in [*student.blocks, *getattr(student, "decoder_blocks", ())] if checkpoint_activations else ():
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
        num_views = 2 if symmetric else 1
        views = torch.empty(num_views, _BATCH, student.in_chans, *student.shape["img_size"])
        noise = torch.empty(_BATCH, student.num_patches)
        saved: dict[int, torch.UntypedStorage] = {}  # by address: many saved tensors are views of one

        def keep(x: torch.Tensor) -> torch.Tensor:
            storage = x.untyped_storage()
            saved[storage._cdata] = storage
            return x

        with FlopCounterMode(display=False) as counter:
            targets = momentum_encoder(views, noise) if momentum_encoder is not None else None
            with saved_tensors_hooks(keep, lambda x: x):
                losses = student(views, noise, targets)
            (losses.mim + losses.bc).backward()

    weights = {p.untyped_storage()._cdata for p in student.parameters()}
    activations = sum(storage.nbytes() for address, storage in saved.items() if address not in weights)
    trained = count_parameters(student)
    followed = count_parameters(momentum_encoder) if momentum_encoder is not None else 0
    encoder = sum(p.numel() for name, p in student.named_parameters() if part_of(name) == "encoder")
    return Cost(
        student_parameters=trained,
        encoder_parameters=encoder,
        momentum_parameters=followed,
        flops_per_image=counter.get_total_flops() // _BATCH,
        state_bytes=4 * (4 * trained + followed),
        activation_bytes_per_image=activations // _BATCH,
    )


def features_flops(encoder: Encoder, shape: tuple[int, int, int]) -> int:
    """Matrix products of all patches of an image [C, H, W] on their way through an encoder on the meta device, forward
    alone, 2 per multiply-add."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        encoder.features(torch.empty(_BATCH, *shape, device="meta"))
    return counter.get_total_flops() // _BATCH


def classifier_flops(model: nn.Module, shape: tuple[int, int, int]) -> int:
    """Matrix products of a classifier, of images or of pixels, per image [C, H, W], forward and backward, 2 per
    multiply-add."""
    model = copy.deepcopy(model).to("meta").eval()  # synchronised BatchNorm would ask the other ranks
    images = torch.empty(_BATCH, *shape, device="meta")
    with FlopCounterMode(display=False) as counter:
        outputs = model(images)
        sum(x.sum() for x in (outputs if isinstance(outputs, tuple) else (outputs,))).backward()
    return counter.get_total_flops() // _BATCH
