"""Serves a DLRM from rows of 8 bits in a process that has PyTorch and one library of operators, and no TorchRec.

Run: python examples/served.py
It prints what that process has imported, the bytes of rows, and how far scores differ. docs/serving.md has the rest.
"""

import subprocess
import sys
import tempfile

import torch
from torch import Tensor, nn
from torchrec import KeyedJaggedTensor
from torchrec.models.dlrm import DLRM

from torchrec_qr import CompositionalEmbeddingBagCollection, CompositionalEmbeddingBagConfig, QuotientRemainder
from torchrec_qr.inference import operators_library, quantize_embeddings

SIZES, DIM = {"user": 1_000_000, "item": 100_000}, 64
QR = QuotientRemainder(num_collisions=100)
TABLES = [CompositionalEmbeddingBagConfig(S, DIM, f"t_{f}", feature_names=[f], partitions=QR) for f, S in SIZES.items()]
SERVER = """
import sys, torch
torch.ops.load_library(sys.argv[1])
model = torch.export.load("model.pt2").module()
torch.save(model(*torch.load("rows.pt")), "scores.pt")
print("imported:", [name for name in ("torch", "torchrec", "fbgemm_gpu", "torchrec_qr") if name in sys.modules])
"""


class Scores(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = DLRM(CompositionalEmbeddingBagCollection(tables=TABLES), 4, [32, DIM], [32, 1])

    def forward(self, dense: Tensor, ids: Tensor, lengths: Tensor) -> Tensor:  # (B, 4), (N,), (F, B) → (B,)
        features = KeyedJaggedTensor(list(SIZES), ids, lengths=lengths.flatten())
        return self.model(dense, features).squeeze(1).sigmoid()


if __name__ == "__main__":
    torch.manual_seed(0)
    floats = Scores().eval()
    for weight in floats.model.sparse_arch.parameters():
        nn.init.normal_(weight)  # in place of training
    int8 = quantize_embeddings(floats, torch.qint8)
    rows = torch.rand(100, 4), torch.cat([torch.randint(S, (100,)) for S in SIZES.values()]), torch.ones(2, 100).long()
    any_size = torch.export.Dim.DYNAMIC
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        program = torch.export.export(int8, rows, dynamic_shapes=({0: any_size}, {0: any_size}, {1: any_size}))
        torch.export.save(program, f"{folder}/model.pt2")
        torch.save(rows, f"{folder}/rows.pt")
        subprocess.run([sys.executable, "-c", SERVER, operators_library()], cwd=folder, check=True)
        scores = torch.load(f"{folder}/scores.pt")
    sizes = [sum(value.nbytes for value in m.model.sparse_arch.state_dict().values()) for m in (floats, int8)]
    print("bytes: {:,} as floats, {:,} as int8".format(*sizes))
    differences = [(scores - model(*rows)).abs().max() for model in (int8, floats)]
    print("greatest differences: {:.4f} to the int8 model here, {:.4f} to the float model".format(*differences))
    assert torch.equal(scores, int8(*rows))
