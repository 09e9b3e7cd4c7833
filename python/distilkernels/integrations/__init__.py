"""Bridges to other libraries. Each is imported on request only: ``from distilkernels.integrations import transformers``."""
