"""The task head in the files of a family: in transformers' own place where that computes the same."""

from types import ModuleType

from llm3.config.model_schema import ModelConfig


def has_place(plugin: ModuleType, model: ModelConfig) -> bool:
    """Whether transformers' classifier of sequences in this family computes the model's task head.

    That of decoders reads the last token; those of BERT and RoBERTa read the first one through a pooler.
    """
    if not model.classes or not plugin.CLASSIFIER:
        return False
    pooled = "pooler" in plugin.TABLE
    return model.pooler == pooled and model.pool == ("first" if pooled else "last")


def saved_modules(plugin: ModuleType, model: ModelConfig) -> list[str]:
    """transformers' modules that make up the task head, as PEFT's modules_to_save names them."""
    modules = [plugin.TABLE[name] for name in ("head", *(["pooler"] if model.pooler else []))]
    return sorted({module.removeprefix(plugin.BASE).partition(".")[0] for module in modules})
