r"""Does a domain stage pay for a model that others have pretrained? SmolLM2-135M-Instruct, at four points of the map.

    python -m llm3 ablate --config=configs/ablations/imported_model.py --workdir=runs/imported \
        --config.base.data_dir=data

After a colon: a folder that holds the model, instead of its name on the Hugging Face hub. A tenth or all of the medical
text, 100 or 500 labels, and two ways to use the same compute: the domain, then the task; or the task alone, for longer.
Both train the top 4 of 30 layers. The base is configs/smollm2_medical.py with half of its steps.
"""

from ml_collections import ConfigDict

GURURANGAN = "Gururangan et al. 2020: a stage on the domain of the task helps a model that others have pretrained"


def get_config(model=""):
    """The ablation. model: a folder; "": the name on the hub."""
    c = ConfigDict(convert_dict=False)
    c.question = "Does a stage on the domain pay for a pretrained model, by the amount of domain text and labels?"
    c.base = "../smollm2_medical.py" + (f":{model}" if model else "")
    c.stage = "types_top4"
    c.metric = "task_accuracy"
    c.seeds = [0, 1, 2]
    c.match = "flops"
    c.change = {"stages.top4.steps": 50, "stages.types_top4.steps": 30}
    c.arms = {"domain then task": {}, "task alone": dict(without=["top4"], adjust="types_top4")}
    c.grid = {
        "domain text": {"10 %": {"sources.medquad.max_documents": 1484}, "100 %": {"sources.medquad.max_documents": 0}},
        "labels": {str(n): {"sources.task.max_documents": n} for n in (100, 500)},
    }
    first, second = c.arms
    c.comparisons = {
        "a domain stage": dict(ours=first, theirs=second, expect="better", smallest=0.02, literature=GURURANGAN)
    }
    return c
