"""Dense features as a model's input."""

from typing import Literal

import numpy as np

from launch.data.rows import Array


def transformed(dense: Array, transform: Literal["log1p", "none"], missing_flags: bool) -> Array:
    """Returns log(1 + max(x, 0)), or x, and 0 if x is missing; with flags, beside it 1 if x is missing, else 0.

    Example:
        >>> transformed(np.float32([[-3, np.nan]]), "log1p", missing_flags=True).tolist()
        [[0.0, 0.0, 0.0, 1.0]]
    """
    if transform == "log1p":
        # Do not call np.log1p, because it takes three times as long. fmax turns NaN into 0.
        values = np.log(np.fmax(dense, np.float32(0)) + np.float32(1))
    else:
        values = np.nan_to_num(dense, posinf=np.inf, neginf=-np.inf)
    return np.concatenate([values, np.isnan(dense).astype(np.float32)], axis=1) if missing_flags else values
