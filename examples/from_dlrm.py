"""Loads the tables of a checkpoint of facebookresearch/dlrm with --qr-flag, and compares outputs with dlrm's formula.

Run: python examples/from_dlrm.py
It writes the embeddings of such a checkpoint itself, and prints each table with the greatest difference of outputs.
"""

import tempfile

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag
from torchrec import KeyedJaggedTensor

from torchrec_qr.inference import load_dlrm_checkpoint

COMPOSE = {"mult": torch.mul, "add": torch.add, "concat": lambda *pooled: torch.cat(pooled, dim=1)}
BAGS = 10_000


def write_checkpoint(path: str) -> None:
    """Writes what a model with --qr-flag --qr-collisions=4 --qr-threshold=200 saves, without its other layers."""
    torch.manual_seed(0)
    rows = {"0.weight_q": 25_000, "0.weight_r": 4, "1.weight": 100, "2.weight_q": 1_250, "2.weight_r": 4}
    torch.save({"state_dict": {f"emb_l.{name}": torch.rand(count, 16) for name, count in rows.items()}}, path)


def output_of_dlrm(weights: dict[str, Tensor], ids: Tensor, operation: str) -> Tensor:
    """Returns what a table of dlrm returns for bags of one id each: both partitions are pooled, then composed."""
    bags = torch.arange(len(ids))
    if "weight" in weights:
        return embedding_bag(ids, weights["weight"], bags, mode="sum")
    collisions = len(weights["weight_r"])
    quotients = embedding_bag(ids // collisions, weights["weight_q"], bags, mode="sum")
    remainders = embedding_bag(ids % collisions, weights["weight_r"], bags, mode="sum")
    return COMPOSE[operation](quotients, remainders)


if __name__ == "__main__":
    path = f"{tempfile.mkdtemp()}/dlrm.pt"
    write_checkpoint(path)
    state = torch.load(path)["state_dict"]
    for operation in COMPOSE:  # --qr-operation, which the file does not have
        ebc = load_dlrm_checkpoint(path, operation=operation, multi_hot=False)
        configs = ebc.embedding_bag_configs()
        ids = [torch.randint(config.num_embeddings, (BAGS,)) for config in configs]
        lengths = torch.ones(len(configs) * BAGS, dtype=torch.int64)
        outputs = ebc(KeyedJaggedTensor([c.feature_names[0] for c in configs], torch.cat(ids), lengths=lengths))
        for i, config in enumerate(configs):
            weights = {key.split(".")[-1]: weight for key, weight in state.items() if key.startswith(f"emb_l.{i}.")}
            difference = (outputs[f"cat_{i}"] - output_of_dlrm(weights, ids[i], operation)).abs().max()
            stored = sum(map(len, weights.values()))
            print(
                f"{operation}, {config.name}: {config.num_embeddings:,} ids in {stored:,} rows, difference {difference}"
            )
            assert difference == 0
