"""The points of the campaign of kills, and the damages between them; the campaign itself is no test (`kills`)."""

import random

import pytest

from tests.campaigns import damage
from tests.campaigns.kill_points import STAGES, draw
from tests.helpers import tiny_deaths

DRAWS = [draw(random.Random(seed)) for seed in range(40)]


def test_each_draw_has_every_stage_with_every_kind_of_place():
    for kills in DRAWS:
        found = {(kill.place, kill.stage) for kill in kills}
        each = {(place, stage) for place in ("save", "commit", "evaluation") for stage in STAGES}
        assert found == each | {("tokenizing", STAGES[0]), *(("hand-off", stage) for stage in STAGES[1:])}
    assert draw(random.Random(1)) == DRAWS[1] != DRAWS[2]


def test_each_point_exists_and_each_choice_of_victims_occurs():
    known = tiny_deaths.places("", 0).keys() | tiny_deaths.WHILE
    assert known.issuperset(kill.point.split(":")[0] for kills in DRAWS for kill in kills)
    assert {kill.victims for kills in DRAWS for kill in kills} == {(0,), (1,), (1, 0)}


@pytest.mark.parametrize("number", range(6))
def test_a_damage_changes_one_file_is_named_by_an_error_and_can_be_undone(tmp_path, number):
    names = ["fit/checkpoints/8/params/d/ab", "fit/metrics.jsonl", "cache/tokens-1f/keys.npy"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"the content of {name}")
    read = lambda: {name: (tmp_path / name).read_bytes() for name in names if (tmp_path / name).exists()}  # noqa: E731
    before = read()
    done = damage.do(tmp_path, number, random.Random(number))
    assert [name for name in names if read().get(name) != before[name]] == [done.path] and done.lasts(tmp_path)
    assert done.named_in(tmp_path, f"fine\n {tmp_path / done.path}: it is damaged ") == (
        f"{tmp_path / done.path}: it is damaged"
    )
    done.undo(tmp_path)
    assert read() == before and done.is_mended(tmp_path)


def test_damages_of_a_checkpoint_are_named_by_its_folder(tmp_path):
    done = damage.Damage("checkpoint", "missing", "fit/checkpoints/8/params/d/ab", b"x", None)
    assert done.named_in(tmp_path, f"step 8 is damaged: {tmp_path}/fit/checkpoints/8/params cannot be read")
    assert done.named_in(tmp_path, f"{tmp_path}/fit/checkpoints/80/params is fine") is None
