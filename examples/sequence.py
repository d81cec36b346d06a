"""Learns the next item of each user on two ranks, then scores all items on one: ``python examples/sequence.py``.

Ratings are generated, or those of MovieLens: ``--ratings ratings.csv``, with userId, movieId, rating and timestamp.
"""

import argparse
import tempfile

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from ratings import sequences_of
from torch import Tensor, nn
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from torch.nn import functional as F
from torchrec import JaggedTensor, KeyedJaggedTensor
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.sharding_plan import construct_module_sharding_plan, row_wise
from torchrec.distributed.types import ShardingPlan
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward

from torchrec_qr import CompositionalEmbeddingCollection, CompositionalEmbeddingConfig, QuotientRemainder
from torchrec_qr.distributed import CompositionalEmbeddingCollectionSharder
from torchrec_qr.distributed.checkpoint import load
from torchrec_qr.inference import top_items

DIM, PAST, NEGATIVES, BATCH, K = 32, 8, 31, 256, 10


class NextItem(nn.Module):
    """A GRU over the embeddings of past items gives a user's vector, and the same table scores items."""

    def __init__(self, num_items: int) -> None:
        super().__init__()
        partitions = QuotientRemainder(num_collisions=4)
        sizes = {"num_embeddings": num_items, "embedding_dim": DIM, "partitions": partitions}
        table = CompositionalEmbeddingConfig(name="t_item", feature_names=["past", "candidates"], **sizes)
        self.items = CompositionalEmbeddingCollection(tables=[table])
        self.gru = nn.GRU(DIM, DIM, batch_first=True)

    def user_vectors(self, past: Tensor) -> Tensor:
        return self.gru(past.view(-1, PAST, DIM))[1][0]

    def forward(self, features: KeyedJaggedTensor) -> Tensor:
        found = self.items(features)
        users, candidates = self.user_vectors(found["past"].values()), found["candidates"].values()
        scores = torch.einsum("bd,bcd->bc", users, candidates.view(len(users), -1, DIM))
        return F.cross_entropy(scores, torch.zeros(len(users), dtype=torch.int64))  # the next item is the first


def batch_of(past: Tensor, candidates: Tensor) -> KeyedJaggedTensor:
    ids = {"past": past, "candidates": candidates}
    return KeyedJaggedTensor.from_jt_dict(
        {name: JaggedTensor(of.flatten(), lengths=torch.full((len(of),), of.shape[1])) for name, of in ids.items()}
    )


def train(windows: Tensor, num_items: int, steps: int, checkpoint: str) -> None:
    """Runs on every rank."""
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    torch.manual_seed(0)  # the same model on all ranks
    model = NextItem(num_items)
    apply_optimizer_in_backward(torch.optim.Adagrad, model.items.parameters(), {"lr": 0.1})
    sharder = CompositionalEmbeddingCollectionSharder()
    plan = ShardingPlan(
        {"items": construct_module_sharding_plan(model.items, {"t_item": row_wise()}, sharder, device_type="cpu")}
    )
    dmp = DistributedModelParallel(model, device=torch.device("cpu"), plan=plan, sharders=[sharder])
    optimizer = torch.optim.Adam(dmp.module.gru.parameters(), lr=0.005)
    torch.manual_seed(1 + dist.get_rank())  # other batches on each rank
    for _ in range(steps):
        rows = windows[torch.randint(len(windows), (BATCH,))]
        negatives = torch.randint(num_items, (BATCH, NEGATIVES))
        optimizer.zero_grad()
        dmp(batch_of(rows[:, :-1], torch.cat([rows[:, -1:], negatives], dim=1))).backward()
        optimizer.step()
    dcp.save({"model": dmp}, checkpoint_id=checkpoint)
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ratings", help="MovieLens' ratings.csv")
    parser.add_argument("--steps", type=int, default=300)
    options = parser.parse_args()
    sequences, num_items = sequences_of(options.ratings, least=PAST + 2)
    # The last item of each user is for the test.
    windows = np.concatenate([np.lib.stride_tricks.sliding_window_view(own[:-1], PAST + 1) for own in sequences])
    test = torch.from_numpy(np.stack([own[-PAST - 1 :] for own in sequences]))
    model = NextItem(num_items)
    with tempfile.TemporaryDirectory() as folder:
        ranks = LaunchConfig(1, 1, 2, run_id="sequence", rdzv_backend="c10d", rdzv_endpoint="localhost:0")
        elastic_launch(ranks, train)(torch.from_numpy(windows), num_items, options.steps, f"{folder}/checkpoint")
        load({"model": model}, checkpoint_id=f"{folder}/checkpoint", no_dist=True)  # sharded there, whole here
    with torch.no_grad():
        users = model.user_vectors(model.items(batch_of(test[:, :-1], test[:, :0]))["past"].values())
    best = top_items(model.items, "t_item", users, K).ids
    for name, ids in (("the model", best), ("the most frequent items", torch.arange(K))):
        hits = (ids == test[:, -1:]).float()
        ndcg = (hits / torch.arange(2, K + 2).log2()).sum(dim=1).mean()
        print(f"{name}: recall@{K} {hits.sum(dim=1).mean():.4f}, NDCG@{K} {ndcg:.4f}")


if __name__ == "__main__":
    main()
