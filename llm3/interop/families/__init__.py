"""Families of models of others. Each module is a plugin, found by its name, with:

MODEL_TYPES: the values of model_type in config.json.
LM, CLASSIFIER: transformers' classes with an LM head and with a head for sequences; "" for CLASSIFIER if llm3's head
  has no place in it.
BASE: the prefix of names in the files that files of a model without any head lack.
TABLE: the leaves; see `llm3.interop.table`.
LEFT_OVER: patterns of names that files may have besides, and that are ignored.
read_config(json): the fields of a ModelConfig. Raises UserError for what llm3 does not compute.
write_config(model): the keys of config.json without those of text and labels. It need not check what the family
  cannot express: `llm3.interop.family.check_expresses` reads the result back and compares.
"""
