"""Partitions of a set of ids: an id selects one row in each of K small tables (arXiv:1909.02107, section 3)."""

from torchrec_qr.partitions.bound import BoundPartitions, ClosedForm
from torchrec_qr.partitions.checks import MAX_NUM_EMBEDDINGS
from torchrec_qr.partitions.chinese_remainder import ChineseRemainder
from torchrec_qr.partitions.class_map import ClassMap
from torchrec_qr.partitions.explicit import ExplicitPartitions
from torchrec_qr.partitions.hashing import HashPartition
from torchrec_qr.partitions.mixed_radix import MixedRadix
from torchrec_qr.partitions.quotient_remainder import Grouping, QuotientRemainder
from torchrec_qr.partitions.spec import PartitionSpec

__all__ = [
    "MAX_NUM_EMBEDDINGS",
    "BoundPartitions",
    "ChineseRemainder",
    "ClassMap",
    "ClosedForm",
    "ExplicitPartitions",
    "Grouping",
    "HashPartition",
    "MixedRadix",
    "PartitionSpec",
    "QuotientRemainder",
]
