"""The page on migrating takes a checkpoint as given, as dlrm writes it."""

import torch

torch.save(
    {
        "state_dict": {
            "emb_l.0.weight_q": torch.randn(365, 16),
            "emb_l.0.weight_r": torch.randn(4, 16),
            "emb_l.1.weight": torch.randn(200, 16),
        }
    },
    "dlrm.pt",
)
