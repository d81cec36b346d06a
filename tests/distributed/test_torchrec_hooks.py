"""TorchRec still has, and still uses, every hook that the sharded collections override or lean on."""

import inspect
from typing import Any

import pytest
from torchrec.distributed import embedding, embedding_lookup, embedding_sharding, embeddingbag
from torchrec.distributed.embedding_kernel import BaseEmbedding
from torchrec.distributed.embedding_lookup import GroupedEmbeddingsLookup, GroupedPooledEmbeddingsLookup
from torchrec.distributed.embedding_types import ShardedEmbeddingTable
from torchrec.distributed.fp_embeddingbag import (
    FeatureProcessedEmbeddingBagCollectionSharder,
    ShardedFeatureProcessedEmbeddingBagCollection,
)
from torchrec.distributed.mc_embedding_modules import BaseManagedCollisionEmbeddingCollectionSharder
from torchrec.distributed.sharding.dp_sharding import BaseDpEmbeddingSharding
from torchrec.distributed.sharding.rw_sharding import BaseRwEmbeddingSharding
from torchrec.distributed.sharding.tw_sharding import BaseTwEmbeddingSharding
from torchrec.distributed.sharding.twrw_sharding import BaseTwRwEmbeddingSharding
from torchrec.distributed.types import Awaitable
from torchrec.modules.mc_embedding_modules import BaseManagedCollisionEmbeddingCollection
from torchrec.optim.fused import FusedOptimizer

from torchrec_qr.distributed.sharding import POOLED_SHARDINGS, SEQUENCE_SHARDINGS

BAG, SEQUENCE = embeddingbag.ShardedEmbeddingBagCollection, embedding.ShardedEmbeddingCollection

# (class, method of it that we override or call, parameters that we pass or take)
METHODS: list[tuple[type, str, set[str]]] = [
    (BAG, "__init__", {"module", "table_name_to_parameter_sharding", "env", "fused_params", "device", "module_fqn"}),
    (BAG, "create_grouped_sharding_infos", {"module"}),
    (BAG, "create_embedding_bag_sharding", {"sharding_infos", "env", "device", "permute_embeddings"}),
    (BAG, "init_data_parallel", set()),
    (BAG, "_initialize_torch_state", {"skip_registering"}),
    (BAG, "_pre_load_state_dict_hook", {"state_dict", "prefix"}),
    (BAG, "reset_parameters", set()),
    (BAG, "create_context", set()),
    (BAG, "input_dist", {"ctx", "features"}),
    (BAG, "output_dist", {"ctx", "output"}),
    (BAG, "compute_and_output_dist", {"ctx", "input"}),
    (BAG, "update_shards", set()),
    (SEQUENCE, "__init__", {"module", "table_name_to_parameter_sharding", "env", "fused_params", "use_index_dedup"}),
    (SEQUENCE, "create_grouped_sharding_infos", {"module"}),
    (SEQUENCE, "create_embedding_sharding", {"sharding_type", "sharding_infos", "env", "device"}),
    (SEQUENCE, "init_data_parallel", set()),
    (SEQUENCE, "_initialize_torch_state", {"skip_registering"}),
    (SEQUENCE, "_pre_load_state_dict_hook", {"state_dict", "prefix"}),
    (SEQUENCE, "reset_parameters", set()),
    (SEQUENCE, "input_dist", {"ctx", "features"}),
    (GroupedPooledEmbeddingsLookup, "_create_embedding_kernel", {"config", "pg", "device"}),
    (GroupedEmbeddingsLookup, "_create_embedding_kernel", {"config", "pg", "device"}),
    (GroupedPooledEmbeddingsLookup, "named_parameters_by_table", set()),
    (GroupedEmbeddingsLookup, "named_parameters_by_table", set()),
    (BaseEmbedding, "forward", {"features"}),
    (BaseEmbedding, "config", set()),
    (FeatureProcessedEmbeddingBagCollectionSharder, "__init__", {"ebc_sharder"}),
    (FeatureProcessedEmbeddingBagCollectionSharder, "shard", {"module", "params", "env", "device", "module_fqn"}),
    (FeatureProcessedEmbeddingBagCollectionSharder, "shardable_parameters", {"module"}),
    (BaseManagedCollisionEmbeddingCollectionSharder, "shard", {"module"}),
    (BaseManagedCollisionEmbeddingCollectionSharder, "shardable_parameters", {"module"}),
    (FusedOptimizer, "__init__", {"params", "state", "param_groups"}),
    *[
        (sharding.__mro__[2], name, parameters)
        for sharding in (*POOLED_SHARDINGS.values(), *SEQUENCE_SHARDINGS.values())
        for name, parameters in (
            ("_shard", {"sharding_infos"}),
            ("create_input_dist", {"device"}),
            ("create_lookup", {"device", "fused_params", "feature_processor"}),
        )
    ],
]

