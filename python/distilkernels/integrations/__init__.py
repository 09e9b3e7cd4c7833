"""Bridges to other libraries. Each is imported on request only: ``from distilkernels.integrations import transformers``."""


def __getattr__(name: str):
    if name == "transformers":
        import importlib

        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
