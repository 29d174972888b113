"""What was trained, as files: each loaded back and compared with the live model before it takes its name."""

from finetune.export.adapter_file import adapter, convert, verify_adapter
from finetune.export.embedding_file import embeddings
from finetune.export.merged_folder import merged, verify_merged
from finetune.export.reading import attach, detach, set_strengths
from finetune.export.single_file import single_file, verify_single_file

__all__ = [
    "adapter",
    "attach",
    "convert",
    "detach",
    "embeddings",
    "merged",
    "set_strengths",
    "single_file",
    "verify_adapter",
    "verify_merged",
    "verify_single_file",
]
