"""Writes the CSV files of shop_clicks.py as Parquet, in the layout in which Spark writes a partitioned data frame.

python examples/own_data/spark_folder.py shop

Spark writes the same by ``frame.write.partitionBy("day").parquet("clicks_parquet")``.
"""

import csv
import sys
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from uuid import UUID

import pyarrow as pa
import pyarrow.parquet as pq

SCHEMA = pa.schema(
    [
        *(pa.field(name, pa.string()) for name in ("user", "item", "country")),
        *(pa.field("price", pa.decimal128(10, 2)), pa.field("age", pa.int64())),
        *(pa.field("viewed", pa.list_(pa.string())), pa.field("at", pa.timestamp("ns", "UTC"))),
        pa.field("clicked", pa.int32()),
    ]
)


def table_of(path: Path) -> pa.Table:
    """Returns the typed columns of a CSV file, null where its text is empty or is no number."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    columns = {name: [row[name] or None for row in rows] for name in rows[0]}
    columns["price"] = [Decimal(price) for price in columns["price"]]
    columns["age"] = [age and int(age) for age in columns["age"]]
    columns["viewed"] = [items.split("|") if items else [] for items in columns["viewed"]]
    columns["at"] = [datetime.fromisoformat(at).replace(tzinfo=UTC) for at in columns["at"]]
    if "clicked" in columns:
        columns["clicked"] = [int(label) if label in ("0", "1") else None for label in columns["clicked"]]
    return pa.table(columns, pa.schema([SCHEMA.field(name) for name in columns]))


def main(folder: Path) -> None:
    """Writes clicks_parquet/day=<day>/part-…, with what Spark leaves beside it, and new_parquet/part-…."""
    days = {f"clicks_parquet/day={path.stem}": path for path in sorted((folder / "clicks").glob("*.csv"))}
    for number, (name, source) in enumerate({**days, "new_parquet": folder / "new.csv"}.items()):
        (folder / name).mkdir(parents=True, exist_ok=True)
        part = folder / name / f"part-{number:05}-{UUID(int=27)}.c000.snappy.parquet"
        pq.write_table(table_of(source), part, compression="snappy", use_deprecated_int96_timestamps=True)
        part.with_name(f".{part.name}.crc").write_bytes(b"crc\0")
    for name in ("clicks_parquet", "new_parquet"):
        (folder / name / "_SUCCESS").touch()
        (folder / name / "._SUCCESS.crc").write_bytes(b"crc\0")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
