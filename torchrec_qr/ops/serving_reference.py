"""The operators of served models in PyTorch: the reference of the kernel, and its stand-in on other devices."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from torchrec_qr.id_hash import hashed_ids
from torchrec_qr.partitions.bound import closed_form_rows, mapped_rows

_INT8, _INT4 = 5, 6
_MULT, _CONCAT = 0, 2
_CLAMP, _WRAP = 1, 2


def dequantised_rows(rows: Tensor, width: int, bits: int) -> Tensor:
    """Returns (N, D) fp32 of rows as FBGEMM quantises them: D values, then a scale and a bias in fp16.

    Args:
        rows (Tensor): (N, bytes) uint8. Bytes behind the bias are not read.
        width (int): D.
        bits (int): 8 or 4. Of two values in a byte, the first has the low bits.

    Example:
        >>> scale_and_bias = torch.tensor([0.5, -1.0], dtype=torch.float16).view(torch.uint8)
        >>> row = torch.cat([torch.tensor([0, 1, 2, 255], dtype=torch.uint8), scale_and_bias])
        >>> dequantised_rows(row.unsqueeze(0), width=4, bits=8)
        tensor([[ -1.0000,  -0.5000,   0.0000, 126.5000]])
    """
    end = -(-width * bits // 8)
    values = rows[:, :end]
    if bits == 4:
        values = torch.stack([values & 15, values >> 4], dim=2).flatten(1)[:, :width]
    # Copy the four bytes, because those of one row may begin at an odd address.
    affine = rows[:, end : end + 4].clone(memory_format=torch.contiguous_format).view(torch.float16).float()
    return values.float() * affine[:, :1] + affine[:, 1:]


class _Partition(NamedTuple):
    row_type: int
    width: int
    divisor: int
    modulus: int
    weight: Tensor

    def read(self, ids: Tensor, classes: Tensor | None) -> Tensor:
        rows = closed_form_rows(ids, self.divisor, self.modulus) if classes is None else mapped_rows(ids, classes)
        found = self.weight.index_select(0, rows)
        if self.row_type in (_INT8, _INT4):
            return dequantised_rows(found, self.width, 8 if self.row_type == _INT8 else 4)
        return found.float()


class _Table(NamedTuple):
    operation: int
    num_features: int
    num_ids: int
    policy: int
    mean: bool
    hash_seed: int
    class_map: Tensor | None
    partitions: list[_Partition]
    names: list[str]

    def compose(self, ids: Tensor, feature: int) -> Tensor:
        """Returns (N, D): compose_j( W_j[p_j(x_n)] )."""
        ids = self._bounded(ids.to(torch.int64), feature)
        if self.hash_seed >= 0:
            ids = hashed_ids(ids, self.hash_seed, self.num_ids)
        maps = [None] * len(self.partitions) if self.class_map is None else list(self.class_map)
        parts = [p.read(ids, classes) for p, classes in zip(self.partitions, maps, strict=True)]
        if self.operation == _CONCAT:
            return torch.cat(parts, dim=1)
        out = parts[0]
        for part in parts[1:]:
            out = out * part if self.operation == _MULT else out + part
        return out

    def _bounded(self, ids: Tensor, feature: int) -> Tensor:
        if self.policy == _CLAMP:
            return ids.clamp(0, self.num_ids - 1)
        if self.policy == _WRAP:
            return ids.remainder(self.num_ids)
        any_id = self.num_ids < 0 or self.hash_seed >= 0
        outside = ids[:0] if any_id else ids[(ids < 0) | (ids >= self.num_ids)]
        if outside.numel():
            table, *features = self.names
            raise RuntimeError(
                f"table {table!r}, feature {features[feature]!r}: id {int(outside[0])} is outside [0, {self.num_ids}); "
                "out_of_range may be 'error' (as here), 'clamp', 'wrap' or 'unchecked'"
            )
        return ids


def _tables(weights: list[Tensor], class_maps: list[Tensor], layout: Tensor, names: str) -> Iterator[_Table]:
    _, count, *rest = layout.tolist()
    numbers, tensors, maps = iter(rest), iter(weights), iter(class_maps)
    for line in names.split("\n")[:count]:
        operation, k, features, num_ids, policy, mapped, mean, hash_seed = (next(numbers) for _ in range(8))
        class_map = next(maps) if mapped else None
        partitions = [
            _Partition(next(numbers), next(numbers), next(numbers), next(numbers), next(tensors)) for _ in range(k)
        ]
        yield _Table(
            operation, features, num_ids, policy, bool(mean), hash_seed, class_map, partitions, line.split("\t")
        )


def pooled_rows(rows: Tensor, lengths: Tensor, id_weights: Tensor | None, mean: bool) -> Tensor:
    """Returns (B, D): Σ_{n in bag b} w_n · rows_n, divided by the number of ids of the bag under MEAN.

    Args:
        rows (Tensor): (N, D), bag after bag.
        lengths (Tensor): (B,) integers.
        id_weights (Tensor | None): (N,) w_n, or None for 1.
        mean (bool): whether the pooling is MEAN.

    Example:
        >>> pooled_rows(torch.tensor([[1.0], [3.0]]), torch.tensor([2, 0]), None, mean=True)
        tensor([[2.],
                [0.]])
    """
    if id_weights is not None:
        rows = rows * id_weights.unsqueeze(1)
    bags = torch.arange(len(lengths), device=rows.device).repeat_interleave(lengths)
    out = rows.new_zeros(len(lengths), rows.shape[1]).index_add_(0, bags, rows)
    return out / lengths.clamp(min=1).unsqueeze(1) if mean else out


def pooled_by_torch(
    weights: list[Tensor],
    class_maps: list[Tensor],
    layout: Tensor,
    names: str,
    ids: Tensor,
    lengths: Tensor,
    id_weights: Tensor | None,
    features: list[int],
    bags: int,
    columns: int,
) -> Tensor:
    """Returns (bags, columns) fp32: each feature of each table, pooled; see `torchrec_qr.ops.served_operators`."""
    of_features = lengths.view(-1, bags) if bags else lengths.view(max(features) + 1, 0)
    counts = of_features.sum(1).tolist()
    all_ids = ids.split(counts)
    all_weights = None if id_weights is None else id_weights.split(counts)
    of_batch = iter(features)
    outputs = []
    for table in _tables(weights, class_maps, layout, names):
        for feature in range(table.num_features):
            i = next(of_batch)
            rows = table.compose(all_ids[i], feature)
            weights_of_ids = None if all_weights is None else all_weights[i]
            outputs.append(pooled_rows(rows, of_features[i], weights_of_ids, table.mean))
    return torch.cat(outputs, dim=1)


def composed_by_torch(
    weights: list[Tensor], class_maps: list[Tensor], layout: Tensor, names: str, ids: Tensor, columns: int
) -> Tensor:
    """Returns (N, columns) fp32 of the ids of one feature, not pooled; see `torchrec_qr.ops.served_operators`."""
    (table,) = _tables(weights, class_maps, layout, names)
    return table.compose(ids, 0)
