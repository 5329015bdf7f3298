"""One of two ranks is killed at a place where a checkpoint's files change; the same line goes on, with as many ranks or with one.

The long form of tests/crash: `pytest -n 0 -m long`.
"""

import pytest

from axolotl_qtha.training.checkpoints import fault, of_run

from .commands import train_here
from .ranks import assert_follows, config_for, history, output

pytestmark = pytest.mark.long
PLACES = range(0, 48, 6)  # of a save, which has some fifty


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("crashes")


@pytest.fixture(scope="module")
def single(folder):
    config = config_for(folder / "single", None)
    train_here(config)
    return output(config)


@pytest.mark.parametrize("ranks", [2, 1])
@pytest.mark.parametrize("strategy", ["zero3", "fsdp2"])
@pytest.mark.parametrize("place", PLACES)
def test_a_rank_killed_while_it_saves(place, strategy, ranks, folder, single, servers):
    name = f"{strategy}-{place}-{ranks}"
    config = config_for(folder / name, strategy, save_steps=2, auto_resume_from_checkpoints=True, dataloader_num_workers=0)
    servers.train(config, strategy, killed=f"0:4:{place}")
    out = output(config)
    assert (out / "checkpoint-2").is_dir()
    accumulate = config_for(
        folder / name, strategy, save_steps=2, auto_resume_from_checkpoints=True, gradient_accumulation_steps=2
    )
    servers.train(config if ranks == 2 else accumulate, strategy, ranks=ranks)
    assert all(fault(path, whole=True) is None for path in of_run(out))
    assert not [path.name for path in out.iterdir() if path.name.startswith((".", "incomplete-"))]
    assert_follows(history(out), history(single))
