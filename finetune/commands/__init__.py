"""The commands `finetune data ...`: each a page with `Config` and `main(config)`, as recipes are."""
