"""The facts about a table that its place in a plan depends on."""

from dataclasses import dataclass

import torch

from torchrec_qr.cli.schema import dump
from torchrec_qr.fingerprint import differences, fingerprint
from torchrec_qr.planner.tables import PlannedTable


@dataclass(frozen=True)
class TableMeaning:
    """A table of a plan, by what must be the same where the plan is carried out.

    Args:
        name (str): the table's name.
        num_embeddings (int): S.
        physical_rows (int): R.
        embedding_dim (int): D.
        data_type (str): torch's name of the type of a value.
        num_features (int): the features that use the table.
        partitions (tuple[int, ...] | None): `torchrec_qr.fingerprint.fingerprint`, or None for a plain table.
    """

    name: str
    num_embeddings: int
    physical_rows: int
    embedding_dim: int
    data_type: str
    num_features: int
    partitions: tuple[int, ...] | None

    @classmethod
    def of(cls, table: PlannedTable) -> "TableMeaning":
        """Returns the meaning of a model's table."""
        return cls(
            name=table.name,
            num_embeddings=table.num_embeddings,
            physical_rows=table.rows,
            embedding_dim=table.columns,
            data_type=str(table.parameter.dtype).removeprefix("torch."),
            num_features=table.num_features,
            partitions=_partitions(table),
        )

    def differences_from(self, own: "TableMeaning") -> list[str]:
        """Returns a phrase per fact in which a saved table differs from the one that is here."""
        here = {name: (value, getattr(self, name)) for name, value in dump(own).items() if name != "partitions"}
        phrases = [f"{name}: saved {saved}, here {mine}" for name, (mine, saved) in here.items() if mine != saved]
        if phrases or self.partitions == own.partitions:
            return phrases
        if self.partitions is None or own.partitions is None:
            saved, mine = ("plain" if p is None else "compositional" for p in (self.partitions, own.partitions))
            return [f"saved {saved}, here {mine}"]
        return differences(torch.tensor(self.partitions), torch.tensor(own.partitions))


def _partitions(table: PlannedTable) -> tuple[int, ...] | None:
    if table.config is None:
        return None
    # A job trains some plain tables as one partition of all rows, p(x) = x, which is the same function.
    is_hashed = getattr(table.config, "id_hash", None) is not None
    if len(table.partitions) == 1 and table.rows == table.num_embeddings and not is_hashed:
        return None
    return tuple(fingerprint(table.config).tolist())