# (where it is used, text of its source)
USES: list[tuple[Any, str]] = [
    (BAG.__init__, "self.create_grouped_sharding_infos("),
    (BAG.__init__, "self.create_embedding_bag_sharding("),
    (BAG.__init__, "self._initialize_torch_state("),
    (BAG.__init__, "module.embedding_bag_configs()"),
    (BAG.__init__, "module.device"),
    (BAG.create_grouped_sharding_infos, "module.state_dict()"),
    (BAG.create_grouped_sharding_infos, "module.named_parameters()"),
    (BAG._initialize_torch_state, "self.embedding_bags: nn.ModuleDict = nn.ModuleDict()"),
    (BAG._initialize_torch_state, "for table_name in self._table_names"),
    (BAG._initialize_torch_state, "self.module_sharding_plan"),
    (BAG._initialize_torch_state, "self._table_name_to_config"),
    (BAG._initialize_torch_state, "for table in self._embedding_bag_configs"),
    (BAG._initialize_torch_state, "lookup.named_parameters_by_table()"),
    (BAG._initialize_torch_state, "lookup.state_dict()"),
    (BAG._initialize_torch_state, "self.reset_parameters()"),
    (BAG._initialize_torch_state, "_pre_load_state_dict_hook"),
    (BAG._pre_load_state_dict_hook, "_model_parallel_name_to_local_shards"),
    (BAG.reset_parameters, "table_config.init_fn("),
    (BAG.update_shards, "env.output_dtensor"),
    (Awaitable, "callbacks"),
    (SEQUENCE.__init__, "self.create_grouped_sharding_infos("),
    (SEQUENCE.__init__, "self.create_embedding_sharding("),
    (SEQUENCE.__init__, "self._initialize_torch_state("),
    (SEQUENCE._initialize_torch_state, "self.embeddings: nn.ModuleDict = nn.ModuleDict()"),
    (SEQUENCE._initialize_torch_state, "self._embedding_configs"),
    (SEQUENCE._initialize_torch_state, "lookup.named_parameters_by_table()"),
    (SEQUENCE._initialize_torch_state, "_pre_load_state_dict_hook"),
    (ShardedFeatureProcessedEmbeddingBagCollection.__init__, "ebc_sharder.shard("),
    (FeatureProcessedEmbeddingBagCollectionSharder.shardable_parameters, "module._embedding_bag_collection"),
    (BaseManagedCollisionEmbeddingCollectionSharder.shardable_parameters, "module._embedding_module"),
    (BaseManagedCollisionEmbeddingCollection.__init__, "self._embedding_module.embedding_configs()"),
    (embedding_lookup.GroupedPooledEmbeddingsLookup, "self._create_embedding_kernel("),
    (embedding_lookup.GroupedPooledEmbeddingsLookup, "self._emb_modules"),
    (embedding_lookup.GroupedEmbeddingsLookup, "self._create_embedding_kernel("),
    (embedding_lookup.GroupedEmbeddingsLookup, "self._emb_modules"),
    (embedding_sharding.group_tables, "_batch_key"),
    (BaseTwEmbeddingSharding, "self._grouped_embedding_configs_per_rank"),
    (BaseRwEmbeddingSharding, "self._grouped_embedding_configs_per_rank"),
    (BaseRwEmbeddingSharding, "num_embeddings"),
    (BaseDpEmbeddingSharding, "self._grouped_embedding_configs_per_rank"),
    (BaseTwRwEmbeddingSharding, "self._grouped_embedding_configs_per_node"),
]


@pytest.mark.parametrize(("owner", "name", "parameters"), METHODS, ids=lambda v: getattr(v, "__name__", str(v)))
def test_torchrec_has_the_hook(owner: type, name: str, parameters: set[str]) -> None:
    hook = f"TorchRec's {owner.__module__}.{owner.__qualname__}.{name}"
    assert hasattr(owner, name), f"{hook} is gone: see who overrides or calls {name} in torchrec_qr/distributed"
    if parameters:
        taken = set(inspect.signature(getattr(owner, name)).parameters)
        assert parameters <= taken or "kwargs" in taken, f"{hook} no longer takes {parameters - taken}"


@pytest.mark.parametrize(("where", "text"), USES, ids=lambda v: getattr(v, "__qualname__", str(v)))
def test_torchrec_uses_the_hook(where: Any, text: str) -> None:
    assert text in inspect.getsource(where), (
        f"TorchRec's {where.__module__}.{where.__qualname__} no longer has {text!r}, on which torchrec_qr counts"
    )


def test_descriptions_of_shards_take_what_we_attach() -> None:
    """`place` and `attach` set an attribute beside the fields; `_shard` changes two fields."""
    table = ShardedEmbeddingTable(num_embeddings=1, embedding_dim=4)
    table.compositional = table.fused_params = None  # type: ignore[attr-defined]
    assert {"global_metadata", "local_metadata", "fused_params", "compute_kernel"} <= set(vars(table)), (
        "a field of TorchRec's ShardedEmbeddingTable is gone"
    )
