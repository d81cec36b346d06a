"""The meaning of a run's stored rows: the map from raw values to rows, kept in the run's folder."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from launch.data.errors import BadRows, DataError, readable
from launch.data.id_mapping import Vocabulary, count_values, load_vocabularies, save_vocabularies
from launch.data.split import Split
from launch.differences import differences

if TYPE_CHECKING:
    from launch.config import Job
    from launch.sections import DataSection

_VERSION = 2  # of how values become 64-bit ids
_MEANING, _VOCABULARY = "meaning.json", "vocabulary.npz"
_FROM_ROWS, _FROM_FILE, _IN_THE_FILES = "the train split", "a file", "the npy files"


class MeaningError(ValueError):
    """A job would give the stored rows of a run another meaning; names what differs, the saved and the new value."""


@dataclass(frozen=True)
class Meaning:
    """The map from raw values to rows of tables and to a model's inputs.

    A run's folder has it as two files of data: ``meaning.json`` with `described`, and under ``ids: vocabulary``
    ``vocabulary.npz``. That has the values of each feature in the order of their rows, and their counts. Nothing is
    kept of the values of tables with an ``id_hash``, whose ids are raw.

    Args:
        described (dict[str, Any]): ids mode; of each feature its column, the rows of its table, and the hash of its
            ids if there is one; columns of dense features and what is done to them; the origin of the vocabulary,
            ``min_count``, and the vocabulary's SHA-256.
        vocabularies (Mapping[str, Vocabulary] | None): of each feature but raw ones; None: there is none.

    Attributes:
        hash (str): SHA-256 of all this, which every checkpoint of a run has too.
    """

    described: dict[str, Any]
    vocabularies: Mapping[str, Vocabulary] | None = None

    @property
    def hash(self) -> str:
        text = json.dumps(self.described, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    @classmethod
    def of_job(cls, job: "Job", train: Split) -> "Meaning":
        """Returns the meaning that a job gives to a new run, its vocabularies counted on the train split if need be.

        Raises:
            DataError: the train split, or ``data.vocabulary``, cannot be read.
        """
        vocabularies = _vocabularies(job, train)
        return cls(_described(job, vocabularies), vocabularies)

    @classmethod
    def read(cls, folder: Path) -> "Meaning":
        """Returns what `write` wrote.

        Raises:
            DataError: a file is missing, corrupt or of another version, or the vocabulary is another one than
                ``meaning.json`` names.
        """
        path = folder / _MEANING
        with readable(path, "what a run writes there", ValueError, KeyError, TypeError, AttributeError):
            described = json.loads(path.read_text())
            ids = described["ids"]
            mapped = [feature for feature, of in described["features"].items() if "id_hash" not in of]
            wanted = described["vocabulary"].get("sha256") if described["vocabulary"] else None
        if described.get("version") != _VERSION:
            problem = f"version {described.get('version')} of the map from values to rows; allowed: {_VERSION}"
            raise DataError(str(path), problem)
        if ids != "vocabulary" or wanted is None:
            return cls(described)
        vocabularies = load_vocabularies(folder / _VOCABULARY, mapped)
        if (found := _hash_of(vocabularies)) != wanted:
            problem = f"its values have the SHA-256 {found}; allowed: {wanted}, that of the run (meaning.json)"
            raise DataError(str(folder / _VOCABULARY), problem)
        return cls(described, vocabularies)

    def without_rows(self) -> dict[str, int]:
        """Returns how many values share row 0, for each feature whose table is too small for its values."""
        features, vocabularies = self.described["features"], self.vocabularies or {}
        beyond = {name: len(values) + 1 - features[name]["rows"] for name, values in vocabularies.items()}
        return {name: number for name, number in beyond.items() if number > 0}

    def write(self, folder: Path) -> None:
        """Writes the files into a run's folder, ``meaning.json`` last; each is whole or not there."""
        if self.vocabularies is not None:
            part = folder / f"{_VOCABULARY}.part"
            save_vocabularies(part, self.vocabularies)
            part.replace(folder / _VOCABULARY)
        part = folder / f"{_MEANING}.part"
        part.write_text(json.dumps(self.described, indent=1) + "\n")
        part.replace(folder / _MEANING)

    def check(self, job: "Job", origin: Path) -> None:
        """Checks that ``job`` leaves this meaning as it is. Other files are no other meaning.

        Args:
            job (Job): that is to go on with the rows of ``origin``.
            origin (Path): the folder of the run.

        Raises:
            MeaningError: names all that differs.
            DataError: ``data.vocabulary`` cannot be read.
        """
        here = _described(job, None)
        saved = dict(self.described)
        both = saved["ids"] == here["ids"] == "vocabulary"
        here["vocabulary"] = _comparable(saved["vocabulary"], job) if both else saved["vocabulary"]
        if found := differences(saved, here):
            raise MeaningError(
                f"{origin}: its stored rows would get another meaning: {'; '.join(found)}; allowed: the saved values, "
                "or a run of another name (--name)"
            )

    def check_config(self, job: "Job", folder: Path) -> None:
        """Checks that ``config.yaml`` and ``meaning.json`` of a folder are of one run; reads no other file.

        Raises:
            MeaningError: names all that differs.
        """
        here = {**_described(job, None), "vocabulary": self.described.get("vocabulary")}
        if found := differences(self.described, here):
            raise MeaningError(f"{folder}: config.yaml is not of its meaning.json: {'; '.join(found)}")


