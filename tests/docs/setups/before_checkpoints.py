import torch
import torch.distributed as dist
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig
from torchrec.models.dlrm import DLRM

# A full model, and a file of dlrm with one compressed table.
if dist.get_rank() == 0:
    sizes = {"user": 10_000, "country": 250}
    full = EmbeddingBagCollection(
        tables=[
            EmbeddingBagConfig(name=f"t_{name}", feature_names=[name], num_embeddings=rows, embedding_dim=16)
            for name, rows in sizes.items()
        ]
    )
    model = DLRM(full, dense_in_features=4, dense_arch_layer_sizes=[32, 16], over_arch_layer_sizes=[32, 1])
    torch.save(model.state_dict(), "full.pt")
    tables = {"emb_l.0.weight_q": torch.randn(5, 4), "emb_l.0.weight_r": torch.randn(3, 4)}
    torch.save({"state_dict": tables}, "dlrm.pt")
