"""Run `vitmodel train` from a checkout that is not installed: `python vitmodel/train.py ...`."""

if __name__ == "__main__":
    import sys

    sys.path[0] = __file__.rsplit("/", 2)[0]
    from vitmodel.cli import main

    sys.exit(main(["train", *sys.argv[1:]]))
