"""No delta checkpoint uses a base that has changed, and saving one never changes its base."""

import os
import shutil
from pathlib import Path

import pytest

from llm3.checkpoints.orbax_store import DamagedCheckpoint
from llm3.checkpoints.stage_checkpoints import Checkpoints
from llm3.errors import NotWritten, UserError
from tests.helpers.tiny_checkpoints import HARMS, abstract, data_files, flip, largest, same
from tests.helpers.tiny_delta import AT, OPTS, START, contents, newest, reader, save, save_stage, trainable, whole

# Orbax leaves coroutines behind when it fails on a damaged file
pytestmark = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning", "ignore:coroutine:RuntimeWarning"
)


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    return save_stage(tmp_path_factory.mktemp("delta") / "stage")


@pytest.fixture
def stage(original, tmp_path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "stage"))


def without(base: Path) -> str:
    shutil.rmtree(base)
    return "base/0, the base of step 20, is missing"


def half_written(base: Path) -> str:
    (base / "0").rename(base / "0.orbax-checkpoint-tmp")
    return "base/0, the base of step 20, is missing"


def other(base: Path) -> str:
    shutil.rmtree(base)
    with Checkpoints(base.parent / "checkpoints") as checkpoints:
        checkpoints._base.save(0, whole(5), {}, {})
    return "base/0 does not hold the parameters that step 20 was saved against"


def overwritten(base: Path) -> str:
    """Other values, which Orbax loads without an error."""
    with Checkpoints(base.parent / "elsewhere") as checkpoints:
        checkpoints.save(0, START | {"head": whole(5)["head"]}, {}, {})
    shutil.rmtree(base / "0" / "params")
    shutil.move(base.parent / "elsewhere" / "0" / "params", base / "0" / "params")
    return "base/0/params: head/bias, head/kernel does not match its digest"


def flipped(base: Path) -> str:
    flip(largest(base / "0" / "params"))
    return "base/0/params cannot be read"


@pytest.mark.parametrize("harm", [without, half_written, other, overwritten, flipped])
def test_a_base_that_is_gone_or_damaged_or_another_one_is_named_and_a_complete_step_is_taken(stage, harm):
    reason = harm(stage / "base")
    for read in (reader(stage).load_params, lambda step: reader(stage).load_params(step, abstract(START))):
        with pytest.raises(DamagedCheckpoint, match=reason):
            read(20)
    with pytest.raises(UserError, match="none of its checkpoints can be read") as error:
        newest(reader(stage))
    assert reason in str(error.value)
    assert reason.replace("20", "10") in str(error.value)
    shutil.rmtree(stage / "checkpoints" / "10")
    with Checkpoints(stage / "earlier") as checkpoints:
        save(checkpoints, 10, delta=False)
    (stage / "earlier" / "10").rename(stage / "checkpoints" / "10")
    with Checkpoints(stage / "checkpoints") as checkpoints:
        restored = newest(checkpoints)
        assert restored.step == 10
        assert same(restored.params, AT[10])
        assert reason in restored.skipped[0]
        checkpoints.save_base(restored.params, restored.meta, trainable(restored.params))
        save(checkpoints, 20)
    assert same(reader(stage).load_params(20, abstract(START)), AT[20])


def test_a_damaged_base_stays_where_it_is_until_no_checkpoint_needs_it(stage):
    flip(largest(stage / "base" / "0" / "params"))
    damaged = contents(stage / "base")
    with Checkpoints(stage / "checkpoints") as checkpoints:
        with pytest.raises(UserError):
            newest(checkpoints)
        checkpoints.save(30, AT[20], OPTS[20], {})
        checkpoints.wait()
        assert contents(stage / "base") == damaged
        assert {each.name for each in (stage / "checkpoints").iterdir()} == {"10.damaged", "20.damaged", "30"}
        checkpoints.save_base(AT[20], {})
        checkpoints.save(40, trainable(AT[10]), OPTS[20], {}, delta=True)
    assert [each.name for each in (stage / "base").iterdir()] == ["0"]
    assert same(reader(stage).load_params(40, abstract(START)), AT[10])


def test_a_base_that_was_left_behind_is_kept_if_it_is_the_same_and_else_replaced(stage):
    shutil.rmtree(stage / "checkpoints")
    written = contents(stage / "base")
    with Checkpoints(stage / "checkpoints") as checkpoints:
        checkpoints.save_base(START, {"tokens": 1})
    with pytest.raises(RuntimeError, match="read-only"):
        reader(stage).save_base(whole(5), {})
    assert contents(stage / "base") == written
    for harm in (None, flipped, half_written):
        if harm:
            harm(stage / "base")
        with Checkpoints(stage / "checkpoints") as checkpoints:
            checkpoints.save_base(whole(5), {})
            save(checkpoints, 10)
        assert same(reader(stage).base(abstract(START)), whole(5))
        assert [each.name for each in (stage / "base").iterdir()] == ["0"]
        shutil.rmtree(stage / "checkpoints")


def test_a_damaged_base_is_restored_from_the_same_parameters(stage):
    flip(largest(stage / "base" / "0" / "params"))
    with Checkpoints(stage / "checkpoints") as checkpoints:
        checkpoints.save_base(START, {})
    assert same(reader(stage).load_params(20, abstract(START)), AT[20])


def test_a_stage_rejects_a_base_that_would_change_frozen_parameters(stage):
    before = contents(stage)
    with Checkpoints(stage / "checkpoints") as checkpoints:
        for params, trained in ((whole(5), None), (AT[20], None), (AT[20], {"head": AT[20]["head"]})):
            with pytest.raises(UserError, match=r"base does not hold the frozen .* of step 10, 20"):
                checkpoints.save_base(params, {}, trained)
        checkpoints.save_base(AT[20], {}, trainable(AT[20]))
    assert contents(stage) == before


def test_no_delta_checkpoint_is_saved_if_its_base_was_not_written(tmp_path, monkeypatch):
    rename = os.rename

    def fail(source, target, **options):
        if "base" in str(source):
            raise OSError("no space left on this device")
        return rename(source, target, **options)

    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        with monkeypatch.context() as patch:
            patch.setattr(os, "rename", fail)
            patch.setattr(os, "replace", fail)
            checkpoints.save_base(START, {})
            with pytest.raises(NotWritten, match=r"base: .* step 0 was not written: .*no space left"):
                save(checkpoints, 10)
        assert checkpoints.steps() == []
        checkpoints.save_base(START, {})
        save(checkpoints, 10)
    assert same(checkpoints.load_params(10, abstract(START)), AT[10])


@pytest.mark.parametrize("harm", HARMS)
@pytest.mark.parametrize("part", ["base/0", "checkpoints/20/params"])
def test_harm_to_any_file_is_harmless_or_found(stage, part, harm):
    found = 0
    for path in data_files(stage / part):
        content = path.read_bytes()
        HARMS[harm](path)
        try:
            assert same(reader(stage).load_params(20, abstract(START)), AT[20]), path
        except DamagedCheckpoint as error:
            assert part in str(error)
            found += 1
        path.write_bytes(content)
    assert found
