"""Learns the next item of each user on two ranks, then finds the best of all items on one, without their full table.

Run: torchrun --nproc-per-node 2 examples/sequence.py, on generated ratings; or add MovieLens' ratings.csv
It prints recall and NDCG of ten items, the model's best and the most frequent ones.
"""

import ratings
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torchrec import KeyedJaggedTensor
from torchrec.distributed import DistributedModelParallel
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward

from torchrec_qr import CompositionalEmbeddingCollection, CompositionalEmbeddingConfig, QuotientRemainder
from torchrec_qr.distributed import get_default_sharders
from torchrec_qr.distributed.checkpoint import load
from torchrec_qr.inference import top_items

DIM, PAST, NEGATIVES, BATCH, K = 32, 8, 31, 256, 10


class NextItem(nn.Module):
    def __init__(self, num_items: int) -> None:
        super().__init__()
        sizes = {"num_embeddings": num_items, "embedding_dim": DIM, "partitions": QuotientRemainder(num_collisions=4)}
        table = CompositionalEmbeddingConfig(name="t_item", feature_names=["past", "candidates"], **sizes)
        self.items, self.gru = CompositionalEmbeddingCollection(tables=[table]), nn.GRU(DIM, DIM, batch_first=True)

    def forward(self, past: Tensor, candidates: Tensor) -> tuple[Tensor, Tensor]:
        """Returns a vector of each user (B, DIM), and the scores of candidates by the same table as past items."""
        lengths = torch.tensor([past.shape[1], candidates.shape[1]]).repeat_interleave(len(past))
        ids = torch.cat([past.flatten(), candidates.flatten()])
        found = self.items(KeyedJaggedTensor(["past", "candidates"], ids, lengths=lengths))
        users = self.gru(found["past"].values().view(*past.shape, DIM))[1][0]
        return users, torch.einsum("bd,bcd->bc", users, found["candidates"].values().view(*candidates.shape, DIM))


if __name__ == "__main__":
    dist.init_process_group("gloo")
    torch.manual_seed(dist.get_rank())  # other batches and shards on each rank
    train, test, num_items = ratings.windows(PAST)
    model = NextItem(num_items)
    apply_optimizer_in_backward(torch.optim.Adagrad, model.items.parameters(), {"lr": 0.1})
    sharded = DistributedModelParallel(model, device=torch.device("cpu"), sharders=get_default_sharders())
    dense = torch.optim.Adam(model.gru.parameters(), lr=0.005)
    for past, candidates in ratings.batches(train, num_items, BATCH, NEGATIVES, steps=300):
        dense.zero_grad()
        scores = sharded(past, candidates)[1]
        nn.functional.cross_entropy(scores, torch.zeros(BATCH, dtype=torch.int64)).backward()
        dense.step()
    dcp.save({"model": sharded}, checkpoint_id="runs/sequence")
    if dist.get_rank() == 0:
        whole = NextItem(num_items)
        load({"model": whole}, checkpoint_id="runs/sequence", no_dist=True)  # without a plan
        best = top_items(whole.items, "t_item", whole(test[:, :-1], test[:, -1:])[0].detach(), K).ids
        print(f"the model: {ratings.recall_and_ndcg(best, test[:, -1:])}")
        print(f"the most frequent items: {ratings.recall_and_ndcg(torch.arange(K), test[:, -1:])}")
