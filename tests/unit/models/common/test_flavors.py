import pytest

from torchtitan_mixtures.models.common.flavors import Flavors


def test_missing_flavour_names_the_known_ones():
    flavors = Flavors("some", {"debugmodel": {"dim": 1}, "large": {"dim": 2}})
    assert list(flavors) == ["debugmodel", "large"]
    assert "tiny" not in flavors
    with pytest.raises(KeyError, match=r"'tiny' is not a flavour of 'some'.*debugmodel, large"):
        flavors["tiny"]


def test_look_up_returns_a_copy():
    flavors = Flavors("some", {"debugmodel": {"sizes": [1]}})
    flavors["debugmodel"]["sizes"].append(2)
    assert flavors["debugmodel"] == {"sizes": [1]}
