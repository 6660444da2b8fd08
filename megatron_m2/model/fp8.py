"""Block-FP8 as MiniMax-M2 was released: e4m3 weights with one fp32 factor per 128x128 block, named ``weight_scale_inv``."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# Shape suffixes: O outputs, I inputs of a weight; P, Q its blocks along each, ceil(O / block) and ceil(I / block).

BLOCK = (128, 128)
E4M3 = torch.float8_e4m3fn
_E4M3_MAX = torch.finfo(E4M3).max  # 448


def scale_shape(shape: tuple[int, ...], block: tuple[int, int] = BLOCK) -> tuple[int, int]:
    """(P, Q) of a weight of shape (O, I); a block at the edge may be partial."""
    return -(-shape[0] // block[0]), -(-shape[1] // block[1])


def _spread(scale_PQ: Tensor, shape: torch.Size, block: tuple[int, int]) -> Tensor:
    """[O, I]: every weight's own factor."""
    rows = scale_PQ.repeat_interleave(block[0], 0)[: shape[0]]
    return rows.repeat_interleave(block[1], 1)[:, : shape[1]]


def dequantize_blocks(weight_OI: Tensor, scale_PQ: Tensor, block: tuple[int, int] = BLOCK) -> Tensor:
    """``weight * scale`` of its block, fp32 [O, I].

    Args:
        weight_OI: e4m3 [O, I].
        scale_PQ: fp32 [ceil(O / block[0]), ceil(I / block[1])].

    Raises:
        ValueError: the scale does not fit the weight.
    """
    if tuple(scale_PQ.shape) != scale_shape(tuple(weight_OI.shape), block):
        raise ValueError(f"weight_scale_inv: {list(scale_PQ.shape)}, need {list(scale_shape(tuple(weight_OI.shape), block))} for a weight "
                         f"{list(weight_OI.shape)} in blocks of {list(block)}")
    return weight_OI.float().mul_(_spread(scale_PQ.float(), weight_OI.shape, block))


def quantize_blocks(weight_OI: Tensor, block: tuple[int, int] = BLOCK) -> tuple[Tensor, Tensor]:
    """Rounds each block to e4m3 with the factor that maps its largest magnitude to 448.

    Returns:
        e4m3 [O, I] and fp32 [P, Q], the factors to multiply by; a block of zeros has factor 1.
    """
    wide = weight_OI.float()
    blocks = scale_shape(tuple(wide.shape), block)
    padded = F.pad(wide, (0, blocks[1] * block[1] - wide.shape[1], 0, blocks[0] * block[0] - wide.shape[0]))
    largest_PQ = padded.abs().view(blocks[0], block[0], blocks[1], block[1]).amax((1, 3))
    scale_PQ = torch.where(largest_PQ > 0, largest_PQ / _E4M3_MAX, 1.0)
    return (wide / _spread(scale_PQ, wide.shape, block)).to(E4M3), scale_PQ
