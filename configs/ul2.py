"""The quickstart, pretrained with UL2's mixture of denoisers instead of next tokens alone.

    python -m llm3 run --config=configs/ul2.py --workdir=runs/ul2

Each document of a window is denoised in one of seven ways (Tay et al. 2022, Table 1), with its mode as a prefix: short
spans (R), the end of the document (S), many or long spans (X). The rest is as in configs/quickstart.py. Run it from the
root of the repository. Bits per byte measure next tokens, which this model sees fewer of in training.
"""

from configs.quickstart import get_config as quickstart


def get_config():
    """The experiment."""
    c = quickstart()
    with c.ignore_type():  # a string in the quickstart
        c.stages.pretrain.objective = dict(name="prefix", denoisers="ul2")
    return c
