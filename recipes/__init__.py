"""Recipes: pages that read downward. They import `finetune`, never one another; installed as `finetune.recipes`."""
