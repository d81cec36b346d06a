"""The strict loader and YAML files: what they take, that nothing is lost on the way, the error of each mistake."""

import math
import pickle
import re
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from schema_cases import error_of, written

from torchrec_qr import HashPartition, QuotientRemainder
from torchrec_qr.cli.schema import (
    ConfigError,
    Range,
    dump,
    load,
    read_yaml,
)


class Rule(Enum):
    SGD = "exact_sgd"
    ROWWISE_ADAGRAD = "exact_rowwise_adagrad"


@dataclass(frozen=True)
class Optimizer:
    rule: Rule = Rule.SGD
    learning_rate: Annotated[float, Range(above=0)] = 0.1
    betas: tuple[float, float] = (0.9, 0.999)


@dataclass(frozen=True)
class Job:
    name: str
    steps: Annotated[int, Range(1, 1000)]
    optimizers: dict[str, Optimizer] = field(default_factory=dict)
    schedule: Literal["constant", "cosine", 3] = "constant"
    milestones: tuple[int, ...] = ()
    tags: list[str] = field(default_factory=list)
    target: float | None = None
    resume: bool = False
    width: Annotated[int, Range(4, multiple_of=4)] | None = None


def test_load_values() -> None:
    job = load(
        Job,
        {
            "name": "a",
            "steps": 10,
            "optimizers": {"sparse": {"rule": "rowwise_adagrad", "learning_rate": 1}},
            "schedule": 3,
            "milestones": [3, 5],
            "tags": ["x"],
            "target": None,
            "resume": True,
            "width": 8,
        },
    )
    sparse = Optimizer(Rule.ROWWISE_ADAGRAD, 1.0)
    assert job == Job("a", 10, {"sparse": sparse}, 3, (3, 5), ["x"], None, True, 8)
    assert type(job.optimizers["sparse"].learning_rate) is float
    assert load(list[tuple[int, str]], [[1, "a"]]) == [(1, "a")]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"step": 1}, "job.step: unknown key; did you mean 'steps'?"),
        (
            {"zzz": 1},
            "job.zzz: unknown key; allowed: name, steps, optimizers, schedule, milestones, tags, target, resume, width",
        ),
        ({1: 1}, "job[1]: unknown key; allowed: name"),
        ({"steps": 0}, "job.steps: 0; allowed: 1..1000"),
        ({"steps": True}, "job.steps: True; allowed: int"),
        ({"steps": "3"}, "job.steps: '3'; allowed: int"),
        ({"steps": 3.0}, "job.steps: 3.0; allowed: int"),
        ({"steps": None}, "job.steps: None; allowed: int"),
        ({"name": 3}, "job.name: 3; allowed: str"),
        ({"resume": 1}, "job.resume: 1; allowed: bool"),
        ({"target": "0.8"}, "job.target: '0.8'; allowed: float"),
        ({"target": True}, "job.target: True; allowed: float"),
        ({"target": math.nan}, "job.target: nan; allowed: a number"),
        ({"target": 10**400}, f"job.target: 1{'0' * 99}…; allowed: float"),
        ({"width": 6}, "job.width: 6; allowed: at least 4 and a multiple of 4"),
        (
            {"schedule": "cosin"},
            "job.schedule: 'cosin'; allowed: 'constant', 'cosine', 3; did you mean 'cosine'?",
        ),
        ({"schedule": True}, "job.schedule: True; allowed: 'constant', 'cosine', 3"),
        ({"milestones": 3}, "job.milestones: 3; allowed: a list"),
        ({"tags": "abc"}, "job.tags: 'abc'; allowed: a list"),
        ({"tags": ["a", 2]}, "job.tags[1]: 2; allowed: str"),
        ({"optimizers": []}, "job.optimizers: []; allowed: a mapping"),
        ({"optimizers": {3: {}}}, "job.optimizers[3], the key: 3; allowed: str"),
        ({"optimizers": {"s": 1}}, "job.optimizers.s: 1; allowed: a mapping with keys of rule, learning_rate, betas"),
        (
            {"optimizers": {"a.b": {"rule": "SGD"}}},
            "job.optimizers['a.b'].rule: 'SGD'; allowed: 'sgd', 'rowwise_adagrad'",
        ),
        ({"optimizers": {"s": {"learning_rate": 0}}}, "job.optimizers.s.learning_rate: 0; allowed: above 0"),
        ({"optimizers": {"s": {"betas": [0.9]}}}, "job.optimizers.s.betas: [0.9]; allowed: a list of 2"),
    ],
)
def test_load_errors(change: dict[Any, Any], message: str) -> None:
    assert error_of(load, Job, {"name": "a", "steps": 10, **change}, "job").startswith(message)


def test_errors_come_together_and_apart() -> None:
    with pytest.raises(ConfigError) as caught:
        load(Job, {"nam": "a", "steps": 0, "optimizers": {"s": {"rule": 1, "learning_rate": -1}}})
    error = caught.value
    lines = [
        "nam: unknown key; did you mean 'name'?",
        "name: missing, and has no default",
        "steps: 0; allowed: 1..1000",
        "optimizers.s.rule: 1; allowed: 'sgd', 'rowwise_adagrad'",
        "optimizers.s.learning_rate: -1; allowed: above 0",
    ]
    assert str(error) == "5 errors\n  " + "\n  ".join(lines)
    assert [str(single) for single in error.errors] == lines
    assert [single.path for single in error.under("job").errors][3] == "job.optimizers.s.rule"
    assert (error.errors[2].path, error.errors[2].given, error.errors[2].allowed) == ("steps", 0, "1..1000")


