"""A rank that checks a step of row-wise tables, then one after which rows of the last rank alone are 0.001 off."""

from typing import Any

import torch.distributed as dist

from benchmarks.step_cells import Tables, Traffic
from benchmarks.step_check import check
from benchmarks.step_variants import VARIANTS
from launch.process_group import start_process_group


def main() -> None:
    device = start_process_group()
    traffic = Traffic(8, (2, 3), 1.05)
    variant: Any = VARIANTS["fused"](Tables((60, 90), 16, "sgd", "row_wise"), 4, traffic, device)
    assert variant.plan == {"row_wise": 2}
    right = check(variant, traffic, 0)
    assert right.wrong is None, right
    backward = variant.backward

    def wrong(*args: Any) -> None:
        backward(*args)
        if dist.get_rank() == dist.get_world_size() - 1:
            for shard in variant.state()["f1.partition_0"].local_shards():
                shard.tensor.add_(0.001)

    variant.backward = wrong
    text = check(variant, traffic, 1).wrong
    assert text is not None
    assert text.startswith("rows of f1.partition_0 after a step, at "), text
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
