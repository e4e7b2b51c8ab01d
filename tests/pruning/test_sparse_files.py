"""A file of `save_sparse` gives the model back, under any names, or is refused."""

import math
import os

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from hesscurv.pruning import dense_state_dict, load_sparse, save_sparse
from hesscurv.storage.checked_files import read_checked, write_checked


def network():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(40, 10), nn.Linear(10, 3))
    prune.l1_unstructured(net[0], "weight", amount=0.99)
    prune.l1_unstructured(net[1], "weight", amount=0.5)
    return net


@pytest.fixture
def path(tmp_path):
    save_sparse(network(), tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("masks", [False, True])
def test_damage_of_any_kind_is_found(path, masks):
    content = path.read_bytes()
    for at in range(0, len(content), 11):
        changed = bytearray(content)
        changed[at] ^= 0x10
        for damaged in (bytes(changed), content[:at]):
            path.write_bytes(damaged)
            with pytest.raises(ValueError, match="model"):
                load_sparse(path, masks=masks)


def forge(path, **changes):
    """Rewrite the entry of a masked weight, (10, 40), with a checksum that fits."""
    data = read_checked(path)
    first = next(entry for entry in data["entries"] if entry["masked"])
    first.update({key: value for key, value in changes.items() if key in first})
    for key in changes.keys() - first.keys():
        data[key] = changes[key]
    write_checked(path, data)


@pytest.mark.parametrize(
    "changes",
    [
        {"shape": [-40, -10]},
        {"shape": [40, -10]},
        {"shape": [40.0, 10]},
        {"shape": [10**30, 10**30]},
        {"shape": "40"},
        {"shape": [1, 4]},  # its indices lie outside
        {"count": -1},
        {"count": 10**18},
        {"count": 3},
        {"where": "all"},
        {"where": "nowhere"},
        {"where": "bits"},
        {"dtype": "float64"},
        {"dtype": "load"},
        {"name": None, "dtype": None},
        {"values": {}},
        {"values": {"float32": torch.zeros(7)}},
        {"places": torch.zeros(3, dtype=torch.uint8)},
        {"entries": [{"name": "a", "same_as": "b"}]},
        {"entries": [{"size": 3}]},
        {"entries": 3},
    ],
)
def test_sizes_that_do_not_fit_each_other_are_refused(path, changes):
    forge(path, **changes)
    with pytest.raises(ValueError, match=r"model is damaged.*save it again"):
        load_sparse(path)


def test_what_memory_cannot_hold_is_refused_before_it_is_taken(path):
    # All of it pruned: no value and no index says that so many are not meant.
    write_checked(
        path,
        {
            **read_checked(path),
            "values": {"float32": torch.zeros(0)},
            "places": torch.zeros(0, dtype=torch.uint8),
            "entries": [
                {
                    "name": "w",
                    "shape": [2**40, 2**10],
                    "dtype": "float32",
                    "where": "indices",
                    "count": 0,
                    "masked": True,
                }
            ],
        },
    )
    with pytest.raises(ValueError, match=r"got 4\.5e\+06 GB when dense"):
        load_sparse(path)


def test_foreign_files_and_folders_are_refused(path, tmp_path):
    torch.save(network().state_dict(), path)
    with pytest.raises(ValueError, match="not a file of this library"):
        load_sparse(path)
    write_checked(path, {"format": "other"})
    with pytest.raises(ValueError, match="another kind"):
        load_sparse(path)
    with pytest.raises(IsADirectoryError):
        load_sparse(tmp_path)


@pytest.mark.parametrize(
    "name", ["a$_b^$", "层 1", "a b", "%s", "_x", "new\nline", "x" * 300, "a/b\\c", "\ud800", "é"]
)
def test_any_name_of_a_module_comes_back(tmp_path, name):
    net = nn.Sequential()
    net.add_module(name, nn.Linear(4, 3))
    prune.l1_unstructured(net[0], "weight", amount=0.5)
    size = save_sparse(net, tmp_path / "model")
    assert size == os.path.getsize(tmp_path / "model")
    dense = load_sparse(tmp_path / "model")
    expected = dense_state_dict(net)
    assert list(dense) == list(expected)
    assert all(torch.equal(dense[key], expected[key]) for key in dense)


def test_a_link_is_written_through_and_the_mode_stays(tmp_path):
    target, link = tmp_path / "model", tmp_path / "latest"
    save_sparse(network(), target)
    target.chmod(0o640)
    link.symlink_to("model")
    size = save_sparse(nn.Linear(2, 2), link)
    assert link.is_symlink()
    assert target.stat().st_size == size
    assert target.stat().st_mode & 0o777 == 0o640
    assert math.prod(load_sparse(target)["weight"].shape) == 4


def test_a_device_is_written_to():
    assert save_sparse(nn.Linear(2, 2), os.devnull) > 0