def _described(job: "Job", vocabularies: Mapping[str, Vocabulary] | None) -> dict[str, Any]:
    section = job.data
    named = section.columns
    dense = [f"int_{i}" for i in range(section.dense_features)] if named is None else list(named.dense)
    hexadecimal = () if named is None else named.hexadecimal
    return {
        "version": _VERSION,
        "ids": section.ids,
        "features": {
            feature: {
                "column": column,
                "hexadecimal": column in hexadecimal,
                "rows": table.num_embeddings,
                **({} if table.id_hash is None else {"id_hash": table.id_hash, "hash_seed": table.hash_seed}),
            }
            for feature, column, table in zip(
                section.features, section.id_columns(), job.tables_of_features(), strict=True
            )
        },
        "dense": {"columns": dense, "transform": section.dense_transform, "missing_flags": section.missing_flags},
        "vocabulary": _origin(section, vocabularies),
    }


def _origin(section: "DataSection", vocabularies: Mapping[str, Vocabulary] | None) -> dict[str, Any] | None:
    if section.ids != "vocabulary":
        return None
    if section.vocabulary is None and section.format == "npy":
        return {"from": _IN_THE_FILES}
    digest = {} if vocabularies is None else {"sha256": _hash_of(vocabularies)}
    if section.vocabulary is not None:
        return {"from": _FROM_FILE, **digest}
    return {"from": _FROM_ROWS, "min_count": section.min_count, **digest}


def _comparable(saved: dict[str, Any], job: "Job") -> dict[str, Any]:
    """Returns the vocabulary that ``job`` describes, with the saved values of all that it leaves open."""
    section = job.data
    here = _origin(section, None)
    assert here is not None
    if _IN_THE_FILES in (saved["from"], here["from"]):
        return here
    if section.vocabulary is not None:
        given = load_vocabularies(section.vocabulary, job.mapped_features())
        return {**saved, "sha256": _hash_of(given)}
    # A vocabulary of a file had its own least count; one of the train split has the job's.
    return {**saved, "min_count": here["min_count"]} if saved["from"] == _FROM_ROWS else saved


def _vocabularies(job: "Job", train: Split) -> dict[str, Vocabulary] | None:
    section, mapped = job.data, job.mapped_features()
    if section.ids != "vocabulary":
        return None
    tables = {feature: table.name for feature, table in zip(section.features, job.tables_of_features(), strict=True)}
    if section.vocabulary is not None:
        given = load_vocabularies(section.vocabulary, mapped)
        _check_shared(section.vocabulary, given, tables)
        return given
    if section.format == "npy":
        return None  # written by the preprocessing, in the order of frequency
    positions = [section.features.index(feature) for feature in mapped]
    bad_rows = BadRows(section.on_bad_row)
    counts = count_values(train.source.reopened(), train.start, train.stop, positions, bad_rows)
    bad_rows.require_good(len(train) - bad_rows.count, f"the {train.name} split")
    vocabularies = counts.vocabularies(section.min_count, [tables[feature] for feature in mapped])
    return dict(zip(mapped, vocabularies, strict=True))


def _check_shared(path: str, vocabularies: Mapping[str, Vocabulary], tables: Mapping[str, str]) -> None:
    """Checks that a value has one row in a table, whichever of the table's features has it."""
    first: dict[str, str] = {}
    for feature, vocabulary in vocabularies.items():
        other = first.setdefault(tables[feature], feature)
        if not np.array_equal(vocabulary.values, vocabularies[other].values):
            problem = f"{other!r} and {feature!r} have other values, and share table {tables[feature]!r}"
            raise DataError(path, f"{problem}; allowed: the same values in the same order")


def _hash_of(vocabularies: Mapping[str, Vocabulary]) -> str:
    digest = hashlib.sha256()
    for feature, vocabulary in vocabularies.items():
        digest.update(f"{feature}\0{len(vocabulary)}\0".encode())
        digest.update(np.ascontiguousarray(vocabulary.values, "<i8").tobytes())
    return digest.hexdigest()
