"""The hash of ids of an open vocabulary: any 64-bit integer becomes an id in [0, S).

    h(x) = mix(x + (seed + 1) · 0x9E3779B97F4A7C15),  id = ⌊h(x) / 2⌋ mod S,

in unsigned arithmetic modulo 2^64. ``mix`` is the finaliser of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014), a
bijection, so that h(0), h(increment), … are the outputs of its generator. Half of h(x) has 63 bits, so that signed
arithmetic divides it in every backend. ``csrc/rows.h`` and ``triton_kernels/id_rows.py`` have the same formula.
"""

from typing import Literal

import torch
from torch import Tensor

IdHash = Literal["splitmix64"]
# Seeds fit the int32 of ``csrc/lookup.h``.
MAX_HASH_SEED = 2**31 - 1

_INCREMENT = 0x9E3779B97F4A7C15
_FACTORS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)


def hash_offset(seed: int) -> int:
    """Returns (seed + 1) · 0x9E3779B97F4A7C15 mod 2^64, as int64 has its bits.

    Example:
        >>> hash_offset(0) % 2**64 == 0x9E3779B97F4A7C15
        True
    """
    return _as_int64((seed + 1) * _INCREMENT)


def hashed_ids(ids: Tensor, seed: int, num_ids: int) -> Tensor:
    """Returns the ids in [0, S) that any ids hash to, int64 of the same shape, by PyTorch.

    Args:
        ids (Tensor): int32 or int64, any values.
        seed (int): between 0 and 2^31 - 1.
        num_ids (int): S.

    Example:
        >>> hashed_ids(torch.tensor([0, 1, -1]), seed=0, num_ids=2**40).tolist()
        [123439343319, 1057711271520, 805536175632]
    """
    z = ids.to(torch.int64) + hash_offset(seed)
    z = (z ^ _shifted(z, 30)) * _as_int64(_FACTORS[0])
    z = (z ^ _shifted(z, 27)) * _as_int64(_FACTORS[1])
    z = z ^ _shifted(z, 31)
    return _shifted(z, 1) % num_ids


def _shifted(z: Tensor, bits: int) -> Tensor:
    """Returns z >> bits of the unsigned numbers whose bits ``z`` has."""
    return (z >> bits) & (2 ** (64 - bits) - 1)


def _as_int64(number: int) -> int:
    number %= 2**64
    return number - 2**64 if number >= 2**63 else number
