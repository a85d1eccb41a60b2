"""Matrices in 4 or 8 bits, with a scale for each block of 64 elements of a row.

A part of the rows, or of whole blocks of columns, quantises to the same bytes as within the whole
matrix, so every mesh holds the same values. Four bits are NF4
(https://arxiv.org/abs/2305.14314): 16 levels of a normal distribution, two codes a byte, the first
in the upper half. Eight bits are integers from -127 to 127.
"""

from importlib.util import find_spec

import torch
from torch import Tensor
from torch.nn import functional as F

from torchtitan.utils.dtypes import at_least_float32

BLOCK = 64
"""Elements of a row that share a scale."""
_LARGEST = 127
_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
"""The levels, by code."""


def packed(bits: int) -> tuple[int, torch.dtype]:
    """Return how many codes an element of the stored codes holds, and its type."""
    return (2, torch.uint8) if bits == 4 else (1, torch.int8)


def quantize(weight: Tensor, bits: int, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return codes and scales, `[out, in / 64]`, of a matrix `[out, in]`.

    Computes in float32, whatever the type of `weight`, with the scales as they are stored.
    """
    blocks = weight.float().unflatten(1, (-1, BLOCK))
    scale = blocks.abs().amax(2).to(scale_dtype)
    divisor = scale.float().unsqueeze(2)
    blocks = blocks / divisor.masked_fill(divisor == 0, 1)
    if bits == 8:
        codes = (blocks * _LARGEST).round_().clamp_(-_LARGEST, _LARGEST)
        return codes.to(torch.int8).flatten(1), scale
    levels = torch.tensor(NF4, device=weight.device)
    codes = torch.bucketize(blocks, (levels[1:] + levels[:-1]) / 2, out_int32=True)
    codes = codes.to(torch.uint8).flatten(1)
    return codes[:, ::2] << 4 | codes[:, 1::2], scale


def dequantize(
    codes: Tensor, scale: Tensor, bits: int, dtype: torch.dtype, with_kernels: bool = False
) -> Tensor:
    """Return the matrix `[out, in]` in `dtype`, computed in at least float32 and rounded once.

    `with_kernels`: by bitsandbytes where it knows `dtype`, to the same bits; see `has_kernels`.
    """
    codes = codes.to(packed(bits)[1])  # FSDP of torch < 2.13 gathers integers in the compute type
    if with_kernels and bits == 4 and dtype in _KERNEL_DTYPES:
        shape = [codes.size(0), 2 * codes.size(1)]
        run = torch.ops.bitsandbytes.dequantize_4bit.default
        matrix: Tensor = run(codes, scale.float(), BLOCK, "nf4", shape, dtype)
        return matrix
    wide = at_least_float32(dtype)
    if bits == 8:
        values = codes.to(wide) / _LARGEST
    else:
        levels = torch.tensor(NF4, dtype=wide).to(codes.device, non_blocking=True)
        pairs = torch.cartesian_prod(levels, levels)  # [256, 2]
        values = F.embedding(codes.int(), pairs).flatten(1)
    blocks = values.unflatten(1, (-1, BLOCK)).mul_(scale.to(wide).unsqueeze(2))
    return blocks.flatten(1).to(dtype)


def has_kernels() -> bool:
    """Return whether bitsandbytes is installed and has kernels for this machine; imports it."""
    if find_spec("bitsandbytes") is None:
        return False
    import bitsandbytes.cextension as library

    return not isinstance(library.lib, library.ErrorHandlerMockBNBNativeLibrary)
