"""The range check of ids on CUDA, which does not make the host wait."""

import pytest
import torch

from torchrec_qr import raise_pending
from torchrec_qr.ids import IdSpace, bounded_ids


@pytest.mark.only_on_cuda
def test_ids_are_clamped_and_the_error_comes_later() -> None:
    space = IdSpace("t", "f_t", 10, "error")
    ids = torch.tensor([-1, 3, 10], device="cuda")
    assert bounded_ids(ids, space).tolist() == [0, 3, 9]
    with pytest.raises(IndexError, match=r"table 't', feature 'f_t': id -1 is outside \[0, 10\)"):
        raise_pending()
    assert bounded_ids(ids[1:2], space).tolist() == [3]
    raise_pending()