def test_error_survives_pickling() -> None:
    with pytest.raises(ConfigError) as caught:
        load(Job, {"nam": "a", "steps": 0})
    error = caught.value.in_file("job.yaml")
    copy = pickle.loads(pickle.dumps(error))  # noqa: S301
    assert str(copy) == str(error)
    assert str(copy).startswith("job.yaml: 3 errors\n  nam: ")


@dataclass(frozen=True)
class Even:
    value: int
    nested: QuotientRemainder | HashPartition | None = None

    def __post_init__(self) -> None:
        if self.value % 2:
            raise ValueError(f"{self.value} is odd")


def test_errors_of_post_init_get_the_path() -> None:
    assert error_of(load, list[Even], [{"value": 2}, {"value": 3}], "evens") == "evens[1]: 3 is odd"
    given = {"value": 2, "nested": {"kind": "hash", "grouping": "strided"}}
    assert error_of(load, Even, given, "even") == (
        "even.nested.grouping: not a key of kind 'hash', whose keys are rows, compression"
    )


def test_type_that_no_config_can_have() -> None:
    @dataclass(frozen=True)
    class Wrong:
        value: int | str = 3

    with pytest.raises(TypeError, match=r"wrong.value: a config cannot have a field of the type int \| str"):
        load(Wrong, {"value": 3}, "wrong")


texts = st.text(max_size=8)
floats = st.floats(allow_nan=False)
optimizers = st.builds(
    Optimizer, st.sampled_from(Rule), st.floats(min_value=0, exclude_min=True), st.tuples(floats, floats)
)
jobs = st.builds(
    Job,
    name=texts,
    steps=st.integers(1, 1000),
    optimizers=st.dictionaries(texts, optimizers, max_size=3),
    schedule=st.sampled_from(["constant", "cosine", 3]),
    milestones=st.lists(st.integers(), max_size=3).map(tuple),
    tags=st.lists(texts, max_size=3),
    target=st.none() | floats,
    resume=st.booleans(),
    width=st.none() | st.integers(1, 100).map(lambda n: 4 * n),
)


@given(jobs, st.booleans())
def test_load_inverts_dump(job: Job, defaults: bool) -> None:
    dumped = dump(job, defaults=defaults)
    assert load(Job, dumped) == job
    assert load(Job, yaml.safe_load(yaml.safe_dump(dumped))) == job


def test_dump_is_plain() -> None:
    job = Job("a", 3, {"s": Optimizer(Rule.ROWWISE_ADAGRAD)}, milestones=(1, 2))
    sparse = {"rule": "rowwise_adagrad", "learning_rate": 0.1, "betas": [0.9, 0.999]}
    assert dump(job) == {
        "name": "a",
        "steps": 3,
        "optimizers": {"s": sparse},
        "schedule": "constant",
        "milestones": [1, 2],
        "tags": [],
        "target": None,
        "resume": False,
        "width": None,
    }
    short = {"name": "a", "steps": 3, "optimizers": {"s": {"rule": "rowwise_adagrad"}}, "milestones": [1, 2]}
    assert dump(job, defaults=False) == short


# --- YAML files ---


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1_000_000", 1_000_000),
        ("1e-3", 0.001),
        ("-2E5", -200_000.0),
        ("1.5e3", 1500.0),
        ("1.5e-3", 0.0015),
        ("2x8", "2x8"),
        ("e3", "e3"),
        ("1e3x", "1e3x"),
        ("'1e3'", "1e3"),
    ],
)
def test_scalars_of_yaml(tmp_path: Path, text: str, value: object) -> None:
    read = read_yaml(written(tmp_path, f"key: {text}"))["key"]
    assert read == value
    assert type(read) is type(value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: [1, 2\nc: 3\n", r"line 3, column 2: .*(expected|did not find)"),
        ("a: 1\nb: {c: 1,\n  d: 2, c: 3}\n", r"line 3, column 9: duplicate key 'c', first on line 2$"),
        ("a: 1\na: 2\n", r"line 2, column 1: duplicate key 'a', first on line 1$"),
        ("- &x {a: 1, 'a': 2}\n- *x\n", r"line 1, column 13: duplicate key 'a', first on line 1$"),
        ("a: !!python/name:os.system\n", r"line 1, column 4: could not determine a constructor"),
        ("a: {<<: 3}\n", r"line 1, column 9: .*expected a mapping"),
        ("a: {[1]: 3}\n", r"line 1, column 5: .*unhashable"),
        ("a: &b {<<: *b, <<: *b}\n", r"line 1, column 16: duplicate key '<<'"),
        ("a: *b\n", r"line 1, column 4: .*undefined alias"),
        ("a: 1\n---\nb: 2\n", r"line 2, column 1: .*document"),
        ("[1, 2]\n", r"\[1, 2\]; allowed: a mapping of sections$"),
    ],
)
def test_malformed_files(tmp_path: Path, text: str, message: str) -> None:
    file = written(tmp_path, text)
    assert re.match(re.escape(f"{file}: ") + message, error_of(read_yaml, file))


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    file.write_bytes(b"a: \xff\xfe\x00")
    assert error_of(read_yaml, file).startswith(f"{file}: ")


def test_merge_keys_may_override(tmp_path: Path) -> None:
    text = "one: &x {a: 1, b: 2}\ntwo: &y {<<: *x, b: 3}\nthree: {<<: *y, a: 4}\nempty:\n"
    assert read_yaml(written(tmp_path, text)) == {
        "one": {"a": 1, "b": 2},
        "two": {"a": 1, "b": 3},
        "three": {"a": 4, "b": 3},
        "empty": None,
    }
    text = "maps: [&x {a: 1, b: 2}, &y {b: 3, c: 4}]\nboth: {<<: [*x, *y], c: 5}\n"
    assert read_yaml(written(tmp_path, text))["both"] == {"a": 1, "b": 2, "c": 5}
    assert read_yaml(written(tmp_path, "# nothing\n")) == {}
