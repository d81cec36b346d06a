"""Partitions of a category set: an id selects one row in each of K small tables (arXiv:1909.02107, section 3)."""

from torchrec_qr.partitions.base import MAX_NUM_IDS, ClosedForm, Partitions
from torchrec_qr.partitions.chinese_remainder import ChineseRemainder
from torchrec_qr.partitions.explicit import ExplicitPartitions
from torchrec_qr.partitions.hashing import HashPartition
from torchrec_qr.partitions.mixed_radix import MixedRadix
from torchrec_qr.partitions.quotient_remainder import Grouping, QuotientRemainder

__all__ = [
    "MAX_NUM_IDS",
    "ChineseRemainder",
    "ClosedForm",
    "ExplicitPartitions",
    "Grouping",
    "HashPartition",
    "MixedRadix",
    "Partitions",
    "QuotientRemainder",
]
