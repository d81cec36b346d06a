"""The ids of a batch before the input dist: checked, in range, and as row codes of tables whose rows are split.

Ids that are hashed are so here if the rows of their table are split, or else by the lookup.
"""

from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor
from torchrec.distributed.embedding_types import ShardedEmbeddingTable
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_qr.distributed.customized_kernel import layout_or_none
from torchrec_qr.distributed.layout import RowCode, ShardLayout
from torchrec_qr.id_hash import hashed_ids
from torchrec_qr.ids import IdSpace, bounded_ids, check_type, raise_if_outside
from torchrec_qr.late_errors import raise_pending
from torchrec_qr.ops.arguments import SentFeature
from torchrec_qr.ops.backends import cpu
from torchrec_qr.ops.description import kernels_have
from torchrec_qr.ops.dispatch import SendIds, available
from torchrec_qr.partitions.class_map import class_map_on


class PrepareIds:
    """Brings the ids of compositional tables into range, and, if ``encode``, encodes those of split rows."""

    def __init__(self, tables: list[ShardedEmbeddingTable], device: torch.device | None, encode: bool = True) -> None:
        self._tables = [layout_or_none(t) for t in tables]
        self._encode = encode
        self._class_maps: dict[str, Tensor] = {}
        for at in self._tables:
            if encode and at is not None and at.splits_rows:
                class_map = class_map_on(at.config.bound_partitions, device)
                if class_map is not None:
                    self._class_maps[at.config.name] = class_map

    def __call__(self, features: KeyedJaggedTensor) -> KeyedJaggedTensor:
        if not any(self._tables):
            return features
        raise_pending(wait=False)
        values = features.values()
        only_checked = [self._is_only_checked(at, values.device) for at in self._tables]
        if values.dtype == torch.int64 and all(only_checked):
            if values.device.type == "cpu":
                self._check(features)
            return features
        on_gpu = values.device.type == "cuda" and available(values.device)
        return KeyedJaggedTensor(
            keys=features.keys(),
            values=self._sent_by_kernel(features) if on_gpu else self._sent(features),
            weights=features.weights_or_none(),
            lengths=features.lengths(),
            offsets=features.offsets(),
            stride=features.stride(),
            length_per_key=features.length_per_key(),
        )

    def _sent_by_kernel(self, features: KeyedJaggedTensor) -> Tensor:
        """Prepares all ids in one launch."""
        ids, starts = features.values(), features.offset_per_key()
        spaces = [None if at is None else _id_space(at, f) for at, f in zip(self._tables, features.keys(), strict=True)]
        check_type(ids, next(space for space in spaces if space is not None))

        def raise_at(number: int) -> None:
            at = next(i for i, end in enumerate(starts[1:]) if number < end)
            space = spaces[at]
            assert space is not None, "no id of a plain table is refused"
            value = int(ids[number])
            raise_if_outside(value, value, space)

        return self._send(ids, features.offsets(), max(features.length_per_key()), raise_at)

    @cached_property
    def _send(self) -> SendIds:
        return SendIds([self._as_sent(at) for at in self._tables])

    def _as_sent(self, at: ShardLayout | None) -> SentFeature:
        if at is None:
            return SentFeature(1, "unchecked")
        config = at.config
        if not self._encode or not at.splits_rows:
            # Leave the check to the kernels of the lookup, if there are some.
            is_only_checked = self._is_only_checked(at, torch.device("cuda"))
            return SentFeature(config.num_embeddings, "unchecked" if is_only_checked else config.id_policy)
        class_map = self._class_maps.get(config.name)
        of_base = None if class_map is None else class_map[config.base_partition]
        # Read nothing past the end of a map, whatever the policy.
        seed = config.seed_of_hash
        is_unchecked = config.id_policy == "unchecked" and seed is None
        policy = "error" if of_base is not None and is_unchecked else config.id_policy
        return SentFeature(config.num_embeddings, policy, RowCode(config).layout(0), of_base, seed)

    def _sent(self, features: KeyedJaggedTensor) -> Tensor:
        values, starts = features.values(), features.offset_per_key()
        ids = []
        # Prepare a feature once, because it comes once for each column shard of its table.
        prepared: dict[tuple[str, str], Tensor] = {}
        for (start, end), feature, at in zip(pairwise(starts), features.keys(), self._tables, strict=True):
            if at is None:
                # Use one type for all features, because row codes may need int64.
                ids.append(values[start:end].to(torch.int64))
                continue
            key = (at.config.name, feature)
            if key not in prepared:
                prepared[key] = self._prepare(values[start:end], feature, at)
            ids.append(prepared[key])
        return torch.cat(ids)

    def _is_only_checked(self, at: ShardLayout | None, device: torch.device) -> bool:
        """Returns whether the ids of a feature need a check at most."""
        if at is None:
            return True
        if (self._encode and at.splits_rows) or at.config.id_policy not in ("error", "unchecked"):
            return False
        if device.type == "cpu":
            return cpu.available()
        # Check nothing on a GPU, because the kernels check each id, unless rows are found before the kernels' lookup.
        return not at.is_copied and available(device) and kernels_have(at.config.operation, at.config.partition_columns)

    def _check(self, features: KeyedJaggedTensor) -> None:
        """Checks all ids of a batch on a CPU in one pass."""
        bounds = cpu.id_bounds(features.values(), features.offset_per_key())
        for at, feature, (low, high) in zip(self._tables, features.keys(), bounds, strict=True):
            if at is not None and at.config.id_policy == "error" and low <= high:
                raise_if_outside(low, high, _id_space(at, feature))

    def _prepare(self, ids: Tensor, feature: str, at: ShardLayout) -> Tensor:
        config = at.config
        ids = bounded_ids(ids, _id_space(at, feature))
        if not self._encode or not at.splits_rows:
            return ids
        seed = config.seed_of_hash
        if seed is not None:
            ids = hashed_ids(ids, seed, config.num_embeddings)
        return RowCode(config).encode(ids, self._class_maps.get(config.name))


def _id_space(at: ShardLayout, feature: str) -> IdSpace:
    return IdSpace(at.config.name, feature, at.config.num_embeddings, at.config.id_policy)
