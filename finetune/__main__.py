"""`python -m finetune` is the command `finetune`; `accelerate launch -m finetune ...` starts several of it."""

from finetune.cli import main

if __name__ == "__main__":
    main()
