"""Run `vitmodel predict` from a checkout that is not installed: `python vitmodel/predict.py ...`."""

if __name__ == "__main__":
    import sys

    sys.path[0] = __file__.rsplit("/", 2)[0]
    from vitmodel.cli import main

    sys.exit(main(["predict", *sys.argv[1:]]))
