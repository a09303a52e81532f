"""`python -m remix_cli` and `accelerate launch -m remix_cli` are the `remix` command."""

from remix_cli.cli import main

if __name__ == "__main__":
    main()
