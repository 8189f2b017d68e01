"""Checkpoints on a file system that cannot rename folders: a bucket that is mounted."""

import errno
import os
import shutil

import jax
import pytest
from orbax.checkpoint._src.path import atomicity

from llm3.checkpoints.commit import BY_FILE, COMMITTED
from llm3.checkpoints.stage_checkpoints import Checkpoints
from llm3.errors import NotWritten
from llm3.stages import amend
from tests.helpers.tiny_checkpoints import OPT, PARAMS, flip, largest, newest, same, save_two_steps

TWICE = jax.tree.map(lambda x: 2 * x, PARAMS)


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    """A folder of checkpoints from an ordinary disk, moved into a bucket: steps 10 (PARAMS) and 20 (twice PARAMS)."""
    save_two_steps(tmp_path / "checkpoints")

    def without_folders(function):
        def rename(source, *more, **options):
            if os.path.isdir(source):
                raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP), source)
            return function(source, *more, **options)

        return rename

    for name in ("rename", "replace"):
        monkeypatch.setattr(os, name, without_folders(getattr(os, name)))
    return tmp_path / "checkpoints"


def folders(bucket):
    return sorted(each.name for each in bucket.iterdir() if each.name != BY_FILE)


def test_a_bucket_takes_saves_keeps_earlier_ones_and_deletes_as_a_disk_does(bucket):
    with Checkpoints(bucket, keep=2, best="loss") as checkpoints:
        checkpoints.save(30, TWICE, OPT, {}, {"loss": 1.0})
        checkpoints.save(40, PARAMS, OPT, {}, {"loss": 3.0})
        checkpoints.save(50, PARAMS, OPT, {}, {"loss": 2.0})
    assert folders(bucket) == ["30", "40", "50"]
    assert same(Checkpoints(bucket, read_only=True).load_params(30, None), jax.tree.map(jax.device_get, TWICE))
    assert newest(Checkpoints(bucket, read_only=True)).step == 50


def test_a_save_counts_from_its_last_file_on_and_what_a_kill_left_is_removed(bucket):
    Checkpoints(bucket, keep=3).save(30, PARAMS, OPT, {})
    shutil.copytree(bucket / "30", bucket / "40", ignore=shutil.ignore_patterns(COMMITTED))
    assert newest(Checkpoints(bucket, read_only=True)).step == 30
    Checkpoints(bucket, keep=3).save(40, TWICE, OPT, {})
    restored = newest(Checkpoints(bucket, read_only=True))
    assert (restored.step, restored.skipped) == (40, []) and same(restored.params, TWICE)
    assert folders(bucket) == ["20", "30", "40"]


def test_a_save_whose_last_file_is_refused_does_not_count_and_leaves_nothing(bucket, monkeypatch):
    seen, finalize = [], atomicity.CommitFileTemporaryPath.finalize

    async def refuse(path):
        seen.append(newest(Checkpoints(bucket, read_only=True)).step)
        if path.get().name == "30":  # not one of its parts
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        await finalize(path)

    monkeypatch.setattr(atomicity.CommitFileTemporaryPath, "finalize", refuse)
    with pytest.raises(NotWritten, match="step 30 was not written"):
        Checkpoints(bucket).save(30, PARAMS, OPT, {})
    assert set(seen) == {20} and folders(bucket) == ["10", "20"]


def test_a_damaged_checkpoint_is_set_aside_in_a_bucket_too(bucket):
    flip(largest(bucket / "20" / "params"))
    with Checkpoints(bucket) as checkpoints:
        assert newest(checkpoints).step == 10
        checkpoints.save(20, TWICE, OPT, {})
    assert folders(bucket) == ["10", "20", "20.damaged"]
    assert newest(Checkpoints(bucket, read_only=True)).skipped == []


def test_going_back_to_an_earlier_step_sets_the_later_ones_aside_in_a_bucket_too(bucket, tmp_path):
    Checkpoints(bucket, keep=3).save(30, TWICE, OPT, {})
    amend._set_aside(tmp_path, [20, 30], amend.new_folder(tmp_path))
    assert folders(bucket) == ["10"]
    aside = Checkpoints(tmp_path / "set_aside" / "1" / "checkpoints", read_only=True)
    assert aside.steps() == [20, 30] and same(aside.load_params(30, None), jax.tree.map(jax.device_get, TWICE))


def test_an_ordinary_disk_is_told_from_a_bucket(tmp_path):
    assert folders(save_two_steps(tmp_path)) == sorted(os.listdir(tmp_path)) == ["10", "20"]
