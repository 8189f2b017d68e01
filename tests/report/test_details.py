"""The parts of the report beyond single numbers."""

from llm3.report.details import in_detail, repeated

ROWS = [{"stage": "init"}, {"stage": "posttrain", "epochs": {"text": 0.5, "tasks": 3.25}}, {"stage": "finetune"}]


def test_the_details_of_the_last_stage_are_shown_and_the_files_of_the_others_named():
    details = {"init": {"domain_by_tag": {"law": 5.0}}, "posttrain": {"domain_by_tag": {"law": 1.5}}, "finetune": None}
    assert in_detail(ROWS, details) == [
        "## posttrain in detail",
        "**domain by tag**",
        "- law: 1.500",
        "Of the other stages: init/details.json.",
    ]


def test_metrics_by_class_are_a_table_with_one_row_per_class():
    table = in_detail(ROWS, {"init": {"task_per_class": {"a": {"f1": 0.5, "support": 3}, "b": {"support": 1}}}})[2]
    assert table == "|  | f1 | support |\n| :-- | :-- | :-- |\n| a | 0.500 | 3 |\n| b | - | 1 |"


def test_a_confusion_is_no_table_since_a_heat_map_shows_it():
    assert in_detail(ROWS, {"init": {"task_confusion": {"classes": ["x", "y"], "counts": [[1, 0], [2, 3]]}}}) == []


def test_a_text_in_a_table_stays_in_its_cell():
    table = in_detail(ROWS, {"init": {"answers_examples": [{"prompt": "a | b\nc" + 200 * "d"}]}})[2]
    cell = table.splitlines()[2]
    assert cell.startswith("| a \\| b c") and cell.endswith("d… |") and len(cell) < 180


def test_without_details_there_is_no_section():
    assert in_detail(ROWS, {"init": None, "posttrain": {}}) == []


def test_the_epochs_of_each_source_are_shown_for_each_stage():
    assert repeated(ROWS) == ["## Epochs of each source", "- posttrain: text 0.5, tasks 3.2"]
    assert repeated(ROWS[:1]) == []
