"""Groups of ranks of 2D parallelism: where they lie, as TorchRec lays them out, and the cost of their copies."""

import json
from collections import Counter
from pathlib import Path

import pytest
from planner_models import collection, plain, planner, qr, sharders
from torchrec.distributed.planner.types import ParameterConstraints

from torchrec_qr.cli.commands import main
from torchrec_qr.cli.sizing.rank_groups import RankGroups
from torchrec_qr.planner import hardware_named


def meshes(world: int, size: int, inter_host: bool) -> list[list[int]]:
    """The ranks of each group, by the two rules in the docstring of DMPCollection's argument."""
    copies = world // size
    if inter_host:
        return [list(range(g * size, (g + 1) * size)) for g in range(copies)]
    return [list(range(g, world, copies)) for g in range(copies)]


@pytest.mark.parametrize("inter_host", [False, True])
@pytest.mark.parametrize(("world", "local"), [(32, 8), (16, 8), (8, 8), (8, 1), (12, 6)])
def test_groups_lie_on_nodes_as_torchrec_lays_them_out(world: int, local: int, inter_host: bool) -> None:
    for size in (size for size in range(1, world + 1) if world % size == 0):
        groups = meshes(world, size, inter_host)
        on_nodes = [Counter(rank // local for rank in group) for group in groups]
        per_node = {count for of_group in on_nodes for count in of_group.values()}
        copies = [[group[r] // local for group in groups] for r in range(size)]
        copies_per_node = {of_shard.count(node) for of_shard in copies for node in set(of_shard)}
        if len(per_node) > 1 or len(copies_per_node) > 1:
            with pytest.raises(ValueError, match=f"--sharding-group-size {size}: .* lie unevenly on nodes of {local}"):
                RankGroups(world, local, size, inter_host)
            continue
        made = RankGroups(world, local, size, inter_host)
        assert made.copies == len(groups)
        assert {made.node_group_size} == per_node
        assert {made.copies_per_node} == {min(count, made.copies) for count in copies_per_node}


def test_a_sync_is_a_ring_over_the_copies() -> None:
    h100, size = hardware_named("h100"), 10**9
    # Two copies on one node by NVLink: 2 · (2 - 1) / 2 passes at 450 GB/s.
    assert RankGroups(32, 8, 16).sync_ms(size, h100) == pytest.approx(1e9 / 450e9 * 1e3)
    # Two copies on two nodes, at 50 GB/s.
    assert RankGroups(32, 8, 16, True).sync_ms(size, h100) == pytest.approx(1e9 / 50e9 * 1e3)
    # Sixteen copies, eight on each of two nodes: a ring of eight, and one of two with an eighth of the bytes.
    ring = 2 * 7 / 8 / 450e9 + 2 * 1 / 2 / (8 * 50e9)
    assert RankGroups(32, 8, 2).sync_ms(size, h100) == pytest.approx(1e9 * ring * 1e3)
    assert RankGroups(32, 8, 32).sync_ms(size, h100) == 0.0


def test_data_parallel_tables_alone_are_reduced_over_all_ranks() -> None:
    h100 = hardware_named("h100")
    tables = [qr("ours", 100_000, 100), plain("plain", 1000), qr("rows", 10_000_000), plain("sent", 10_000_000)]
    constraints = {
        name: ParameterConstraints(sharding_types=[kind])
        for name, kind in zip(
            ("ours", "plain", "rows", "sent"), ("data_parallel",) * 2 + ("row_wise", "table_wise"), strict=True
        )
    }

    def reduce_and_comms(world: int, local: int, **arguments: object) -> tuple[list[float], list[float]]:
        made = planner(world, local, constraints=constraints, **arguments)
        plans = made.propose(collection(tables), sharders()).tables
        costs = [p.cost(world) for p in plans]
        return [cost.reduce_ms for cost in costs], [p.option.blocks[0].shards[0].cost.comms_ms for p in plans]

    of_all, _ = reduce_and_comms(16, 8)
    alone, within = reduce_and_comms(4, 4)
    reduced, sent = reduce_and_comms(4, 4, replica_topology=h100.topology(16, 8))
    assert sent == within
    assert reduced[:2] == pytest.approx(of_all[:2])
    assert all(over > inside for over, inside in zip(reduced[:2], alone[:2], strict=True))
    assert reduced[2:] == alone[2:]  # a group sums the gradients of replicas beside split rows


def test_the_command_plans_one_group_and_counts_its_copies(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job, file = tmp_path / "job.yaml", tmp_path / "plan.json"
    job.write_text(
        """
tables:
  - {name: a, num_embeddings: 8_000_000, embedding_dim: 128, partitions: {kind: quotient_remainder, num_collisions: 4}}
  - {name: b, num_embeddings: 1_000_000, embedding_dim: 128}
  - {name: c, num_embeddings: 100, embedding_dim: 128}
planner:
  topology: 2x8
  device: h100
  batch_size: 512
  constraints:
    a: {sharding_types: [row_wise]}
    b: {sharding_types: [table_wise], ranks: [3]}
    c: {sharding_types: [data_parallel]}
optimizer: {sparse: {name: adagrad}}
"""
    )
    assert main(["plan", "--config", str(job), "--sharding-group-size", "4", "--json", str(file)]) == 0
    plan = json.loads(file.read_text())["devices"]["h100"]
    assert (plan["request"]["world_size"], plan["request"]["sharding_group_size"]) == (16, 4)
    assert [table["ranks"] for table in plan["tables"]] == [[0, 1, 2, 3], [3], [0, 1, 2, 3]]
    # Values and sums: a quarter of 2,000,000 rows on each rank, and the four rows of the other partition.
    quarter, whole = (500_000 + 4) * 512 * 2, 1_000_000 * 512 * 2
    assert plan["sync"]["copies"] == 4
    assert plan["sync"]["node_group_size"] == 2
    assert plan["sync"]["sync_bytes"] == quarter + whole
    assert plan["sync"]["copied_bytes"] == 3 * (4 * quarter + whole)
    ms = (quarter + whole) * 2 * 3 / 4 / 450e9 * 1e3
    assert plan["sync"]["sync_ms"] == pytest.approx(ms)
    out = capsys.readouterr().out
    assert "4 groups of 4 ranks; the ranks below are those of a group: DMPCollection(" in out
    assert "sharding_group_size=4, node_group_size=2)" in out
    assert f"sync(): 1.43 GiB of the fullest rank, 4 of 4 copies a node, {ms:.3f} ms" in out
    assert max(map(len, out.splitlines()[1:])) <= 100
    job.write_text(job.read_text().replace("ranks: [3]", "ranks: [4]"))
    assert main(["plan", "--config", str(job), "--sharding-group-size", "4"]) == 2
    assert "table 'b': ranks=[4]; allowed: some of 0..3" in capsys.readouterr().err
