"""Rows as served tables store them: floats, or FBGEMM's rows of 8 or 4 bits a value with a scale and a bias.

A quantised row is ``value = scale · q + bias``. Scale and bias are fp16, and q is the nearest of 256 or 16 numbers. If
l is the least and h the largest value of a row, the error of a value is at most ``scale / 2 + 2⁻¹¹ · (|l| + h - l)``:
half a step, and what fp16 rounds of bias and scale.
"""

import fbgemm_gpu  # noqa: F401  (registers the quantisation of rows)
import torch
from torch import Tensor
from torchrec.modules.embedding_configs import BaseEmbeddingConfig, DataType, dtype_to_data_type

from torchrec_qr.configs import DTYPES
from torchrec_qr.ops.serving_reference import dequantised_rows

_BITS = {DataType.INT8: 8, DataType.INT4: 4}
# The types of rows that served tables may have.
STORED_TYPES = (*DTYPES, *_BITS)
_SCALE_AND_BIAS_BYTES = 4
_LARGEST_FP16 = 65504.0


def data_type_of(dtype: torch.dtype, table: str) -> DataType:
    """Returns the type of rows that a quantisation to ``dtype`` stores.

    Args:
        dtype (torch.dtype): ``torch.qint8``, ``torch.quint8`` or ``torch.int8``: 8 bits; ``torch.quint4x2``: 4 bits;
            or a type of floats.
        table (str): the table, for errors.

    Raises:
        NotImplementedError: no rows have this type.

    Example:
        >>> str(data_type_of(torch.quint4x2, "t"))
        'INT4'
    """
    allowed = (torch.qint8, torch.quint8, torch.int8, torch.quint4x2, *DTYPES.values())
    if dtype not in allowed:
        names = ", ".join(str(a) for a in allowed)
        raise NotImplementedError(f"table {table!r}: rows of {dtype}; allowed: {names}")
    data_type: DataType = dtype_to_data_type(dtype)
    return data_type


def row_type_of(config: BaseEmbeddingConfig) -> str:
    """Returns the name of a table's type of rows in `torchrec_qr.ops.served_operators.ROW_TYPES`.

    Args:
        config (BaseEmbeddingConfig): of the table.

    Raises:
        NotImplementedError: no rows have the ``data_type`` of the config.
    """
    if config.data_type not in STORED_TYPES:
        names = ", ".join(str(a) for a in STORED_TYPES)
        raise NotImplementedError(f"table {config.name!r}: data_type={config.data_type}; allowed: {names}")
    return str(config.data_type.value).lower()


def no_rows(rows: int, columns: int, data_type: DataType, device: torch.device) -> Tensor:
    """Returns zeros as stored: (rows, columns) floats, or (rows, bytes) uint8.

    Example:
        >>> no_rows(2, 8, DataType.INT4, torch.device("cpu")).shape
        torch.Size([2, 8])
    """
    if data_type in DTYPES:
        return torch.zeros(rows, columns, dtype=DTYPES[data_type], device=device)
    values = _bytes_of_values(columns, _BITS[data_type])
    return torch.zeros(rows, values + _SCALE_AND_BIAS_BYTES, dtype=torch.uint8, device=device)


def stored_rows(weight: Tensor, data_type: DataType, label: str) -> Tensor:
    """Returns rows as stored.

    Args:
        weight (Tensor): (rows, columns) fp32, fp16 or bf16.
        data_type (DataType): one of ``STORED_TYPES``.
        label (str): table and partition, for errors.

    Raises:
        ValueError: a value is no finite number, or exceeds the range of fp16.

    Example:
        >>> rows = stored_rows(torch.tensor([[-1.0, 0.0, 1.0, 126.5]]), DataType.INT8, "t")
        >>> rows.tolist()[0][:4]  # steps of 0.5 from -1
        [0, 2, 4, 255]
    """
    weight = weight.detach()
    if data_type not in (DataType.FP32, DataType.BF16) and weight.numel():
        low, high = (float(extreme) for extreme in weight.aminmax())
        # NaN is in no range.
        if not (low >= -_LARGEST_FP16 and high <= _LARGEST_FP16):
            raise ValueError(
                f"{label}: values lie in [{low}, {high}]; allowed in rows of {data_type}: finite values in "
                f"[-{_LARGEST_FP16:.0f}, {_LARGEST_FP16:.0f}]"
            )
    if data_type in DTYPES:
        return weight.to(DTYPES[data_type], copy=True)
    bits = _BITS[data_type]
    if weight.dtype == torch.bfloat16:
        weight = weight.float()
    columns = weight.shape[1]
    # Repeat a value, because FBGEMM writes rows of whole pairs of bytes, and another value may widen the range.
    weight = torch.cat([weight, weight[:, :1].expand(-1, -columns % (16 // bits))], dim=1)
    rows: Tensor = torch.ops.fbgemm.FloatOrHalfToFusedNBitRowwiseQuantizedSBHalf(weight, bits)
    values = _bytes_of_values(columns, bits)
    if rows.shape[1] == values + _SCALE_AND_BIAS_BYTES:
        return rows
    return torch.cat([rows[:, :values], rows[:, -_SCALE_AND_BIAS_BYTES:]], dim=1)


def read_stored(rows: Tensor, columns: int, data_type: DataType) -> Tensor:
    """Returns (N, columns) fp32 of rows as `stored_rows` returns them.

    Example:
        >>> rows = stored_rows(torch.tensor([[-1.0, 0.0, 2.0]]), DataType.INT4, "t")
        >>> read_stored(rows, 3, DataType.INT4).round(decimals=2)
        tensor([[-1., -0.,  2.]])
    """
    if data_type in DTYPES:
        return rows.float()
    return dequantised_rows(rows, columns, _BITS[data_type])


def _bytes_of_values(columns: int, bits: int) -> int:
    return -(-columns * bits // 8)
