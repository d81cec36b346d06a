"""The page on checkpoints takes two files as given: a full model, and dlrm's with one compressed table."""

import torch
import torch.distributed as dist
from page_models import full_dlrm

if dist.get_rank() == 0:
    torch.save(full_dlrm(users=10_000).state_dict(), "full.pt")
    tables = {"emb_l.0.weight_q": torch.randn(5, 4), "emb_l.0.weight_r": torch.randn(3, 4)}
    torch.save({"state_dict": tables}, "dlrm.pt")
