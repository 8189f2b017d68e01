"""Where the processes of a run are killed: seeded points, in the order in which a run comes by."""

import random
from typing import NamedTuple

STAGES = ("pretrain", "posttrain", "finetune")
STEPS, SAVE_EVERY, EVAL_EVERY = 8, 2, 4  # of each stage
BY_FIRST = ("tokenizer", "tokens", "shard", "file", "part", "commit", "committed")  # places that process 0 alone passes
REPORTED = "file:matrix.json"  # all stages are done, and the report is not
WHO = {"first": (0,), "second": (1,), "both": (1, 0)}


class Kill(NamedTuple):
    """A point of `tiny_deaths`, in what kind of place it is, and who is killed when it is reached: a key of WHO."""

    place: str
    point: str
    who: str

    @property
    def stage(self) -> str:
        """The stage that is under way."""
        default = STAGES[-1] if self.point == REPORTED else STAGES[0]
        return next((each for each in STAGES if f":{each}" in self.point), default)

    @property
    def victims(self) -> tuple[int, ...]:
        """The processes that are killed."""
        return WHO[self.who]

    @property
    def actor(self) -> int:
        """The process that comes by the point, and kills."""
        return 0 if self.point.split(":")[0] in BY_FIRST else self.victims[-1]


def draw(pick: random.Random) -> list[Kill]:
    """The kills of one run to its end: 2 in tokenizing, and a save, a commit and an evaluation of each stage.

    Those that start from a parent have one in the hand-off as well. Of a save and a commit of one step, the second
    would not be reached.
    """
    tokenizing = ["tokenizer:", f"tokens::{pick.randint(1, 30)}", "shard:", "file:manifest.json"]
    order = {("tokenizing", point): (0, point != "tokenizer:") for point in pick.sample(tokenizing, 2)}
    for number, stage in enumerate(STAGES, start=1):
        saved, committed = pick.sample(range(SAVE_EVERY, STEPS + 1, SAVE_EVERY), 2)
        order["save", f"{pick.choice(('saving', 'part', 'saved'))}:{stage}:{saved}"] = (number, saved, 1)
        order["commit", f"{pick.choice(('commit', 'committed'))}:{stage}:{committed}"] = (number, committed, 1)
        point, *at = pick.choice(evaluations(stage, pick))
        order["evaluation", point] = (number, *at)
        if number > 1:
            point, *at = pick.choice(hand_offs(stage))
            order["hand-off", point] = (number, *at)
    in_order, whoever = sorted(order, key=order.__getitem__), [*WHO]
    # where the second process is killed, the first one tokenizes all there is before it notices
    who = ["first", *(pick.choice(whoever) for _ in in_order[1:])]
    return [Kill(*each, victims) for each, victims in zip(in_order, who, strict=True)]


def hand_offs(stage: str) -> list[tuple]:
    """(point, step, place among those of the step) of all hand-offs of a stage."""
    found = [(f"reading:{stage}", -1, 0), (f"handed:{stage}", -1, 1)]
    if stage == STAGES[-1]:  # it trains a part of the parameters, and saves the others as a base
        base = ("saving_base:{}", "part:{}:0", "commit:{}:0", "committed:{}:0", "saved_base:{}")
        found += [(each.format(stage), 0, place) for place, each in enumerate(base)]
    return found


def evaluations(stage: str, pick: random.Random) -> list[tuple]:
    """As `hand_offs`: between steps, of the result, of the untrained model before the first, of the report at last."""
    found = [(f"evaluating:{stage}:{step}", step, 0) for step in range(EVAL_EVERY, STEPS + 1, EVAL_EVERY)]
    batch, last = pick.randint(1, 4), STEPS + 1
    found += [(f"row:{stage}", last, 0), (f"batch:{stage}:{batch}", last, 1)]
    found += [(f"file:{stage}/evaluation.json", last, 2)]
    if stage == STAGES[0]:
        found += [(f"batch:init:{batch}", -3, 0), ("file:init/evaluation.json", -3, 1)]
    if stage == STAGES[-1]:
        found += [(REPORTED, last, 3)]
    return found
