"""SimMIM (Xie et al., CVPR 2022) as the method under LUT, Table A of the paper; letters as in models_lut.py.

It differs from MAE in four points: mask tokens pass through the encoder, the decoder is one linear layer, squares of
several patches are hidden together, and L_MIM is the mean absolute error of the hidden pixels, which are normalised as
all images are (with --norm_pix_loss also within their patch). These details are SimMIM's own; the LUT paper says only
that SimMIM takes MAE's place in its framework (Appendix B.1). So the ViT is the framework's, with fixed sine positions
and MAE's initialisation, without SimMIM's relative position biases, layer scale and stochastic depth.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models_encoder import Masking, take
from models_lut import LUT, Student


class SimMIM(Student):
    """LUT on SimMIM.

    As on MAE, L_BC takes the mean of the *visible* patch tokens (or cls). Here they come from the full-length sequence,
    in which they have attended to mask tokens. The context encoder sees whole images and has no mask token.

    Args:
        heads, head_depth, predictor_depth: see `add_heads`.
        student: the arguments of `Student` and `Encoder`.
    """

    pixel_loss = staticmethod(F.l1_loss)

    def __init__(self, *, heads: Mapping | None = None, head_depth: int = 2, predictor_depth: int = 2, **student):
        super().__init__(**student)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, self.embed_dim))
        if self.reconstructs:
            self.decoder = nn.Linear(self.embed_dim, self.patch_size**2 * self.in_chans)
        self.initialise()
        self.add_heads(heads, head_depth, predictor_depth, token_width=self.embed_dim)

    def encode_views(self, patches: Tensor, masking: Masking) -> Tensor:
        """Encode [G*B, L, P] to [G*B, 1 + L, D], each view in the order cls, visible patches, mask tokens.

        Attention ignores the order of its tokens; hidden patches are not embedded.
        """
        num_views = len(patches) // len(masking.shuffle)
        order = torch.cat([masking.order(view) for view in range(num_views)])  # [G*B, L]
        visible = self.embed(take(patches, order[:, : self.num_visible]))
        hidden = self.mask_token.to(visible.dtype).expand(len(order), order.shape[1] - self.num_visible, -1)
        positions = take(self.pos_embed[:, 1:].expand(len(order), -1, -1), order)
        return self.attend(torch.cat([visible, hidden], dim=1) + positions)

    def decode(self, latent: Tensor, masking: Masking, hidden_only: bool = False) -> Tensor:
        """Return the latents of view u [B, 1 + L, D] unchanged, or those of the mask tokens, [B, L - V, D]."""
        return latent[:, 1 + masking.num_visible :] if hidden_only else latent

    def to_pixels(self, tokens: Tensor) -> Tensor:
        """Predict patch vectors [B, N, P] from tokens [B, N, D]."""
        return self.decoder(tokens)

    def group_matcher(self, coarse: bool = False) -> dict:
        """Name the depth of each parameter as `Encoder` does; the mask token belongs to the stem, where it enters."""
        return super().group_matcher(coarse) | dict(stem=r"^cls_token|^pos_embed|^patch_embed|^mask_token")


METHODS: dict[str, type[Student]] = {"mae": LUT, "simmim": SimMIM}
