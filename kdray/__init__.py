"""kdray: what distillation is. Importing any module here loads neither Ray, vLLM nor DeepSpeed."""

__version__ = "0.1.0"
