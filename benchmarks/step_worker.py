"""The process of one rank of the step benchmark; see `benchmarks.step`."""

import json
import logging
import os
import sys
import warnings


def main() -> None:
    job = json.loads(sys.argv[1])
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    import torch.distributed as dist

    from benchmarks.step_rank import run_rank

    dist.init_process_group(
        "gloo",
        init_method=f"file://{job['store']}",
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
    )
    run_rank(job["arguments"], job["cells"], job["out"])
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
