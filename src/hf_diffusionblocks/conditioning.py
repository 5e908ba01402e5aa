"""Noise conditioning for backbones that have none: an embedding of sigma, and zero-initialised adaptive modulation.

A Llama or ViT layer is ``h + attention(norm(h))`` and ``h + mlp(norm(h))``. Modulation (AdaLN, DiT, arXiv 2212.09748,
section 3.2) shifts and scales what follows each norm and gates what each branch adds:

.. math:: h + (1 + g) \\odot f\\big((1 + s) \\odot norm(h) + t\\big)

with (t, s, g) a linear function of the embedded noise level. At zero weights it is the layer itself, so a converted
network starts as the network it was (paper, arXiv 2506.14202, App. B).
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn


class NoiseEmbedding(nn.Module):
    """Fourier features of ``c_noise = ln(sigma) / 4``, then two linear layers.

    Args:
        dim: width of the embedding.
        num_frequencies: how many, from 1/4 to 64 radians per unit of c_noise, evenly in the logarithm.
    """

    def __init__(self, dim: int, num_frequencies: int = 16):
        super().__init__()
        self.num_frequencies = num_frequencies
        self.linear_1 = nn.Linear(2 * num_frequencies + 1, dim)
        self.linear_2 = nn.Linear(dim, dim)

    def forward(self, c_noise: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape dim"]:
        """Embed noise levels of any shape."""
        exponents = torch.linspace(-2, 6, self.num_frequencies, device=c_noise.device)
        angles = c_noise.float()[..., None] * 2.0**exponents
        features = torch.cat([angles.cos(), angles.sin(), c_noise.float()[..., None]], dim=-1)
        hidden = nn.functional.silu(self.linear_1(features.to(self.linear_1.weight.dtype)))
        return nn.functional.silu(self.linear_2(hidden))


class Modulation(nn.Linear):
    """Shift, scale and gate for a layer's two branches, from the embedded noise level; all zero at the start."""

    def __init__(self, dim: int, hidden_size: int):
        super().__init__(dim, 6 * hidden_size)

    def forward(self, embedded: Float[Tensor, "*shape dim"]) -> tuple[Tensor, ...]:
        """(shift, scale, gate) of the attention and of the MLP, each [*shape, hidden_size]."""
        return super().forward(embedded).chunk(6, dim=-1)

    def parts(self, embedded: Float[Tensor, "*shape dim"], start: int, count: int) -> tuple[Tensor, ...]:
        """So many of the six, from a first one on."""
        rows = slice(start * self.out_features // 6, (start + count) * self.out_features // 6)
        return nn.functional.linear(embedded, self.weight[rows], self.bias[rows]).chunk(count, dim=-1)
