"""`python -m nlpxfer`: the `nlpxfer` command, see nlpxfer/cli.py."""

from nlpxfer.cli import main

if __name__ == "__main__":
    main()
