"""A model with its loss, and the cause of a loss that is no number."""

import torch
from torch import Tensor, nn

from launch.data.batch import Batch

Predicted = tuple[Tensor, Tensor, Tensor]


class NonFiniteLossError(RuntimeError):
    """The loss is NaN or infinite."""


class TrainTask(nn.Module):
    """A batch → (loss, (logits, labels, weights)), the pair that TorchRec's pipelines take.

    loss = 1/B · Σ_i w_i · logloss(logit_i, label_i). So a row counts as much in a batch that is padded as in any other,
    on every rank.

    Args:
        model (nn.Module): (dense, ids) → logits (B, 1).
        device (torch.device): of the model.
        autocast (torch.dtype | None): dtype of the dense layers' products; default: that of the parameters.

    Attributes:
        checks_loss (bool): whether a loss that is no number is found before it reaches the parameters. It costs a
            synchronisation with the device.

    Raises:
        NonFiniteLossError: names the input, or the parameters, that brought it about.
    """

    def __init__(self, model: nn.Module, device: torch.device, autocast: torch.dtype | None = None) -> None:
        super().__init__()
        self.model = model
        self.checks_loss = True
        self._device_type, self._autocast = device.type, autocast

    def forward(self, batch: Batch) -> tuple[Tensor, Predicted]:
        with torch.autocast(self._device_type, dtype=self._autocast, enabled=self._autocast is not None):
            logits = self.model(batch.dense, batch.sparse).squeeze(-1).float()
        loss = nn.functional.binary_cross_entropy_with_logits(logits, batch.labels, batch.weights)
        # TorchRec's pipelines trace this function, to find what feeds the embeddings.
        traced = isinstance(loss, torch.fx.Proxy)
        if self.checks_loss and self.training and not traced and not bool(loss.isfinite()):
            raise NonFiniteLossError(f"the loss is {loss.item()}; {self._cause(batch)}")
        return loss, (logits.detach(), batch.labels, batch.weights)

    def _cause(self, batch: Batch) -> str:
        bad_rows = (~batch.dense.isfinite()).any(dim=1).nonzero().flatten().tolist()
        if bad_rows:
            return (
                f"{len(bad_rows)} rows of the batch have dense features that are not finite, the first is {bad_rows[0]}"
            )
        return self.suspect()

    def suspect(self) -> str:
        """Returns a phrase on the parameters of this rank that are not finite, else on the one of the largest value."""
        with torch.no_grad():
            largest = {name: p.detach().abs().max().item() for name, p in self.model.named_parameters() if p.numel()}
        bad = [name for name, value in largest.items() if not value < float("inf")]
        if bad:
            return f"not finite on this rank: {', '.join(bad[:5])}{f' and {len(bad) - 5} more' if len(bad) > 5 else ''}"
        name = max(largest, key=lambda name: largest[name])
        return f"all parameters of this rank are finite, the largest is {largest[name]:.3g}, in {name}"
