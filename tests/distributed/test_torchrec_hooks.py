"""TorchRec has every name that the sharded collections rely upon, calls what they override, and a lack is an error."""

import subprocess
import sys
from pathlib import Path
from types import CodeType, FrameType, FunctionType
from typing import Any

import pytest
from parity_model import Run, one_of_each, train
from ranks import run_ranks

from torchrec_qr.distributed.embedding import ShardedCompositionalEmbeddingCollection
from torchrec_qr.distributed.embeddingbag import ShardedCompositionalEmbeddingBagCollection
from torchrec_qr.distributed.hooks import HOOKS, Hook, _functions, require
from torchrec_qr.distributed.lookup_kernel import CompositionalKernel, PooledLookup, SequenceLookup
from torchrec_qr.distributed.sharding import POOLED_SHARDINGS, SEQUENCE_SHARDINGS

# The delta tracker alone calls these: see `test_delta_tracker`.
OF_TRACKERS = {
    "ShardedCompositionalCollection.register_post_lookup_tracker_fn",
    "_CompositionalLookup.register_optim_state_tracker_fn",
}

HERE = Path(__file__).parent
# Pipelines call the first, quantisation and virtual tables ask for the kernel's config, and the others are dynamic
# resharding's.
UNCALLED_OF_BAGS = {
    f"ShardedCompositionalEmbeddingBagCollection.{name}"
    for name in ("output_dist", "unsharded_module_type", "update_shards")
}
UNCALLED_OF_SEQUENCES = {"ShardedCompositionalEmbeddingCollection.output_dist"}


def test_this_version_has_all() -> None:
    require(HOOKS)


def renamed(code: CodeType, name: str) -> CodeType:
    """Code, and the functions within, with another name in place of ``name``."""

    def constant(value: Any) -> Any:
        if isinstance(value, tuple | frozenset):
            return type(value)(constant(v) for v in value)
        return renamed(value, name) if isinstance(value, CodeType) else "gone" if value == name else value

    names, variables = (tuple("gone" if n == name else n for n in ns) for ns in (code.co_names, code.co_varnames))
    return code.replace(co_names=names, co_varnames=variables, co_consts=constant(code.co_consts))


def _id(value: Any) -> str:
    return value.owner.__name__ if isinstance(value, Hook) else str(value)


@pytest.mark.parametrize(("hook", "name"), [(hook, name) for hook in HOOKS for name in hook.defined], ids=_id)
def test_a_method_that_is_gone_is_named(hook: Hook, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for owner in getattr(hook.owner, "__mro__", (hook.owner,)):
        if name in vars(owner):
            monkeypatch.delattr(owner, name)
    with pytest.raises(ImportError, match=rf"lacks .*\b{hook.owner.__name__}\.{name}\b"):
        require([hook])


@pytest.mark.parametrize(("hook", "name"), [(hook, name) for hook in HOOKS for name in hook.used], ids=_id)
def test_an_attribute_that_is_gone_is_named(hook: Hook, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for function in set(_functions(hook.owner)):
        monkeypatch.setattr(function, "__code__", renamed(function.__code__, name))
    with pytest.raises(ImportError, match=rf"lacks .*\b{hook.owner.__name__}\.{name}\b"):
        require([hook])


def test_the_import_fails_where_a_hook_is_gone() -> None:
    """TorchRec 1.6 did so in silence, because it has no ``init_data_parallel`` to override."""
    code = (
        "from torchrec.distributed.embedding import ShardedEmbeddingCollection as collection\n"
        "del collection.reset_parameters\n"
        "import torchrec_qr.distributed"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code], cwd=HERE.parents[1], capture_output=True, text=True, timeout=120, check=False
    )
    assert ended.returncode == 1
    last = ended.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: torchrec ")
    assert "lacks torchrec.distributed.embedding.ShardedEmbeddingCollection.reset_parameters" in last


def functions_called(rank: int, world_size: int, run: Run) -> dict[str, set[str]]:
    """Per override, the packages that called it while a model was sharded, loaded, trained and saved."""
    callers: dict[CodeType, set[str]] = {}

    def note(frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and frame.f_back is not None:
            package = frame.f_back.f_globals.get("__name__", "").split(".")[0]
            callers.setdefault(frame.f_code, set()).add(package)

    sys.setprofile(note)
    train(rank, world_size, run)
    sys.setprofile(None)
    return {name: callers.get(code, set()) for name, code in overrides(run.pooled).items()}


def overrides(pooled: bool) -> dict[str, CodeType]:
    """The methods of our classes that TorchRec's have too, by name."""
    collection = ShardedCompositionalEmbeddingBagCollection if pooled else ShardedCompositionalEmbeddingCollection
    lookup = PooledLookup if pooled else SequenceLookup
    sharding = (POOLED_SHARDINGS if pooled else SEQUENCE_SHARDINGS)["row_wise"]
    out = {}
    for leaf in (collection, lookup, sharding, CompositionalKernel):
        ours = [cls for cls in leaf.__mro__ if cls.__module__.startswith("torchrec_qr.")]
        theirs = [cls for cls in leaf.__mro__ if cls.__module__.startswith("torchrec.")]
        for cls in ours:
            for name, value in vars(cls).items():
                function = getattr(value, "__func__", value.fget if isinstance(value, property) else value)
                if (
                    name != "__init__"
                    and isinstance(function, FunctionType)
                    and any(name in vars(base) for base in theirs)
                ):
                    out[f"{cls.__name__}.{name}"] = function.__code__
    return out


@pytest.mark.parametrize("pooled", [True, False], ids=["pooled", "sequences"])
def test_torchrec_calls_every_override(pooled: bool) -> None:
    """A seam that TorchRec goes around would leave its own tables in the place of compositional ones."""
    shardings = POOLED_SHARDINGS if pooled else SEQUENCE_SHARDINGS
    tables = one_of_each(tuple(shardings), plan="hand")
    ranks = run_ranks(functions_called, 2, Run(tables, pooled=pooled, index_dedup=not pooled))
    called = {name for rank in ranks for name, packages in rank.items() if packages & {"torch", "torchrec"}}
    uncalled = {"CompositionalKernel.config", *OF_TRACKERS} | (UNCALLED_OF_BAGS if pooled else UNCALLED_OF_SEQUENCES)
    assert set(ranks[0]) - called == uncalled
