"""Training reproduces the recorded losses: bit for bit on the same kind of machine, else within a tolerance."""

import math

import pytest

from tests.golden.recordings import RECORDINGS, RELATIVE_TOLERANCE, differences, read


@pytest.mark.parametrize("name", RECORDINGS)
def test_losses_are_as_recorded(name: str) -> None:
    assert differences(name, *RECORDINGS[name]()) == []


@pytest.mark.parametrize("name", RECORDINGS)
def test_one_bit_is_a_difference_on_the_same_machine_alone(name: str) -> None:
    machine, curves = read(name)
    assert differences(name, machine, curves) == []
    changed = next(iter(curves))
    value = curves[changed][1]
    curves[changed][1] = math.nextafter(value, math.inf)
    assert len(found := differences(name, machine, curves)) == 1
    assert found[0].startswith(f"{changed}[1]: ")
    assert differences(name, {**machine, "vendor": "another"}, curves) == []
    curves[changed][1] = value * (1 + 2 * RELATIVE_TOLERANCE)
    assert len(differences(name, {**machine, "vendor": "another"}, curves)) == 1
    del curves[changed]
    assert differences(name, machine, curves) == [f"{changed}: in the file or in the training, not in both"]
